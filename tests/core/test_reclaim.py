"""What stays findable under each order of reclaim, seen from outside: by KV events and hits."""

import msgspec
import numpy as np
import pytest

from pagedkv import ConfigError, InvalidRequest, Request, SamplingParams
from pagedkv.core.reclaim import HIT_LEVEL
from pagedkv.events import BlockRemoved, BlockStored
from tests.core.fakes import Driver, make_config, make_request


def ordered(order, num_blocks, **options):
    config = make_config(4, num_blocks, **options)
    return msgspec.structs.replace(
        config, cache=msgspec.structs.replace(config.cache, reclaim=order)
    )


def ask(driver, name, prompt, priority=0):
    """Serve one request and return how many of its tokens were cached."""
    request = make_request(name, prompt, max_tokens=1)
    driver.run(msgspec.structs.replace(request, priority=priority))
    return driver.finished[name, 0].num_cached_tokens


@pytest.mark.parametrize("order", sorted(HIT_LEVEL.keys() - {"fifo"}))
def test_whatever_is_findable_can_be_reached_from_its_root(order):
    """Chats that branch and come back, in a pool that holds a quarter of them."""
    driver = Driver(ordered(order, 24, events=True))
    rng = np.random.default_rng(3)
    parent = {}
    removed = 0
    chats = [[topic] * 6 for topic in range(8)]
    for turn in range(120):
        chat = chats[rng.integers(len(chats))]
        end = driver.run(
            Request(
                request_id=str(turn),
                prompt_token_ids=[*chat, int(rng.integers(60))],
                sampling=SamplingParams(max_tokens=4, seed=turn),
                priority=int(rng.integers(-3, 3)),
            )
        )[str(turn), 0]
        if len(chat) < 40:
            chat.extend(end.token_ids)
        for event in driver.scheduler.take_events():
            if isinstance(event, BlockStored):
                for block in event.block_hashes:
                    parent[block] = (
                        event.parent_block_hash
                        if block == event.block_hashes[0]
                        else (event.block_hashes[event.block_hashes.index(block) - 1])
                    )
            elif isinstance(event, BlockRemoved):
                removed += len(event.block_hashes)
                for block in event.block_hashes:
                    del parent[block]
        assert {p for p in parent.values() if p is not None} <= parent.keys()
    assert removed > 50


KEPT = {"lru": 0, "fifo": 0, "lfu": 8, "slru": 8, "priority": 0}


@pytest.mark.parametrize("order", KEPT)
def test_a_scan_flushes_what_was_found_before_only_where_use_does_not_count(order):
    driver = Driver(ordered(order, 10))
    ask(driver, "system prompt", 9)
    assert ask(driver, "again", 9) == 8
    for i in range(8):
        ask(driver, f"scan {i}", [30 + i] * 9)
    assert ask(driver, "after the scan", 9) == KEPT[order]


def test_blocks_of_urgent_requests_outlive_a_scan_of_others():
    driver = Driver(ordered("priority", 10))
    ask(driver, "urgent", 9, priority=-1)
    for i in range(8):
        ask(driver, f"scan {i}", [30 + i] * 9)
    assert ask(driver, "again", 9) == 8


def test_a_hit_renews_a_block_unless_the_order_is_fifo():
    kept = {}
    for order in ("lru", "fifo"):
        driver = Driver(ordered(order, 7))
        ask(driver, "first", 9)
        ask(driver, "second", [40] * 9)
        ask(driver, "first again", 9)
        ask(driver, "third", [50] * 13)
        kept[order] = ask(driver, "first once more", 9)
    assert kept == {"lru": 8, "fifo": 4}


def test_what_a_preempted_sequence_finds_again_is_counted_apart():
    driver = Driver(ordered("lfu", 8))
    driver.run(
        make_request("a", [1] * 13, max_tokens=12), make_request("b", [2] * 13, max_tokens=12)
    )
    stats = driver.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.prompt_tokens == 26
    assert stats.prompt_tokens_cached == 0
    assert 0 < stats.resumed_tokens_cached < stats.resumed_tokens
    assert not driver.scheduler.manager.pool.cached._level.any(), "its own hits do not count"


def test_an_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="reclaim"):
        ordered("arc", 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": 1.5},
        {"priority": True},
        {"priority": 2**40},
        {"priority": -(2**40)},
        {"arrival": float("nan")},
        {"arrival": float("inf")},
        {"arrival": "now"},
        {"tenant": 3},
    ],
)
def test_a_request_of_no_rank_is_refused(wrong):
    with pytest.raises(InvalidRequest, match=next(iter(wrong))) as caught:
        Request(request_id="r", prompt_token_ids=[1], **wrong)
    assert caught.value.remedy
