"""The block manager: who gets, shares, copies and gives back which block."""

import numpy as np
import pytest

from pagedkv import OutOfBlocks
from tests.core.fakes import admit_row as admit
from tests.core.fakes import batch_of, make_manager
from tests.core.fakes import bind_row as bind


def compute(manager, counts):
    """Grow rows by some tokens and count them as computed; return the copies."""
    copies = manager.grow(batch_of(manager, counts))
    manager.advance(batch_of(manager, counts))
    return copies.tolist()


def table_of(manager, row, g=0):
    return manager.table.block_table[g, row, : manager.table.num_blocks[g, row]].tolist()


def test_equal_prompts_computed_at_once_share_the_first_row_s_full_blocks():
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3])
    admit(manager, 1, [1, 2, 3])
    compute(manager, {0: 3, 1: 3})
    assert table_of(manager, 0)[0] == table_of(manager, 1)[0]
    assert table_of(manager, 0)[1] != table_of(manager, 1)[1]
    assert manager.pool.num_held == 3
    assert admit(manager, 2, [1, 2, 3]).tolist() == [[table_of(manager, 0)[0]]]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_block_gives_way_to_a_cached_one_of_the_same_content(num_groups):
    manager = make_manager(8 * num_groups, num_groups=num_groups)
    admit(manager, 0, [1, 2, 3])
    admit(manager, 1, [1, 2, 3])
    compute(manager, {0: 3})
    manager.release(np.array([0], np.int32))
    cached = manager.pool.num_cached
    compute(manager, {1: 3})
    assert (cached, manager.pool.num_cached) == (num_groups, 0)
    assert manager.pool.num_held == 2 * num_groups
    manager.audit()


def test_of_equal_blocks_the_first_row_s_wins_however_many_each_row_computes():
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3, 4, 5])
    admit(manager, 1, [1, 2, 3])
    compute(manager, {0: 4, 1: 3})
    assert admit(manager, 2, [1, 2, 3, 4, 6]).ravel().tolist() == table_of(manager, 0)


def test_a_block_that_is_not_computed_yet_is_not_found():
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3])
    manager.grow(batch_of(manager, {0: 3}))
    assert len(admit(manager, 1, [1, 2, 3])) == 0


@pytest.mark.parametrize("num_groups", [1, 3])
def test_another_salt_finds_nothing(num_groups):
    manager = make_manager(12, num_groups=num_groups)
    admit(manager, 0, [1, 2, 3], "a")
    compute(manager, {0: 3})
    assert len(admit(manager, 1, [1, 2, 3], "b")) == 0
    assert len(admit(manager, 2, [1, 2, 3], "")) == 0
    assert admit(manager, 3, [1, 2, 3], "a").shape == (1, num_groups)


def test_without_prefix_caching_nothing_is_found_and_freed_blocks_are_blank():
    manager = make_manager(8, enable_prefix_caching=False)
    admit(manager, 0, [1, 2, 3])
    compute(manager, {0: 3})
    assert len(admit(manager, 1, [1, 2, 3])) == 0
    manager.release(np.array([0, 1], np.int32))
    assert manager.pool.num_cached == 0


def test_a_chain_is_reclaimed_leaf_before_root_and_partial_blocks_before_all():
    manager = make_manager(4)
    admit(manager, 0, [1, 2, 3, 4, 5, 6, 7])
    compute(manager, {0: 7})
    root, middle, leaf, partial = table_of(manager, 0)
    manager.release(np.array([0], np.int32))
    assert manager.pool.num_cached == 3
    admit(manager, 1, [50] * 7)
    compute(manager, {1: 7})
    assert table_of(manager, 1) == [partial, leaf, middle, root]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_prefix_loses_its_tail_first_and_in_all_groups_at_once(num_groups):
    manager = make_manager(4 * num_groups, num_groups=num_groups)
    admit(manager, 0, [1, 2, 3, 4, 5, 6, 7])
    compute(manager, {0: 7})
    manager.release(np.array([0], np.int32))
    admit(manager, 1, [50, 51, 52])
    compute(manager, {1: 3})
    assert len(admit(manager, 2, [1, 2, 3, 4, 5, 6, 7])) == 2


@pytest.mark.parametrize("num_forks", [1, 2, 3])
def test_forks_that_write_at_once_copy_one_block_less_than_there_are_writers(num_forks):
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3, 4])
    compute(manager, {0: 3})
    shared = table_of(manager, 0)[-1]
    for child in range(1, num_forks + 1):
        manager.table.bind(bind(manager, child, [1, 2, 3, 4 + child]), child, [])
        manager.fork(0, np.array([child], np.int32))
        manager.table.start(child)
    copies = compute(manager, dict.fromkeys(range(num_forks + 1), 1))
    assert len(copies) == num_forks
    assert {source for source, _ in copies} == {shared}
    assert table_of(manager, num_forks)[-1] == shared, "the last writer keeps the block"
    assert len({table_of(manager, row)[-1] for row in range(num_forks + 1)}) == num_forks + 1
    assert len({table_of(manager, row)[0] for row in range(num_forks + 1)}) == 1


def test_a_fork_that_writes_alone_leaves_the_others_theirs():
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3, 4])
    compute(manager, {0: 3})
    manager.table.bind(bind(manager, 1, [1, 2, 3, 4]), 1, [])
    manager.fork(0, np.array([1], np.int32))
    manager.table.start(1)
    (copy,) = compute(manager, {0: 1})
    assert copy == [table_of(manager, 1)[-1], table_of(manager, 0)[-1]]
    assert compute(manager, {1: 1}) == []


def test_a_growth_too_large_changes_nothing():
    manager = make_manager(3)
    admit(manager, 0, [1] * 9)
    compute(manager, {0: 3})
    before = table_of(manager, 0), manager.pool.ref_count.tolist(), manager.pool.num_available
    with pytest.raises(OutOfBlocks):
        manager.grow(batch_of(manager, {0: 5}))
    assert before == (
        table_of(manager, 0),
        manager.pool.ref_count.tolist(),
        manager.pool.num_available,
    )


def test_a_reset_forgets_prefixes_and_leaves_holders_their_blocks():
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3, 4, 5, 6, 7])
    compute(manager, {0: 5})
    held = table_of(manager, 0)
    manager.reset_prefix_cache()
    assert table_of(manager, 0) == held
    assert len(admit(manager, 1, [1, 2, 3])) == 0
    manager.release(np.array([0], np.int32))
    assert manager.pool.num_cached == 0


def test_a_holder_does_not_bring_back_what_a_reset_forgot():
    manager = make_manager(8)
    admit(manager, 0, [1, 2, 3, 4, 5, 6, 7])
    compute(manager, {0: 5})
    manager.reset_prefix_cache()
    compute(manager, {0: 2})
    assert len(admit(manager, 1, [1, 2, 3])) == 0


def corrupt_table(manager):
    manager.table.block_table[0, 0, 0] = 7


def corrupt_reference(manager):
    manager.pool._state[manager.table.block_table[0, 0, 0]] += 1


def corrupt_resident(manager):
    manager.table.num_computed[0] = manager.table.num_resident[0, 0] = 40
    manager.table.num_known[0] = 40


def corrupt_stale_index(manager):
    manager.index.remove(np.array([0], np.int32))


def corrupt_cached_but_lost(manager):
    manager.pool.forget(np.arange(8, dtype=np.int32))


def corrupt_row(manager):
    manager.table.seq_id[0] = -1


def corrupt_running(manager):
    manager.table.start(0)


def corrupt_progress(manager):
    manager.table.num_known[0] = 2


def corrupt_residence(manager):
    manager.table.num_computed[0] = 2


def corrupt_free_row(manager):
    manager.table.num_blocks[0, 3] = 1


@pytest.mark.parametrize(
    ("corrupt", "finding"),
    [
        (corrupt_table, "not its tables' sum"),
        (corrupt_reference, "not its tables' sum"),
        (corrupt_resident, "outside any block"),
        (corrupt_stale_index, "cached and findable disagree"),
        (corrupt_cached_but_lost, "cached and findable disagree"),
        (corrupt_row, "a free row runs"),
        (corrupt_running, "a row runs twice"),
        (corrupt_progress, "computed unknown tokens"),
        (corrupt_residence, "resident uncomputed"),
        (corrupt_free_row, "a free row holds blocks"),
    ],
)
def test_the_audit_finds(auditor, corrupt, finding):
    manager = make_manager(8)
    admit(manager, 1, [1, 2, 3])
    compute(manager, {1: 3})
    manager.release(np.array([1], np.int32))
    admit(manager, 0, [5, 6, 7])
    compute(manager, {0: 3})
    manager.audit()
    corrupt(manager)
    with pytest.raises(AssertionError, match=finding):
        manager.audit()
    auditor.excuse(manager, manager.pool, manager.table, manager.index)
