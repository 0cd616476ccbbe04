"""Pure replay through the pool and index, beside naive caches and the brute-force optimum."""

from collections import OrderedDict, defaultdict
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest

import pagedkv
from pagedkv import ConfigError
from pagedkv.sim.content import Content, stream_ids
from pagedkv.sim.generators import tool_agent
from pagedkv.sim.readers import read_trace
from pagedkv.sim.readers.rows import block_content
from pagedkv.sim.replay import ORDERS, Oracle, replay
from pagedkv.sim.workload import SimRequest, Workload
from tests.sim.workloads import config

SLICE = read_trace(Path(__file__).parent / "data/conversation.jsonl", "mooncake")


def naive_hits(chains, capacity, order):
    """Blocks found by longest prefix, in a cache that is a dict in order of reclaim."""
    cache, uses, hits = OrderedDict(), defaultdict(int), 0
    for chain in chains:
        found = next((i for i, h in enumerate(chain) if h not in cache), len(chain))
        hits += found
        for digest in reversed(chain):
            known = digest in cache
            if digest in chain[:found]:
                uses[digest] += 1
            if known and order == "lru":
                cache.move_to_end(digest)
        held = set(chain)
        for digest in reversed(chain):
            if digest in cache:
                continue
            while len(cache) >= capacity:
                del cache[next(h for h in cache if h not in held)]
            cache[digest] = None
        if order == "lru":
            for digest in reversed(chain):
                cache.move_to_end(digest)
    return hits


def chains_of(workload):
    return [tuple(request.prompt.streams.tolist()) for request in workload]


@pytest.mark.parametrize("order", ["lru", "fifo"])
@pytest.mark.parametrize("capacity", [300, 900, 2500])
def test_replay_finds_what_a_naive_cache_finds(order, capacity):
    chains = chains_of(SLICE)
    want = naive_hits(chains, capacity, order) / sum(map(len, chains))
    assert replay(SLICE, capacity, order).block_hit_ratio == pytest.approx(want, abs=0.002)


def test_without_bounds_every_order_finds_what_was_seen_before():
    seen, hits = set(), 0
    for chain in chains_of(SLICE):
        hits += next((i for i, h in enumerate(chain) if h not in seen), len(chain))
        seen.update(chain)
    for order in ORDERS:
        found = replay(SLICE, None, order)
        assert found.unique_blocks == len(seen)
        assert found.block_hit_ratio == hits / sum(map(len, chains_of(SLICE)))


@pytest.mark.parametrize("capacity", [300, 900, 2500])
def test_no_order_beats_the_clairvoyant(capacity):
    ratios = {order: replay(SLICE, capacity, order).token_hit_ratio for order in ORDERS}
    assert max(ratios, key=ratios.get) == "clairvoyant"


def optimum(chains, capacity):
    """The most hits that any choice of what to keep can have: every subset, every step."""
    best = {frozenset(): 0}
    for chain in chains:
        after = {}
        for kept, hits in best.items():
            found = next((i for i, h in enumerate(chain) if h not in kept), len(chain))
            pool = sorted(kept | set(chain))
            for choice in product((False, True), repeat=len(pool)):
                keep = frozenset(h for h, chosen in zip(pool, choice, strict=True) if chosen)
                if len(keep) <= capacity:
                    after[keep] = max(after.get(keep, 0), hits + found)
        best = after
    return max(best.values())


def numbered(*chains):
    requests = [
        SimRequest(
            arrival=float(i),
            prompt=block_content(1, np.array(chain, np.int64), len(chain), 1),
            output_len=1,
            output_stream=i,
        )
        for i, chain in enumerate(chains)
    ]
    return Workload("numbered", lambda: requests, block_size=1)


@pytest.mark.parametrize("seed", range(8))
def test_the_clairvoyant_is_the_optimum_of_small_cases(seed):
    rng = np.random.default_rng(seed)
    families = [(1, 2), (1, 3), (4, 5), (6,)]
    chains = [families[i] for i in rng.integers(len(families), size=8)]
    want = optimum(chains, 2) / sum(map(len, chains))
    assert replay(numbered(*chains), 2, "clairvoyant").block_hit_ratio == pytest.approx(want)


def test_requests_larger_than_the_pool_are_counted():
    found = replay(numbered((1, 2, 3), (1,)), 2)
    assert found.skipped_requests == 1
    assert found.num_requests == 2


def test_an_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="clairvoyant"):
        replay(SLICE, 10, "arc")


def test_no_order_beats_the_oracle_inside_a_run_with_room_to_choose():
    source = tool_agent(num_prompts=80, rate=1.0, seed=1)
    setup = {
        order: config(3000, 16, reclaim=order, max_num_batched_tokens=2048)
        for order in ("lru", "fifo", "lfu", "slru")
    }
    hits = {
        order: pagedkv.simulate(each, source).summary["prefix_cache_hit_rate"]
        for order, each in setup.items()
    }
    oracle = Oracle(source, 16)
    best = pagedkv.simulate(setup["lru"], source, prepare=oracle.prepare)
    assert best.summary["prefix_cache_hit_rate"] >= max(hits.values()) > hits["lru"]


def numbered_by_blocks(source):
    """The prompts as chained ids per 512 tokens, a partial block's too, as Mooncake counts them."""
    requests = []
    for each in source:
        ends = np.cumsum(each.prompt.lengths)
        marks = np.unique(np.append(np.arange(512, ends[-1], 512), ends[-1]))
        # The stream of a block's last token is in no other prompt that differs before it.
        last = each.prompt.streams[np.searchsorted(ends, marks)]
        ids = Content(stream_ids(1, last + marks), np.diff(marks, prepend=0))
        requests.append(msgspec.structs.replace(each, prompt=ids))
    return Workload("by blocks", lambda: requests, block_size=512)


def test_the_tool_agent_generator_has_the_published_shape():
    """Hits by blocks without bounds, and of LRU with 5 % of the unique blocks."""
    source = numbered_by_blocks(tool_agent(num_prompts=23_608))
    asked = np.concatenate([each.prompt.streams for each in source])
    unique = len(np.unique(asked))
    assert 1 - unique / len(asked) == pytest.approx(0.553, abs=0.006)
    assert replay(source, unique // 20).block_hit_ratio == pytest.approx(0.449, abs=0.01)
