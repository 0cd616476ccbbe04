"""KV events: in vLLM's shapes, and enough to know at any time what can be found."""

import msgspec
import numpy as np
import pytest

from pagedkv.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    short_hash,
)
from tests.core.fakes import Driver, make_config, make_request


class Router:
    """Follows the events of one scheduler, as a cache-aware router would."""

    def __init__(self):
        self.blocks = {}

    def follow(self, events):
        for event in events:
            match event:
                case BlockStored(block_hashes=hashes, token_ids=ids, block_size=size):
                    assert len(ids) == size * len(hashes)
                    parent = event.parent_block_hash
                    for i, digest in enumerate(hashes):
                        assert digest not in self.blocks, "stored twice"
                        self.blocks[digest] = (parent, tuple(ids[i * size : (i + 1) * size]))
                        parent = digest
                case BlockRemoved(block_hashes=hashes):
                    for digest in hashes:
                        del self.blocks[digest]
                case AllBlocksCleared():
                    self.blocks.clear()


def findable(driver):
    manager = driver.scheduler.manager
    every = np.arange(manager.pool.num_blocks, dtype=np.int32)
    return {short_hash(digest) for digest in manager.index.hashes_of(every)}


def test_the_shapes_are_those_that_vllms_routers_read():
    stored = BlockStored(
        block_hashes=[2**64 - 1, 7], parent_block_hash=None, token_ids=[1, 2, 3, 4], block_size=2
    )
    batch = KVEventBatch(
        ts=1.5, events=[stored, BlockRemoved(block_hashes=[7]), AllBlocksCleared()]
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch)) == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [2**64 - 1, 7],
                "parent_block_hash": None,
                "token_ids": [1, 2, 3, 4],
                "block_size": 2,
            },
            {"type": "BlockRemoved", "block_hashes": [7]},
            {"type": "AllBlocksCleared"},
        ],
    ]


def test_the_fields_stand_in_vllms_order():
    assert BlockStored.__struct_fields__ == (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "extra_keys",
    )
    assert BlockRemoved.__struct_fields__ == ("block_hashes", "medium")


def test_a_batch_is_read_back_as_it_was_written():
    batch = KVEventBatch(ts=0.0, events=[AllBlocksCleared(), BlockRemoved(block_hashes=[1])])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=KVEventBatch) == batch


def test_a_hash_in_an_event_is_the_low_64_bits():
    assert short_hash(bytes(8) + b"\xff" * 8) == 2**64 - 1
    assert short_hash(b"\xff" * 8 + bytes(7) + b"\x01") == 1


def test_sealed_blocks_are_reported_with_their_parent_and_tokens():
    driver = Driver(make_config(4, 20, events=True))
    driver.add(make_request("a", 9, max_tokens=5))
    driver.step()
    (prompt,) = driver.scheduler.take_events()
    assert prompt.parent_block_hash is None
    assert (prompt.token_ids, prompt.block_size) == (list(range(8)), 4)
    assert len(prompt.block_hashes) == 2
    driver.run()
    (answer,) = driver.scheduler.take_events()
    assert answer.parent_block_hash == prompt.block_hashes[-1]
    assert answer.token_ids == driver.executor.known[0][8:12]
    assert driver.scheduler.take_events() == []


def test_reclaimed_blocks_and_resets_are_reported():
    driver = Driver(make_config(4, 3, events=True))
    driver.run(make_request("a", 8, max_tokens=1))
    (stored,) = driver.scheduler.take_events()
    driver.run(make_request("b", [40] * 7, max_tokens=1))
    removed, _ = driver.scheduler.take_events()
    assert removed == BlockRemoved(block_hashes=stored.block_hashes[-1:])
    driver.scheduler.reset_prefix_cache()
    assert driver.scheduler.take_events() == [AllBlocksCleared()]


def test_nothing_is_recorded_unless_asked_for():
    driver = Driver(make_config(4, 20))
    driver.run(make_request("a", 9))
    driver.scheduler.reset_prefix_cache()
    assert driver.scheduler.take_events() == []


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_events_always_tell_what_can_be_found(num_groups, seed):
    driver = Driver(make_config(4, 14 * num_groups, events=True), num_groups=num_groups)
    router = Router()
    for i in range(12):
        prompt = [*range(4 * ((i + seed) % 4)), 30 + i % 3, i]
        driver.add(make_request(f"r{i}", prompt, seed=i % 2, n=1 + i % 2, max_tokens=10))
        driver.step()
        if i == 7:
            driver.scheduler.reset_prefix_cache()
        router.follow(driver.scheduler.take_events())
        assert set(router.blocks) == findable(driver)
    while driver.scheduler.has_unfinished():
        driver.step()
        router.follow(driver.scheduler.take_events())
        assert set(router.blocks) == findable(driver)
    assert router.blocks


def test_a_block_that_is_still_findable_is_not_stored_again():
    """Its parent was reclaimed and computed anew: only the parent is news."""
    driver = Driver(make_config(4, 20, events=True))
    driver.add(make_request("a", 13, max_tokens=9))
    driver.step()
    driver.scheduler.reset_prefix_cache()
    for _ in range(5):
        driver.step()
    router = Router()
    router.follow(driver.scheduler.take_events())
    history = driver.executor.known[0][:17]
    driver.run(make_request("b", history, max_tokens=1))
    router.follow(driver.scheduler.take_events())
    assert set(router.blocks) == findable(driver)
