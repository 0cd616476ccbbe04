"""The block pool against a pool made of lists."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv import InvalidTransition, OutOfBlocks
from pagedkv.core.pool import BlockPool
from pagedkv.core.reclaim import HIT_LEVEL


def ids(*numbers):
    return np.array(numbers, np.int32)


def keep(*flags):
    return np.array(flags, np.bool_)


class PoolTwins(RuleBasedStateMachine):
    """A `BlockPool` and a naive model do the same; ids, counts and order must agree."""

    @initialize(num_blocks=st.integers(1, 9), order=st.sampled_from(sorted(HIT_LEVEL)))
    def make(self, num_blocks, order):
        self.order = order
        self.pool = BlockPool(num_blocks, order)
        self.level = Counter()
        self.era = 0
        self.blank = list(range(num_blocks))[::-1]
        self.cached = []
        self.refs = Counter()

    @property
    def available(self):
        return len(self.blank) + len(self.cached)

    def take(self, count):
        taken = [self.blank.pop() if self.blank else self.reclaim() for _ in range(count)]
        self.refs.update(taken)
        for block in taken:
            self.level[block] = 0
        return taken

    def reclaim(self):
        block = min(self.cached, key=lambda b: (self.level[b], self.cached.index(b)))
        self.cached.remove(block)
        return block

    def free(self, freed):
        """Cache blocks of one chain, its tail first."""
        self.era += bool(freed)
        least = -(2**31)
        for block in freed:
            if self.order == "fifo":
                self.level[block] = self.level[block] or self.era
            if self.order != "fifo":
                least = self.level[block] = max(least, self.level[block])
            self.cached.append(block)
        protected = [b for b in self.cached if self.level[b] == 1]
        while self.order == "slru" and len(protected) > int(0.8 * self.pool.num_blocks):
            block = protected.pop(0)
            self.level[block] = 0
            self.cached.remove(block)
            self.cached.append(block)

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), priority=st.integers(-2, 2), first=st.booleans())
    def use(self, data, priority, first):
        """A request finds held blocks, or has just computed them."""
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.refs)), unique=True))
        (self.pool.cached.stored if first else self.pool.cached.hit)(ids(*chosen), priority)
        for block in chosen:
            if self.order == "priority":
                self.level[block] = -priority if first else max(self.level[block], -priority)
            elif self.order == "lfu" and not first:
                self.level[block] += 1
            elif self.order == "slru" and not first:
                self.level[block] = 1

    @rule(count=st.integers(0, 10))
    def allocate(self, count):
        if count > self.available:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
        else:
            assert self.pool.allocate(count).tolist() == self.take(count)

    @precondition(lambda self: self.refs or self.cached)
    @rule(data=st.data())
    def share(self, data):
        pick = st.sampled_from(sorted(self.refs) + self.cached)
        chosen = data.draw(st.lists(pick, max_size=6))
        self.pool.share(ids(*chosen))
        self.refs.update(chosen)
        self.cached = [block for block in self.cached if block not in chosen]

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), excess=st.booleans())
    def release(self, data, excess):
        chosen = data.draw(st.permutations(sorted(self.refs.elements())))
        chosen = chosen[: data.draw(st.integers(0, len(chosen)))]
        if excess:
            chosen += [max(self.refs)] * (self.refs[max(self.refs)] + 1)
            with pytest.raises(InvalidTransition, match=f"block {max(self.refs)}"):
                self.pool.release(ids(*chosen), keep(*[True] * len(chosen)))
            return
        findable = {b: data.draw(st.booleans()) for b in sorted(set(chosen))}
        self.pool.release(ids(*chosen), keep(*[findable[b] for b in chosen]))
        freed = []
        for i, block in enumerate(chosen):
            self.refs[block] -= 1
            if not self.refs[block] and block not in chosen[i + 1 :]:
                (freed if findable[block] else self.blank).append(block)
        self.free(freed)
        self.refs = +self.refs

    @rule(data=st.data())
    def forget(self, data):
        chosen = data.draw(st.permutations(range(self.pool.num_blocks)))
        chosen = chosen[: data.draw(st.integers(0, len(chosen)))]
        self.pool.forget(ids(*chosen))
        for block in chosen:
            if block in self.cached:
                self.cached.remove(block)
                self.blank.append(block)

    @invariant()
    def agree(self):
        counts = [self.refs[block] for block in range(self.pool.num_blocks)]
        assert self.pool.ref_count.tolist() == counts
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_available == self.available
        assert self.pool.num_held == len(self.refs)
        self.pool.audit()

    def teardown(self):
        if hasattr(self, "pool"):  # the whole order of reuse, to its end
            count = self.available
            assert self.pool.allocate(count).tolist() == self.take(count)


TestPoolTwins = PoolTwins.TestCase
TestPoolTwins.settings = settings(max_examples=80)


def test_blank_blocks_come_back_last_freed_first():
    pool = BlockPool(4)
    held = pool.allocate(4)
    assert held.tolist() == [0, 1, 2, 3]
    pool.release(ids(2, 0, 3), keep(False, False, False))
    assert pool.allocate(3).tolist() == [3, 0, 2]


def test_cached_blocks_come_back_first_freed_first_and_after_the_blank_ones():
    pool = BlockPool(4)
    pool.allocate(4)
    pool.release(ids(2, 0, 3, 1), keep(True, True, False, False))
    assert pool.allocate(4).tolist() == [1, 3, 2, 0]


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    pool.allocate(1)
    pool.share(ids(0))
    pool.release(ids(0), keep(True))
    assert (pool.num_held, pool.num_cached) == (1, 0)
    pool.release(ids(0), keep(True))
    assert (pool.num_held, pool.num_cached) == (0, 1)


def test_a_cached_block_that_is_shared_again_leaves_the_order_of_reuse():
    pool = BlockPool(3)
    pool.release(pool.allocate(3), keep(True, True, True))
    pool.share(ids(1))
    assert pool.allocate(2).tolist() == [0, 2]


def test_a_block_revived_and_freed_again_is_reused_last():
    pool = BlockPool(3)
    pool.release(pool.allocate(3), keep(True, True, True))
    pool.share(ids(0))
    pool.release(ids(0), keep(True))
    assert pool.allocate(3).tolist() == [1, 2, 0]


def test_an_allocation_too_large_takes_nothing():
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 2 of 3 available"):
        pool.allocate(3)
    assert pool.ref_count.tolist() == [1, 0, 0]
    assert pool.allocate(2).tolist() == [1, 2]


def test_a_double_free_is_refused_and_frees_nothing():
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(InvalidTransition, match="block 1"):
        pool.release(ids(0, 1, 1), keep(False, False, False))
    assert pool.ref_count.tolist() == [1, 1, 0]
    with pytest.raises(InvalidTransition, match="block 2"):
        pool.release(ids(2), keep(False))
    pool.audit()


def test_only_a_block_that_is_held_or_cached_can_be_shared():
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(InvalidTransition, match="block 2"):
        pool.share(ids(0, 2))
    assert pool.ref_count.tolist() == [1, 0, 0]
    pool.audit()


@pytest.mark.parametrize("rounds", [1, 7, 100])
def test_the_order_survives_any_number_of_turns_through_the_queue(rounds):
    """The queue holds twice the pool: this wraps it, with dead entries in between."""
    pool = BlockPool(5)
    held = pool.allocate(5)
    for _ in range(rounds):
        pool.release(held[::-1], keep(*[True] * 5))
        pool.share(held[1:3])
        pool.release(held[1:3], keep(True, True))
        held = pool.allocate(5)
    pool.release(held, keep(*[True] * 5))
    assert pool.allocate(5).tolist() == held.tolist()


ORDERS = {  # three chains of two, the second hit once, the third by an urgent request
    "lru": [0, 1, 4, 5, 2, 3],
    "fifo": [0, 1, 2, 3, 4, 5],
    "lfu": [0, 1, 4, 5, 2, 3],
    "slru": [0, 1, 4, 5, 2, 3],
    "priority": [0, 1, 2, 3, 4, 5],
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_reclaim(order):
    pool = BlockPool(6, order)
    pool.allocate(6)
    for chain, priority in ((ids(0, 1), 0), (ids(2, 3), 0), (ids(4, 5), -1)):
        pool.cached.stored(chain, priority)
        pool.release(chain, keep(True, True))
    pool.share(ids(2, 3))
    pool.cached.hit(ids(2, 3), 0)
    pool.release(ids(2, 3), keep(True, True))
    assert pool.allocate(6).tolist() == ORDERS[order]


@pytest.mark.parametrize("order", sorted(HIT_LEVEL))
def test_every_order_takes_a_chain_from_its_leaf(order):
    """The leaf was found more often, by someone more urgent, and freed in another order."""
    pool = BlockPool(4, order)
    pool.allocate(4)
    pool.cached.stored(ids(0, 1, 2), 3)
    pool.cached.hit(ids(2), -3)
    pool.release(ids(2, 1, 0), keep(True, True, True))
    pool.allocate(0)
    assert pool.allocate(3).tolist() == [2, 1, 0]


def corrupt_double_free(pool):
    pool._blank[pool._num_blank] = pool._blank[0]
    pool._num_blank += 1


def corrupt_lost_block(pool):
    pool._num_blank -= 1


def corrupt_held_and_free(pool):
    pool._state[int(pool._blank[0])] = 1


def corrupt_blank(pool):
    pool._state[int(pool._blank[0])] = -1


def corrupt_cached_count(pool):
    pool.cached._count += 1


def corrupt_queue(pool):
    line = pool.cached._lines[0]
    line.ids[line.head] = line.ids[line.head + 1]


def corrupt_place(pool):
    pool._state[0] = -2 * pool.num_blocks


@pytest.mark.parametrize(
    ("corrupt", "finding"),
    [
        (corrupt_double_free, "a block is free twice"),
        (corrupt_lost_block, "neither held nor free"),
        (corrupt_held_and_free, "a free block is held"),
        (corrupt_blank, "points outside the queue"),
        (corrupt_cached_count, "miscounted"),
        (corrupt_queue, "miscounted"),
        (corrupt_place, "points outside the queue"),
    ],
)
def test_the_audit_finds(auditor, corrupt, finding):
    pool = BlockPool(6)
    held = pool.allocate(4)
    pool.release(held[2:], keep(True, True))
    pool.audit()
    corrupt(pool)
    with pytest.raises(AssertionError, match=finding):
        pool.audit()
    with pytest.raises(AssertionError, match=finding):
        auditor.audit()
    auditor.excuse(pool, pool.cached)
