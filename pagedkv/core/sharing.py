"""Blocks while steps are foreseen: how many there are, and which of them several sequences hold."""

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.foreseen import FAR, NEVER, Run
from pagedkv.core.manager import BlockManager

__all__ = ["Sharing", "Supply"]


class Supply:
    """Counts what a pool has to give.

    Attributes:
        available, blank: Blocks, now; those that are not blank are cached.
        room: How many more may be taken: all in all as many as were available, so that none is
            reclaimed that was made findable, or was found, only now.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.available = manager.pool.num_available
        self.blank = self.available - manager.pool.num_cached
        self.room = self.available if manager.enable_prefix_caching else FAR
        self._reclaimed = self._revived = 0

    def take(self, count: int, revived: int = 0) -> None:
        """Take so many blocks, and so many cached ones that were found."""
        self.room -= count + revived
        self.available -= count + revived
        self._reclaimed += max(0, count - self.blank)
        self.blank -= min(count, self.blank)
        self._revived += revived

    def give_back(self, count: int, blank: int) -> None:
        """Take back so many, some of them blank."""
        self.available += count
        self.blank += blank

    def reach(self, count: int) -> int:
        """Return up to which place in the cache's order, as it was, blocks are gone once so many
        more were taken.
        """
        return self._reclaimed + max(0, count - self.blank) + self._revived


class Sharing:
    """Counts how many hold each block that several hold, or may: their ends need not free it, and
    whoever finds one that nobody holds takes it out of the cache's order.

    Args:
        rows: Those that run before the first step, as ``runs`` has them.
        runs: Everybody who computes; some are added as they enter.

    Attributes:
        of: Per run, its blocks among those.
        is_plain: Whether all full blocks of the rows can be found: those that came back from host
            memory cannot.
    """

    def __init__(self, manager: BlockManager, rows: Int32, runs: list[Run]) -> None:
        self._manager = manager
        self._runs = runs
        self.of: dict[int, list[int]] = {}
        self._holders: dict[int, int] = {}
        self._entered: set[int] = set()
        table, pool = manager.table, manager.pool
        held = table.num_blocks[0, rows]
        width = np.arange(held.max(initial=0))
        self._used = width < held[:, None]
        self._ids = table.block_table[0, rows, : len(width)]
        self._holder: Int32 | None = None
        self.is_plain = True
        if manager.enable_prefix_caching:
            full = width < (table.num_computed[rows] // manager.block_size)[:, None]
            self.is_plain = bool(manager.index.findable(self._ids)[full].all())
        if int(held.sum()) > pool.num_held:
            shared = (pool.references(self._ids) > 1) & self._used
            for w in shared.any(axis=1).nonzero()[0].tolist():
                self.of[w] = self._ids[w][shared[w]].tolist()
                for block in self.of[w]:
                    self._holders[block] = self._holders.get(block, 0) + 1

    def num_free(self, blocks: list[int]) -> int:
        """Return how many of some blocks, which can be found, nobody holds now."""
        holders = self._holders
        if any(block not in holders for block in blocks):
            self._ask_about([block for block in blocks if block not in holders])
        return sum(not holders[block] for block in blocks)

    def _ask_about(self, blocks: list[int]) -> None:
        """Count who holds blocks that were not asked about before: one of the rows, or nobody."""
        if self._holder is None:
            self._holder = np.full(self._manager.pool.num_blocks, NEVER, np.int32)
            self._holder[self._ids[self._used]] = self._used.nonzero()[0]
        for block, w in zip(blocks, self._holder[blocks].tolist(), strict=True):
            self._holders[block] = holds = int(w >= 0 and self._runs[w].end < 0)
            if holds:
                self.of.setdefault(w, []).append(block)

    def num_before(self, blocks: list[int]) -> int:
        """Return how many cached blocks go before the first of these that nobody entered with."""
        rest = [block for block in blocks if block not in self._entered]
        return self._manager.pool.cached.num_before(np.array(rest, np.int32))

    def enter(self, w: int, blocks: list[int]) -> None:
        """A run holds blocks, which were asked about, from now on."""
        if not blocks:
            return
        self.of[w] = blocks
        self._entered.update(blocks)
        for block in blocks:
            self._holders[block] += 1

    def leave(self, w: int) -> int:
        """A run ends; return how many of its blocks others hold still."""
        held = 0
        for block in self.of.get(w, ()):
            self._holders[block] -= 1
            held += self._holders[block] > 0
        return held
