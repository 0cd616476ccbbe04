"""Reclaim orders beside the clairvoyant bound: pure replay, and the same oracle inside a run.

Pure replay lets every request hold its prompt's blocks for no time at all, in order of arrival:
no step times, no answers. It goes through the engine's own pool and prefix index.
"""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Int32, Int64
from pagedkv.core.pool import BlockPool
from pagedkv.core.prefix import PrefixIndex, extend_chain
from pagedkv.core.reclaim import HIT_LEVEL
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import ConfigError
from pagedkv.sim.ranges import check
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["CLAIRVOYANT", "ORDERS", "Oracle", "Replayed", "replay"]

CLAIRVOYANT = "clairvoyant"
ORDERS = (*HIT_LEVEL, CLAIRVOYANT)
NEVER = np.iinfo(np.int32).max
DEEPEST = 4096


class Replayed(Struct, frozen=True, kw_only=True):
    """What a pure replay found.

    Attributes:
        token_hit_ratio, block_hit_ratio: Of all prompts' tokens and blocks, those found.
        request_hit_ratio: The mean over requests of the found share of their tokens.
        unique_blocks: Different blocks that were asked for.
        skipped_requests: Those larger than the pool, which were left out.
    """

    reclaim: str
    num_blocks: int
    num_requests: int
    token_hit_ratio: float
    block_hit_ratio: float
    request_hit_ratio: float
    unique_blocks: int
    skipped_requests: int


def _chain(request: SimRequest, block_size: int, own_size: int) -> list[bytes]:
    """Return the chained hashes of a prompt's blocks.

    At the trace's own block size its ids are the hashes, the last, partial block's included.
    """
    prompt = request.prompt
    if block_size == own_size and prompt.exact is None:
        raw = np.repeat(prompt.streams, 2).tobytes()  # as long as a hash
        return [raw[i : i + 16] for i in range(0, len(raw), 16)]
    hashes: list[bytes] = []
    tokens = prompt.token_ids()
    extend_chain(hashes, tokens, len(tokens) // block_size, block_size, "")
    return hashes


def _next_uses(chains: list[list[bytes]]) -> Iterator[Int64]:
    """Yield for each request when each of its blocks is used again: the request's number."""
    following: dict[bytes, int] = {}
    found: list[Int64] = []
    for number in range(len(chains) - 1, -1, -1):
        found.append(np.array([following.get(h, NEVER) for h in chains[number]], np.int64))
        following.update(dict.fromkeys(chains[number], number))
    return reversed(found)


def replay(
    workload: Workload,
    num_blocks: int | None,
    reclaim: str = "lru",
    *,
    block_size: int | None = None,
) -> Replayed:
    """Return the hit ratio of a workload's prompts under an order of reclaim.

    ``clairvoyant`` keeps what is used again soonest (Belady 1966) and stores nothing that is used
    again later than all that is cached: a lower bound of what is possible, above every real order.

    Args:
        num_blocks: The pool; None never runs out.
        block_size: The trace's own if omitted, 16 where it has none.

    Raises:
        ConfigError: The order is unknown, or the block size out of range.
        TraceError: The workload cannot be read.
    """
    if reclaim not in ORDERS:
        raise ConfigError(
            f"there is no order {reclaim!r}", where="reclaim", remedy=f"give {', '.join(ORDERS)}"
        )
    size = (workload.block_size or 16) if block_size is None else block_size
    check("replay", block_size=size)
    lengths: list[int] = []
    chains: list[list[bytes]] = []
    for request in workload:
        lengths.append(len(request.prompt))
        chains.append(_chain(request, size, workload.block_size))
    unique = len(set().union(*chains)) if chains else 0
    cache = _Cache(num_blocks or max(1, unique), reclaim)
    nexts = _next_uses(chains) if reclaim == CLAIRVOYANT else iter(lambda: None, 0)
    hits: list[int] = []
    skipped = 0
    for chain, uses in zip(chains, nexts, strict=False):
        if len(chain) > cache.pool.num_blocks:
            skipped += 1
            hits.append(0)
        else:
            hits.append(cache.use(chain, uses))
    found = np.array(hits, np.int64)
    tokens = np.minimum(found * size, lengths)
    asked = np.array(lengths, np.int64)
    return Replayed(
        reclaim=reclaim,
        num_blocks=cache.pool.num_blocks,
        num_requests=len(chains),
        token_hit_ratio=float(tokens.sum() / max(1, asked.sum())),
        block_hit_ratio=float(found.sum() / max(1, sum(map(len, chains)))),
        request_hit_ratio=float((tokens / np.maximum(asked, 1)).mean()) if chains else 0.0,
        unique_blocks=unique,
        skipped_requests=skipped,
    )


class _Cache:
    """The engine's pool and index, asked for whole prompts that are given back at once."""

    def __init__(self, num_blocks: int, reclaim: str) -> None:
        self.pool = BlockPool(num_blocks, "lru" if reclaim == CLAIRVOYANT else reclaim)
        self.index = PrefixIndex(num_blocks)
        self._levels: Int32 = np.zeros(num_blocks, np.int32)
        if reclaim == CLAIRVOYANT:
            self.pool.cached.foresee(CLAIRVOYANT, lambda ids: self._levels[ids])

    def use(self, chain: list[bytes], next_uses: Int64 | None) -> int:
        """Look a prompt up, store the rest of it, free it tail first; how many blocks were hits."""
        hits = self.index.match(chain)[:, 0]
        self.pool.share(hits)
        self.pool.cached.hit(hits, 0)
        if next_uses is None:
            ids = np.concatenate([hits, self._store(chain[len(hits) :])])
            self.pool.release(ids[::-1], self.index.findable(ids[::-1]))
            return len(hits)
        # Of blocks that are used again together, the deepest goes first.
        levels = np.maximum(-next_uses * DEEPEST - np.arange(len(chain)), -NEVER)
        self._levels[hits] = levels[: len(hits)]
        tail = hits[::-1]
        self.pool.release(tail, next_uses[: len(hits)][::-1] < NEVER)
        self._forget_useless(hits[next_uses[: len(hits)] == NEVER])
        for digest, level in zip(chain[len(hits) :], levels[len(hits) :].tolist(), strict=True):
            lowest = self.pool.cached.next_level
            full = self.pool.num_available == self.pool.num_cached
            if level == -NEVER or (full and lowest is not None and level <= lowest):
                break  # and nothing behind it, which is used again no sooner
            stored = self._store([digest])
            self._levels[stored] = level
            self.pool.release(stored, self.index.findable(stored))
        return len(hits)

    def _forget_useless(self, ids: Int32) -> None:
        if len(ids):
            self.index.remove(np.unique(ids))

    def _store(self, chain: list[bytes]) -> Int32:
        ids = self.pool.allocate(len(chain))
        self.index.remove(ids[self.index.findable(ids)])
        for digest, block in zip(chain, ids, strict=True):
            self.index.insert(digest, block)
        return ids


class Oracle:
    """Knows when each block of a workload's prompts will be asked for: the clairvoyant order.

    Hand `prepare` to `simulate`: cached blocks are then reclaimed by their next use, by order of
    arrival. Running sequences hold what they hold, and everything they compute is stored, so this
    is no bound: in a pool of few prompts a real order may find more. It holds a hash per block of
    every prompt, so it is for studies, not for long runs; follow-ups that have no arrival yet are
    not foreseen.

    Args:
        workload: What will be served; read once here.
        block_size: The engine's.
    """

    def __init__(self, workload: Workload, block_size: int) -> None:
        self._uses: dict[bytes, list[int]] = {}
        for number, request in enumerate(workload):
            hashes: list[bytes] = []
            tokens = request.prompt.token_ids()
            extend_chain(hashes, tokens, (len(tokens) - 1) // block_size, block_size, "")
            for digest in hashes:
                self._uses.setdefault(digest, []).append(number)

    def prepare(self, scheduler: Scheduler) -> None:
        """Let a scheduler reclaim by what is to come. Call it before the first request."""
        pool, index = scheduler.manager.pool, scheduler.manager.index

        def foresee(ids: Int32) -> Int32:
            now = scheduler.num_added - scheduler.num_waiting  # who waits is still to come
            return np.array([self._level(index.digest_of(i), now) for i in ids.tolist()], np.int32)

        pool.cached.foresee(CLAIRVOYANT, foresee)

    def _level(self, digest: bytes | None, now: int) -> int:
        uses = self._uses.get(digest or b"", ())
        at = bisect_right(uses, now - 1)
        return -uses[at] if at < len(uses) else -int(NEVER)
