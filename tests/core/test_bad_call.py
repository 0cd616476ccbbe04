"""Calls out of turn and results of the wrong shape are refused and change nothing."""

import pickle

import msgspec
import numpy as np
import pytest

from pagedkv import ConfigError, InvalidTransition, Scheduler, StepResult
from pagedkv.core.plan import Observed
from tests.core.answers import answer
from tests.core.fakes import VOCAB, Driver, alone, make_config, make_manager, make_request
from tests.core.refusals import snapshot, unharmed


def test_only_one_plan_is_out_at_a_time(busy):
    plan = busy.scheduler.schedule()
    before = snapshot(busy)
    with pytest.raises(InvalidTransition, match=r"plan 2 is outstanding; commit it first"):
        busy.scheduler.schedule()
    assert snapshot(busy) == before
    busy.scheduler.commit(plan, busy.executor.execute(plan))


def test_a_plan_is_committed_once(busy):
    plan = busy.scheduler.schedule()
    result = busy.executor.execute(plan)
    busy.scheduler.commit(plan, result)
    before = snapshot(busy)
    with pytest.raises(InvalidTransition, match="plan 2 is not the outstanding plan"):
        busy.scheduler.commit(plan, result)
    assert snapshot(busy) == before


def test_a_stale_or_foreign_plan_is_refused(busy):
    other = Driver(make_config())
    other.add(make_request("runs", 9))
    foreign, stale = other.scheduler.schedule(), busy.plans[-1]
    plan = busy.scheduler.schedule()
    result = busy.executor.execute(plan)
    before = snapshot(busy)
    for wrong in (foreign, stale, None):
        with pytest.raises(InvalidTransition, match="not the outstanding plan"):
            busy.scheduler.commit(wrong, result)
    assert snapshot(busy) == before
    busy.scheduler.commit(plan, result)


WRONG_RESULTS = {
    "too few": lambda ids: ids[:-1],
    "too many": lambda ids: np.append(ids, ids),
    "floats": lambda ids: ids.astype(np.float32),
    "nan": lambda ids: np.full(len(ids), np.nan),
    "two dimensions": lambda ids: ids[:, None],
    "no dimension": lambda ids: ids[0],
    "bools": lambda ids: ids > 0,
    "strings": lambda ids: ids.astype(str),
    "none": lambda ids: None,
}


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_a_result_of_another_shape_or_kind_is_refused_and_the_right_one_still_taken(busy, name):
    plan = busy.scheduler.schedule()
    right = busy.executor.execute(plan).token_ids
    before = snapshot(busy)
    with pytest.raises(InvalidTransition, match="token_ids"):
        busy.scheduler.commit(plan, StepResult(token_ids=WRONG_RESULTS[name](right)))
    assert snapshot(busy) == before
    busy.scheduler.commit(plan, StepResult(token_ids=right.tolist()))


WRONG_OBSERVATIONS = {
    "none": lambda seen: [],
    "one more": lambda seen: [seen, seen],
    "too narrow": lambda seen: [Observed(values=seen.values[:, :, :1], mass=seen.mass)],
    "mass too narrow": lambda seen: [Observed(values=seen.values, mass=seen.mass[:, :, :1])],
    "no arrays": lambda seen: [Observed(values=None, mass=None)],
}


@pytest.mark.parametrize("name", WRONG_OBSERVATIONS)
def test_observations_of_another_shape_are_refused_and_the_right_ones_still_taken(name):
    scheduler = Scheduler(make_config(4, 20))
    request = make_request("a", 14)
    scheduler.add(msgspec.structs.replace(request, eviction="sinks=4 + recent=4 + heavy=8"))
    plan = scheduler.schedule()
    groups, _, width = plan.block_table.shape
    shape = (groups, len(plan.observations[0].members), width)
    seen = Observed(values=np.ones(shape, np.float32), mass=np.ones(shape, np.float32))
    token_ids = np.ones(len(plan.sample_rows), np.int32)
    before = pickle.dumps(scheduler)
    with pytest.raises(InvalidTransition, match="observations"):
        scheduler.commit(
            plan, StepResult(token_ids=token_ids, observed=WRONG_OBSERVATIONS[name](seen))
        )
    assert pickle.dumps(scheduler) == before
    scheduler.commit(plan, StepResult(token_ids=token_ids, observed=[seen]))


@pytest.mark.parametrize("which", ["values", "mass"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_sequence_that_attends_to_no_finite_numbers_ends_alone(which, wrong):
    scheduler = Scheduler(make_config(4, 20))
    for name in ("sound", "broken"):
        request = make_request(name, 14, max_tokens=2)
        scheduler.add(msgspec.structs.replace(request, eviction="sinks=4 + recent=4 + heavy=8"))
    plan = scheduler.schedule()
    right = answer(plan)
    getattr(right.observed[0], which)[:, 1, 0] = wrong
    (end,) = scheduler.commit(plan, right).finished
    assert (end.request_id, end.finish_reason) == ("broken", "error")
    assert "not finite" in end.error
    plan = scheduler.schedule()
    (end,) = scheduler.commit(plan, answer(plan)).finished
    assert (end.request_id, end.finish_reason) == ("sound", "length")
    assert np.isfinite(end.forfeited_mass)


@pytest.mark.parametrize("step", range(14))
def test_who_is_about_to_be_failed_holds_no_round(step):
    """Not even where one is due: what it would rank by is not known, nor what goes."""
    scheduler = Scheduler(make_config(4, 40))
    request = make_request("broken", 14, max_tokens=40)
    scheduler.add(msgspec.structs.replace(request, eviction="sinks=4 + recent=4 + heavy=8"))
    for _ in range(step):
        plan = scheduler.schedule()
        scheduler.commit(plan, answer(plan))
    before = int(scheduler.table.num_evicted[0])
    plan = scheduler.schedule()
    wrong = answer(plan)
    wrong.observed[0].values[...] = np.nan
    (end,) = scheduler.commit(plan, wrong).finished
    assert end.finish_reason == "error"
    assert end.num_evicted_tokens == before


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_a_draw_outside_the_vocabulary_ends_that_sequence_alone(token):
    driver = Driver(make_config())
    driver.add(make_request("broken", 5, max_tokens=4))
    driver.add(make_request("sound", [9] * 5, max_tokens=4))
    plan = driver.scheduler.schedule()
    right = driver.executor.execute(plan).token_ids
    output = driver.scheduler.commit(plan, StepResult(token_ids=np.array([token, right[1]])))
    (end,) = output.finished
    assert (end.request_id, end.finish_reason, end.token_ids) == ("broken", "error", [])
    assert "broken" in end.error
    assert output.token_ids.tolist() == [right[1]]
    driver.executor.known[1].append(int(right[1]))
    driver.run()
    expected = alone(make_request("sound", [9] * 5, max_tokens=4), driver.scheduler.config)
    assert driver.finished["sound", 0].token_ids == expected[0][0]


def test_nobody_starts_from_the_blocks_of_a_draw_that_failed():
    """Logits that are not finite may come of keys and values that are not."""
    driver = Driver(make_config(4, 20, events=True))
    driver.add(make_request("broken", 14))
    plan = driver.scheduler.schedule()
    driver.executor.execute(plan)
    (end,) = driver.scheduler.commit(plan, StepResult(token_ids=[-1])).finished
    assert end.finish_reason == "error"
    driver.run(make_request("the same", 14))
    assert driver.finished["the same", 0].num_cached_tokens == 0
    stored, removed, again = driver.scheduler.take_events()[:3]
    assert stored.block_hashes == sorted(removed.block_hashes, key=stored.block_hashes.index)
    assert again == stored


def test_an_abort_of_what_is_not_there_is_refused(busy):
    busy.abort("runs")
    before = snapshot(busy)
    for name in ("runs", "never added"):
        with pytest.raises(InvalidTransition, match=f"{name}.*finished or was never added"):
            busy.scheduler.abort(name)
    assert snapshot(busy) == before
    unharmed(busy)


def test_a_stop_of_what_is_not_there_or_has_no_text_is_refused(busy):
    before = snapshot(busy)
    waiting = 3
    for seq_id in (waiting, 99, -1):
        with pytest.raises(InvalidTransition, match=f"sequence {seq_id}"):
            busy.scheduler.stop(seq_id, "END")
    assert snapshot(busy) == before
    unharmed(busy)


@pytest.mark.parametrize("num_groups", [0, -1])
def test_a_manager_without_block_tables_is_refused(num_groups):
    with pytest.raises(ConfigError, match="num_groups"):
        make_manager(8, num_groups=num_groups)


@pytest.mark.parametrize(
    "name", [["runs"], {}, None, 10**5000], ids=lambda value: type(value).__name__
)
def test_an_abort_by_what_is_no_id_is_refused(busy, name):
    before = snapshot(busy)
    with pytest.raises(InvalidTransition, match="never added"):
        busy.scheduler.abort(name)
    assert snapshot(busy) == before


@pytest.mark.parametrize(
    "seq_id", [[0], {}, None, "0", 0.0, 10**5000], ids=lambda value: type(value).__name__
)
def test_a_stop_by_what_is_no_id_is_refused(busy, seq_id):
    before = snapshot(busy)
    with pytest.raises(InvalidTransition, match="never was"):
        busy.scheduler.stop(seq_id, "END")
    assert snapshot(busy) == before


@pytest.mark.parametrize("reason", [None, 3, b"END", "\ud800"])
def test_a_stop_for_a_reason_that_is_no_text_is_refused(busy, reason):
    before = snapshot(busy)
    with pytest.raises(InvalidTransition, match="the reason is"):
        busy.scheduler.stop(0, reason)
    assert snapshot(busy) == before
