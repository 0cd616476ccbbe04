"""The pool of block ids: who holds which, and which to hand out next."""

import numpy as np

from pagedkv.core.arrays import Bool, Int32
from pagedkv.core.reclaim import CachedOrder
from pagedkv.errors import ConfigError, InvalidTransition, OutOfBlocks

__all__ = ["BlockPool"]

MOST_BLOCKS = 2**26  # the books of so many take 2 GB


class BlockPool:
    """Reference counts and the order of reuse over ``num_blocks`` block ids.

    A block is held (its count is above 0), blank (free, content worthless) or cached (free,
    content still worth finding), and one number per block says which: its references, 0, or below 0
    its place in the order of the cached. Blank blocks are handed out first, last freed first; then
    cached ones in the order of ``reclaim``. Every operation is a few numpy calls for any number of
    blocks.

    Attributes:
        num_reclaimed: Cached blocks handed out so far.

    Args:
        num_blocks: Blocks in the pool.
        reclaim: The order in which cached blocks are reused: a name of `reclaim.HIT_LEVEL`.
    """

    def __init__(self, num_blocks: int, reclaim: str = "lru") -> None:
        if num_blocks > MOST_BLOCKS:
            raise ConfigError(
                f"{num_blocks:,} blocks",
                where="cache.num_blocks",
                remedy=f"give at most {MOST_BLOCKS:,}, or larger blocks",
            )
        self.num_blocks = num_blocks
        self._state: Int32 = np.zeros(num_blocks, np.int32)
        self._blank: Int32 = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_blank = num_blocks
        self.cached = CachedOrder(self._state, reclaim)
        self.num_reclaimed = 0

    def references(self, ids: Int32) -> Int32:
        """Return how many references blocks have, in the shape of ``ids``."""
        return np.maximum(self._state.take(ids), 0)

    @property
    def ref_count(self) -> Int32:
        """[num_blocks] References of every block. O(blocks)."""
        return np.maximum(self._state, 0)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self.cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give now: blank and cached."""
        return self._num_blank + len(self.cached)

    @property
    def num_held(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.num_available

    def is_blank(self) -> Bool:
        """Return which blocks are free and their content worthless: [num_blocks]. O(blocks)."""
        blank: Bool = np.zeros(self.num_blocks, np.bool_)
        blank[self._blank[: self._num_blank]] = True
        return blank

    def allocate(self, count: int) -> Int32:
        """Take ``count`` blocks, each with one reference: [count] block ids.

        Cached blocks among them lose their content: the caller must make them unfindable.

        Raises:
            OutOfBlocks: Fewer are available; nothing is taken.
        """
        if count > self.num_available:
            raise OutOfBlocks(
                f"{count} blocks asked for, {self.num_available} of {self.num_blocks} available",
                where="block pool",
            )
        from_blank = min(count, self._num_blank)
        self._num_blank -= from_blank
        ids = self._blank[self._num_blank : self._num_blank + from_blank][::-1].copy()
        if from_blank < count:
            cached = self.cached.pop(count - from_blank)
            ids = np.concatenate([ids, cached]) if from_blank else cached
            self.num_reclaimed += count - from_blank
        self.cached.reset(ids)
        self._state[ids] = 1
        return ids

    def share(self, ids: Int32) -> None:
        """Add one reference per occurrence in ``ids``; cached blocks among them become held.

        Raises:
            InvalidTransition: A block is neither held nor cached; nothing changes.
        """
        revived = np.unique(ids[self._state[ids] <= 0])
        found = self.cached.holds(revived)
        if not found.all():
            wrong = int(revived[~found][0])
            raise InvalidTransition("shared though it is blank", where=f"block {wrong}")
        self.cached.remove(revived)
        np.add.at(self._state, ids, 1)

    def release(self, ids: Int32, findable: Bool) -> None:
        """Drop one reference per occurrence in ``ids``.

        Blocks that nobody holds any more become free in the given order, so a caller that gives
        a sequence's blocks tail first has its chain reused from the leaf.

        Args:
            ids: [N] Block ids, tail first.
            findable: [N] Whether each block's content can be found again: cached, not blank.

        Raises:
            InvalidTransition: A block has fewer references than ``ids`` drops; nothing changes.
        """
        before = self._state.take(ids)
        left = before - 1
        # Whether a block is named twice: then what is written for it here does not come back.
        order = np.arange(len(ids), dtype=np.int32)
        self._state[ids] = order
        if (self._state.take(ids) == order).all() and left.min(initial=0) >= 0:
            self._state[ids] = left
            self._free(ids, left == 0, findable)
            return
        self._state[ids] = before
        held, drops = np.unique(ids, return_counts=True)
        if (self._state[held] < drops).any():
            wrong = int(held[self._state[held] < drops][0])
            raise InvalidTransition("freed more often than it is held", where=f"block {wrong}")
        np.subtract.at(self._state, ids, 1)
        freed = np.flatnonzero(self._state[ids] == 0)
        # A block named twice is freed once, where it is named last.
        _, last = np.unique(ids[freed][::-1], return_index=True)
        freed = freed[np.sort(len(freed) - 1 - last)]
        self._free(ids[freed], np.ones(len(freed), np.bool_), findable[freed])

    def _free(self, ids: Int32, free: Bool, findable: Bool) -> None:
        """Take those of blocks that are free into one order or the other: [N] each."""
        if findable.any():
            self._push_blank(ids[free & ~findable])
            self.cached.push(ids[free & findable])
        else:
            self._push_blank(ids[free])

    def forget(self, ids: Int32) -> None:
        """Turn those of ``ids`` that are cached into blank ones; held ones are left alone."""
        cached = ids[self.cached.holds(ids)]
        self.cached.remove(cached)
        self._push_blank(cached)

    def _push_blank(self, ids: Int32) -> None:
        self._blank[self._num_blank : self._num_blank + len(ids)] = ids
        self._num_blank += len(ids)

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold. O(blocks)."""
        blank, cached = self._blank[: self._num_blank], self.cached.all()
        self.cached.audit()
        free = np.concatenate([blank, cached])
        assert len(np.unique(free)) == len(free), "a block is free twice"
        assert (self._state[blank] <= 0).all(), "a free block is held"
        assert (self._state[blank] == 0).all(), "a blank block has a place among the cached"
        assert (self.num_held, len(cached)) == (
            int((self._state > 0).sum()),
            int((self._state < 0).sum()),
        ), "a block is neither held nor free"
