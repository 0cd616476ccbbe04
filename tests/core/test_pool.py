"""The block pool against a pool made of lists."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv import InvalidTransition, OutOfBlocks
from pagedkv.core.pool import BlockPool


def ids(*numbers):
    return np.array(numbers, np.int32)


def keep(*flags):
    return np.array(flags, np.bool_)


class PoolTwins(RuleBasedStateMachine):
    """A `BlockPool` and a naive model do the same; ids, counts and order must agree."""

    @initialize(num_blocks=st.integers(1, 9))
    def make(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.blank = list(range(num_blocks))[::-1]
        self.cached = []
        self.refs = Counter()

    @property
    def available(self):
        return len(self.blank) + len(self.cached)

    def take(self, count):
        taken = [self.blank.pop() if self.blank else self.cached.pop(0) for _ in range(count)]
        self.refs.update(taken)
        return taken

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
        for i, block in enumerate(chosen):
            self.refs[block] -= 1
            if not self.refs[block] and block not in chosen[i + 1 :]:
                (self.cached if findable[block] else self.blank).append(block)
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
TestPoolTwins.settings = settings(max_examples=40)


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


def corrupt_double_free(pool):
    pool._blank[pool._num_blank] = pool._blank[0]
    pool._num_blank += 1


def corrupt_lost_block(pool):
    pool._num_blank -= 1


def corrupt_held_and_free(pool):
    pool.ref_count[int(pool._blank[0])] = 1


def corrupt_negative_count(pool):
    pool.ref_count[0] = -1


def corrupt_cached_count(pool):
    pool._num_cached += 1


def corrupt_queue(pool):
    pool._queue[pool._head] = pool._queue[pool._head + 1]


def corrupt_place(pool):
    pool._place[0] = 2 * pool.num_blocks - 1


@pytest.mark.parametrize(
    ("corrupt", "finding"),
    [
        (corrupt_double_free, "a block is free twice"),
        (corrupt_lost_block, "neither held nor free"),
        (corrupt_held_and_free, "a free block is held"),
        (corrupt_negative_count, "negative"),
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
    auditor.excuse(pool)
