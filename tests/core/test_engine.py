"""The loop: schedule, execute, commit, and tell whoever watches."""

import pytest

from pagedkv import Engine, InvalidTransition, Scheduler
from tests.core.fakes import Driver, RecordingExecutor, alone, make_config, make_request


def make_engine(*observers, num_blocks=20):
    config = make_config(4, num_blocks)
    return Engine(Scheduler(config), RecordingExecutor(num_blocks, 4), observers)


def add(engine, request):
    for seq_id in engine.scheduler.add(request):
        engine.executor.known[seq_id] = list(request.prompt_token_ids)
        engine.executor.salts[seq_id] = request.cache_salt


def remember(engine):
    """Tell the executor what each sequence has drawn, as a `Driver` does."""

    def observe(plan, result, output):
        for seq_id, token in zip(output.seq_ids.tolist(), output.token_ids.tolist(), strict=True):
            engine.executor.known[seq_id].append(token)

    engine.observers.append(observe)
    return engine


def test_a_run_serves_what_is_there_and_what_comes_in_between():
    engine = remember(make_engine())
    requests = [make_request(f"r{i}", 5 + i) for i in range(3)]
    add(engine, requests[0])
    ends = {}
    for number, (_, _, output) in enumerate(engine.run()):
        ends.update((end.request_id, end.token_ids) for end in output.finished)
        if number < 2:
            add(engine, requests[number + 1])
    for request in requests:
        assert ends[request.request_id] == alone(request, engine.scheduler.config)[0][0]


def test_observers_are_told_of_every_step_after_it_was_committed():
    steps = []

    def observe(plan, result, output):
        steps.append((plan.step, engine.scheduler.stats().generation_tokens, len(output.rows)))

    engine = remember(make_engine(observe))
    add(engine, make_request("a", 5, max_tokens=3))
    assert len(list(engine.run())) == 3
    assert steps == [(0, 1, 1), (1, 2, 1), (2, 3, 1)]


def test_an_empty_plan_is_not_carried_out():
    engine = make_engine()
    engine.executor = None
    plan, _, output = engine.step()
    assert plan.num_tokens == 0
    assert output.finished == []


def test_a_request_that_failed_while_planning_is_still_reported():
    engine = remember(make_engine(num_blocks=2))
    add(engine, make_request("a", 5, max_tokens=100))
    ends = [end for _, _, output in engine.run() for end in output.finished]
    assert [end.finish_reason for end in ends] == ["error"]


def test_a_step_that_cannot_be_carried_out_is_computed_again():
    """Every fifth step breaks after the device may have written anything."""
    driver, calls = Driver(make_config(4, 24)), iter(range(10_000))
    execute = driver.executor.execute

    def sometimes(plan):
        result = execute(plan)
        if next(calls) % 5 == 3:
            raise RuntimeError("device lost")
        return result

    class Flaky:
        execute = staticmethod(sometimes)

    requests = [make_request(f"r{i}", 5 + 3 * i, n=1 + i % 2) for i in range(4)]
    for request in requests:
        driver.add(request)
    engine = Engine(driver.scheduler, Flaky())
    broken = 0
    while driver.scheduler.has_unfinished():
        try:
            _, _, output = engine.step()
        except RuntimeError:
            broken += 1
            driver.scheduler.audit()
            continue
        for seq_id, token in zip(output.seq_ids.tolist(), output.token_ids.tolist(), strict=True):
            driver.executor.known[seq_id].append(token)
        driver._end(output.finished)
    assert broken > 1
    for request in requests:
        for index, (tokens, reason) in enumerate(alone(request, driver.scheduler.config)):
            end = driver.finished[request.request_id, index]
            assert (end.token_ids, end.finish_reason) == (tokens, reason)


def test_only_the_outstanding_plan_can_be_discarded():
    driver = Driver(make_config())
    driver.add(make_request("a", 5))
    plan = driver.scheduler.schedule()
    driver.scheduler.discard(plan)
    with pytest.raises(InvalidTransition, match="discard"):
        driver.scheduler.discard(plan)
