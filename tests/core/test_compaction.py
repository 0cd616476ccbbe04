"""Tokens go, blocks stay full: where survivors land, what is copied, and who is spared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.core.compaction import repack
from pagedkv.eviction import policy
from tests.core.test_retention import (
    SIZE,
    Run,
    alone,
    assert_same,
    kept_by,
    make_config,
    make_request,
)

AGE = policy("budget=18 + unit=token + chunk=8")
H2O = policy("recent=0.5 + score=sum + budget=19 + gqa=sum + unit=token + chunk=8")
TOVA = policy("score=last + budget=12 + unit=token + chunk=8")
WHOLE = policy("sinks=4 + budget=16 + unit=token + chunk=8")


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_survivors_keep_their_order_in_the_fewest_blocks(tables, size):
    width = -(-max(map(len, tables)) // size)
    keep = np.zeros((len(tables), width * size), np.bool_)
    for row, wanted in enumerate(tables):
        keep[row, : len(wanted)] = wanted
    keep[:, -1] = True  # where nothing is resident, it counts for nothing
    resident = np.array([len(wanted) for wanted in tables])
    packed = repack(keep, resident, size)
    for row, wanted in enumerate(tables):
        wanted = [bool(keep[row, i]) for i in range(len(wanted))]
        survivors = [i for i, stays in enumerate(wanted) if stays]
        landed = {}
        for new, old in enumerate(packed.entry[row].tolist()):
            if old >= 0:
                first = old * size
                assert all(wanted[first : first + size]), "a block with a hole was taken over"
                for offset in range(len(wanted[first : first + size])):
                    landed[new * size + offset] = first + offset
        mine = packed.table == row
        for source, target in zip(packed.source[mine], packed.target[mine], strict=True):
            assert packed.fresh[row, target // size], "a survivor lands in a block that lives on"
            assert landed.setdefault(int(target), int(source)) == source
        assert landed == dict(enumerate(survivors))
        assert packed.num_blocks[row] == -(-len(survivors) // size)
        assert packed.fresh[row].sum() + (packed.entry[row] >= 0).sum() == packed.num_blocks[row]


def test_whole_blocks_that_go_move_nothing():
    """By token, too, as long as what goes is whole blocks."""
    for chosen in (WHOLE, policy(WHOLE, unit="block", positions="original")):
        run = alone(make_request(1, 40, chosen, max_tokens=30))
        assert run.finished["1", 0].num_evicted_tokens > 40
        assert run.scheduler.stats().tokens_moved == 0
    # Two sinks hold the window off the boundaries, so every token behind them moves.
    run = alone(make_request(1, 40, policy(WHOLE, sinks=2), max_tokens=30))
    assert run.scheduler.stats().tokens_moved == sum(len(plan.moves) for plan in run.plans) > 0


@pytest.mark.parametrize("chosen", [AGE, H2O])
def test_a_table_holds_its_budget_in_whole_blocks_and_one(chosen):
    run = Run(make_config(), [])
    run.add(make_request(1, 40, chosen, max_tokens=60))
    most = -(-chosen.tokens // SIZE) + 1
    while run.scheduler.has_unfinished():
        run.step()
        table = run.scheduler.table
        for row in table.running.tolist():
            if table.num_computed[row] > 40:
                assert table.num_blocks[0, row] <= most
                assert table.num_blocks[0, row] == -(-table.num_resident[0, row] // SIZE)


def shared_pool(chosen):
    """A prompt in the cache, one who holds its blocks, and one who starts from them and evicts."""
    run = Run(make_config(64, caching=True), [])
    run.add(make_request(9, 25, "full", shared=24, max_tokens=1))
    run.step()
    run.add(make_request(1, 30, "full", shared=24, max_tokens=30))
    run.add(make_request(2, 34, chosen, shared=24, max_tokens=30))
    return run


def test_what_others_hold_or_may_find_is_never_written():
    run = shared_pool(policy("sinks=2 + budget=24 + unit=token + chunk=8"))
    run.step()
    pool, index = run.scheduler.manager.pool, run.scheduler.manager.index
    for _ in range(25):
        plan = run.scheduler.schedule()
        targets = np.unique(plan.moves[:, 1] // SIZE)
        assert (pool.ref_count[targets] <= 1).all(), "a move writes into a shared block"
        assert not index.findable(targets).any(), "a move writes into a findable block"
        run.end(run.scheduler.commit(plan, run.device.execute(plan)).finished)
        run.plans.append(plan)
    assert sum(len(plan.moves) for plan in run.plans) > 0
    # Who begins alike later still finds what the evictor and the other began with.
    run.add(make_request(3, 30, "full", shared=24, max_tokens=4))
    while run.scheduler.has_unfinished():
        run.step()
    assert run.finished["3", 0].num_cached_tokens == 24
    for name, length, chosen in (("1", 30, "full"), ("3", 30, "full")):
        most = 30 if name == "1" else 4
        assert_same(run, make_request(int(name), length, chosen, shared=24, max_tokens=most))


def forked(num_blocks):
    """Siblings that share a long prompt when their first round comes."""
    chosen = policy("score=random + budget=32 + unit=token + chunk=32")
    request = make_request(1, 31, chosen, n=3, max_tokens=20)
    return request, Run(make_config(num_blocks, max_num_seqs=3), [request])


def test_siblings_part_when_their_tokens_go():
    request, run = forked(64)
    assert run.scheduler.stats().num_preemptions == 0
    assert len({tuple(end.token_ids) for end in run.finished.values()}) == 3
    for index in range(3):
        assert run.finished["1", index].num_evicted_tokens > 0
    assert_same(run, request)


def test_where_blocks_lack_a_row_waits_and_comes_back_to_the_same():
    """Shared blocks cannot be packed in place: whoever finds no fresh ones is preempted."""
    request, run = forked(22)
    assert run.scheduler.stats().num_preemptions > 0
    assert_same(run, request)


def test_rows_that_cannot_be_packed_are_named_and_keep_their_blocks():
    run = Run(make_config(22, max_num_seqs=3), [])
    stuck, evict = [], run.scheduler.retention.evict
    run.scheduler.retention.evict = lambda *step: stuck.append(evict(*step)) or stuck[-1]
    run.add(forked(22)[0])
    while run.scheduler.has_unfinished() and not any(map(len, stuck)):
        run.step()
    assert sum(map(len, stuck)) > 0, "the pool was never short"
    assert not np.isin(stuck[-1], run.scheduler.table.running).any()


class Fails(Exception):
    pass


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_discarded_plan_loses_no_moves(carried_out):
    """Whether or not the device got to them; and those of rows without tokens in the plan."""
    # One that decodes keeps the second from whole chunks, so that it leaves tokens to the third
    # in one step and none in the next.
    requests = [
        make_request(1, 4, H2O, max_tokens=60),
        make_request(2, 60, AGE, max_tokens=8),
        make_request(3, 40, policy(TOVA, budget=7), max_tokens=8),
    ]
    run = Run(make_config(max_num_batched_tokens=8), [])
    for request in requests:
        run.add(request)
    table, manager, idle, discarded = run.scheduler.table, run.scheduler.manager, 0, 0
    while run.scheduler.has_unfinished():
        plan = run.scheduler.schedule()
        moved = table.running[manager.holders(plan.moves[:, 1] // SIZE)]
        idles = not np.isin(moved, plan.rows).all()
        if len(moved) and discarded < 12 and (idles or len(run.plans) % 3 == 0):
            idle, discarded = idle + idles, discarded + 1
            if carried_out:
                run.device.execute(plan)
            run.scheduler.discard(plan)
            run.scheduler.audit()
        else:
            run.end(run.scheduler.commit(plan, run.device.execute(plan)).finished)
        run.plans.append(plan)
    assert idle > 0, "no row had moves and no tokens"
    assert discarded > idle
    for request in requests:
        assert_same(run, request)


def test_ends_between_a_round_and_its_moves_disturb_nobody():
    """A row that is aborted, or a leader whose siblings go on with what was to move."""
    run = Run(make_config(40, max_num_batched_tokens=64), [])
    requests = [make_request(i, 31 + i, H2O, n=1 + i % 2, max_tokens=40) for i in range(4)]
    for request in requests:
        run.add(request)
    aborted = 0
    while run.scheduler.has_unfinished():
        run.step()
        pending = sum(len(moves) for moves in run.scheduler.manager._moves)
        if pending and aborted < 2 and len(run.plans) > 8:
            run.end(run.scheduler.abort(str(aborted)))
            aborted += 1
    assert aborted == 2
    for request in requests:
        assert_same(run, request)


def test_a_plan_without_tokens_leaves_the_moves_for_the_next():
    run = Run(make_config(), [])
    run.add(make_request(1, 40, H2O, max_tokens=30))
    while not run.scheduler.manager._moves:
        run.step()
    waiting = run.scheduler.manager._moves[0]
    run.end(run.scheduler.abort("1"))
    empty = run.scheduler.schedule()
    assert (len(empty.moves), empty.num_tokens) == (0, 0)
    run.scheduler.commit(empty, run.device.execute(empty))
    run.add(make_request(2, 9, "full"))
    assert np.array_equal(run.scheduler.schedule().moves, waiting)


def test_columns_of_tokens_take_no_memory_until_somebody_ranks_tokens():
    run = alone(make_request(1, 40, "h2o + budget=16 + chunk=8"))
    assert run.scheduler.table.tokens.width == 0
    run = alone(make_request(1, 40, H2O))
    assert run.scheduler.table.tokens.width >= 19 + 8


def test_a_policys_place_is_given_away_when_nobody_has_it():
    run = Run(make_config(), [])
    for i in range(12):
        run.add(make_request(i, 20, f"recent=4 + score=sum + budget={8 + i} + chunk=8"))
        while run.scheduler.has_unfinished():
            run.step()
    assert len(run.scheduler.retention._policies) == 1
    assert kept_by(run.scheduler.table, 0) == [[]]


def test_windows_slide_beside_tables_that_are_longer():
    model = {"sliding_window": (8, 0)}
    requests = [
        make_request(1, 20, H2O, max_tokens=20),
        make_request(2, 58, "full", max_tokens=20),  # both windows slide in the same steps
    ]
    run = Run(make_config(granularity="layer", model=model), requests)
    assert run.finished["1", 0].num_evicted_tokens > 0
    for request in requests:
        assert_same(run, request, "layer", model=model)
