"""Which cached block to reuse first: an order is a level per block, and lines of equal level.

Blocks of the lowest level go first; within a level the one that became free first. A sequence's
blocks become free tail first and a block's level is never below that of a block behind it, so
every order but ``fifo`` reclaims a chain from its leaf: what stays cached can be found from its
root. ``fifo`` is the textbook's: with that rule, a prompt that goes on from an old block would
renew it, and the order would be ``lru`` in all but name.
"""

import heapq
from collections.abc import Callable

import numpy as np

from pagedkv.core.arrays import Bool, Int32

__all__ = ["HIT_LEVEL", "PROTECTED_SHARE", "CachedOrder"]

PROTECTED_SHARE = 0.8
"""``slru``: the most of the pool that blocks hit before may hold against new ones."""

FIRST_LENGTH = 64
SLACK = 1.5
"""How much longer a line is made than what it has to hold, so that a third of it may die."""

LARGEST_LEVEL = 2**31 - 1

HIT_LEVEL: dict[str, Callable[[Int32, int], Int32]] = {
    # Least recently used: by the time it became free, nothing else.
    "lru": lambda level, priority: level,
    # First in, first out: the level is when it first became free; a hit does not renew it.
    "fifo": lambda level, priority: level,
    # Least frequently used: counts hits.
    "lfu": lambda level, priority: level + np.int32(1),
    # Segmented LRU (Karedla et al. 1994): hit once, it goes after all that never were.
    "slru": lambda level, priority: np.full_like(level, 1),
    # The most urgent request that has used it; a lower number is more urgent.
    "priority": lambda level, priority: np.maximum(level, np.int32(-priority)),
}
"""Per order, the level of blocks after a request of some priority has found them."""


class _Line:
    """Block ids in the order they became free; an entry may be dead (its place is elsewhere)."""

    __slots__ = ("count", "head", "ids", "tail")

    def __init__(self) -> None:
        self.ids: Int32 = np.zeros(FIRST_LENGTH, np.int32)
        self.head = 0
        self.tail = 0
        self.count = 0


class CachedOrder:
    """The free blocks whose content can still be found, in the order they will be reclaimed.

    Lines delete lazily: an entry counts only while its block's place still points at it, so taking
    a block out of the middle is one write. A line that is full moves its live entries to the front,
    of a longer one if most are live: amortised constant cost per block, whatever the size of the
    pool.

    Args:
        state: [num_blocks] The pool's column. Of a block in the order, this keeps -1 - its place in
            its line there, and 0 once it leaves.
        order: A name of `HIT_LEVEL`.
    """

    def __init__(self, state: Int32, order: str = "lru") -> None:
        self.order = order
        self._foresee: Callable[[Int32], Int32] | None = None
        self._state = state
        self._level: Int32 = np.zeros(len(state), np.int32)
        self._lines: dict[int, _Line] = {}
        self._heap: list[int] = []  # levels that have a line, each once
        self._count = 0
        self._era = 0
        self._most_protected = int(PROTECTED_SHARE * len(state))

    def foresee(self, order: str, level: Callable[[Int32], Int32]) -> None:
        """Let somebody who knows the future say the level of blocks as they become free.

        For studies. Call it before any block is in the order.

        Args:
            order: What to call that.
            level: From block ids, [N], to their levels, whatever happened to them before.
        """
        self.order, self._foresee = order, level

    def __len__(self) -> int:
        return self._count

    def holds(self, ids: Int32) -> Bool:
        """Return for each block whether it is in the order."""
        held: Bool = self._state[ids] < 0
        return held

    # What blocks are worth, while they are held

    def reset(self, ids: Int32) -> None:
        """Blocks lose their content, and with it what it was worth."""
        if self.order != "lru":
            self._level[ids] = 0

    def stored(self, ids: Int32, priority: Int32 | int) -> None:
        """Blocks became findable, computed by a request of this priority, or one each."""
        if self.order == "priority":
            self._level[ids] = -priority

    def hit(self, ids: Int32, priority: int) -> None:
        """Blocks that are not in the order were found by a request of this priority."""
        if self.order not in ("lru", "fifo") and self._foresee is None:
            self._level[ids] = HIT_LEVEL[self.order](self._level[ids], priority)

    # The order

    def push(self, ids: Int32) -> None:
        """Append blocks that just became free, of each sequence the tail first."""
        if not len(ids):
            return
        self._count += len(ids)
        if self.order == "lru":
            self._append(0, ids)
            return
        if self._foresee is not None:
            self._level[ids] = self._foresee(ids)
        if self.order == "fifo":
            self._era += 1
            fresh = ids[self._level[ids] == 0]
            self._level[fresh] = self._era
        levels = self._level[ids]
        if self.order != "fifo":  # a parent stays at least as long as its child
            levels = np.maximum.accumulate(levels)
        self._level[ids] = levels
        for level in np.unique(levels).tolist():
            self._append(level, ids[levels == level])
        if self.order == "slru":
            self._demote()

    def _append(self, level: int, ids: Int32) -> None:
        line = self._lines.get(level)
        if line is None:
            line = self._lines[level] = _Line()
            heapq.heappush(self._heap, level)
        if line.tail + len(ids) > len(line.ids):
            self._make_room(level, line, len(ids))
        end = line.tail + len(ids)
        line.ids[line.tail : end] = ids
        self._state[ids] = _places(line.tail, end)
        line.tail = end
        line.count += len(ids)

    def _make_room(self, level: int, line: _Line, more: int) -> None:
        live = self._live(level, line, line.head, line.tail)
        room = SLACK * (len(live) + more)
        if room > len(line.ids):
            line.ids = np.zeros(int(room), np.int32)
        line.ids[: len(live)] = live
        self._state[live] = _places(0, len(live))
        line.head, line.tail = 0, len(live)

    def _live(self, level: int, line: _Line, start: int, end: int) -> Int32:
        window = line.ids[start:end]
        return window[self._is_live(level, window, start)]

    def _is_live(self, level: int, ids: Int32, start: int) -> Bool:
        """Return which of the blocks that a line has from a place on are still there."""
        live: Bool = self._state.take(ids) == _places(start, start + len(ids))
        if self.order != "lru":
            live &= self._level.take(ids) == level
        return live

    def _demote(self) -> None:
        """Send the longest free of too many protected blocks back to the unprotected ones."""
        excess = self._lines[1].count - self._most_protected if 1 in self._lines else 0
        if excess > 0:
            ids = self._take(1, excess)
            self._level[ids] = 0
            self._append(0, ids)

    def remove(self, ids: Int32) -> None:
        """Take blocks out of the order; each is in it, and named once."""
        if not len(ids):
            return
        self._state[ids] = 0
        self._count -= len(ids)
        levels, counts = np.unique(self._level[ids], return_counts=True)
        for level, count in zip(levels.tolist(), counts.tolist(), strict=True):
            self._lines[level].count -= count

    def pop(self, count: int) -> Int32:
        """Take the next ``count`` blocks: [count]; there must be as many."""
        taken: list[Int32] = []
        missing = count
        while missing:
            level = self._heap[0]
            line = self._lines[level]
            if line.count:
                taken.append(self._take(level, min(missing, line.count)))
                missing -= len(taken[-1])
            if not line.count and self.order != "lru":
                heapq.heappop(self._heap)
                del self._lines[level]
        ids = np.concatenate(taken) if len(taken) > 1 else taken[0]
        self._state[ids] = 0
        self._count -= count
        return ids

    def num_before(self, ids: Int32) -> int:
        """Return how many go before the first of these that is in the order; all, if none is.

        Only ``lru`` has a single line to look at. O(those that go before).
        """
        places = -1 - self._state.take(ids)
        places = places[places >= 0]
        if not len(places):
            return self._count
        line = self._lines[0]
        return len(self._live(0, line, line.head, int(places.min())))

    @property
    def next_level(self) -> int | None:
        """The level of the block that would go next; None of an empty order."""
        self._drop_empty()
        return self._heap[0] if self._count else None

    def _drop_empty(self) -> None:
        """Take lines that are used up from the front of the order."""
        while self._heap and not self._lines[self._heap[0]].count:
            del self._lines[heapq.heappop(self._heap)]

    def _take(self, level: int, count: int) -> Int32:
        """Take the first ``count`` live entries of a line, which has as many."""
        line = self._lines[level]
        line.count -= count
        taken: list[Int32] = []
        reach = max(count, FIRST_LENGTH)
        while count:
            end = min(line.head + reach, line.tail)
            reach *= 2  # a long dead stretch is crossed in few strides
            window = line.ids[line.head : end]
            live = self._is_live(level, window, line.head).nonzero()[0][:count]
            taken.append(window[live])
            count -= len(live)
            line.head = end if count else line.head + int(live[-1]) + 1
        return np.concatenate(taken) if len(taken) > 1 else taken[0]

    def all(self) -> Int32:
        """Return every block in the order, the next to go first. O(blocks)."""
        live = [
            self._live(level, self._lines[level], self._lines[level].head, self._lines[level].tail)
            for level in sorted(self._lines)
        ]
        return np.concatenate([np.empty(0, np.int32), *live])

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold. O(blocks)."""
        assert sorted(self._heap) == sorted(self._lines), "a level has no line"
        for level, line in self._lines.items():
            live = self._live(level, line, line.head, line.tail)
            assert len(live) == line.count, "cached blocks are miscounted"
        assert sum(line.count for line in self._lines.values()) == self._count, (
            "cached blocks are miscounted"
        )
        assert (self._state < 0).sum() == self._count, "a place points outside the queue"


def _places(start: int, end: int) -> Int32:
    """Return what the state of the blocks at these places of a line is."""
    return np.arange(-1 - start, -1 - end, -1, dtype=np.int32)
