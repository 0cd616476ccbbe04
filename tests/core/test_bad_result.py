"""A result is looked over as a whole: one that does not answer its plan changes nothing."""

import msgspec
import numpy as np
import pytest

from pagedkv import Engine, InvalidTransition, Scheduler, StepResult
from pagedkv.core.plan import PromptLogprobs
from tests.core.fakes import VOCAB, Driver, make_config, make_request
from tests.core.refusals import snapshot


def full_answer(plan):
    """What a device gives to samples that ask for two alternatives, and to prompt targets."""
    num, targets = len(plan.sample_rows), plan.prompt_targets
    return StepResult(
        token_ids=np.ones(num, np.int32),
        logprobs=np.full(num, -0.5, np.float32),
        top_ids=np.tile(np.array([1, 2], np.int32), (num, 1)),
        top_logprobs=np.full((num, 2), -0.5, np.float32),
        prompt_logprobs=PromptLogprobs(
            logprobs=np.full(len(targets.index), -1.0, np.float32),
            top_ids=np.ones((len(targets.index), 1), np.int32),
            top_logprobs=np.full((len(targets.index), 1), -1.0, np.float32),
        ),
    )


def asking():
    """Two sequences that want everything a device can say of a draw."""
    driver = Driver(make_config())
    driver.add(make_request("a", 3, logprobs=2, prompt_logprobs=1))
    driver.add(make_request("b", 5, logprobs=2))
    return driver, driver.scheduler.schedule()


def scored(**fields):
    return lambda right: msgspec.structs.replace(right.prompt_logprobs, **fields)


WRONG = {
    "logprobs": {
        "absent": lambda right: None,
        "too few": lambda right: right.logprobs[:1],
        "too many": lambda right: np.zeros(5, np.float32),
        "text": lambda right: "ab",
        "whole numbers": lambda right: np.zeros(2, np.int32),
        "nan": lambda right: np.array([-1, np.nan], np.float32),
        "infinite": lambda right: np.array([-np.inf, -1], np.float32),
    },
    "top_ids": {
        "absent": lambda right: None,
        "too few": lambda right: right.top_ids[:1],
        "too narrow": lambda right: right.top_ids[:, :1],
        "flat": lambda right: right.top_ids[:, 0],
        "floats": lambda right: right.top_ids.astype(np.float32),
    },
    "top_logprobs": {
        "absent": lambda right: None,
        "too narrow": lambda right: right.top_logprobs[:, :1],
        "whole numbers": lambda right: right.top_ids,
    },
    "token_ids": {
        "ragged": lambda right: [[1], [2, 3]],
        "beyond all integers": lambda right: [10**30, 1],
    },
    "observations": {
        "none": lambda right: None,
        "a number": lambda right: 3,
        "one more": lambda right: [3],
    },
    "prompt_logprobs": {
        "an array": lambda right: np.zeros(2),
        "without numbers": scored(logprobs=None),
        "without alternatives": scored(top_ids=None),
        "alternatives of too few": scored(top_ids=np.ones((1, 1), np.int32)),
        "whole numbers": scored(logprobs=np.ones(2, np.int32)),
    },
}


@pytest.mark.parametrize(
    ("field", "name"), [(field, name) for field, names in WRONG.items() for name in names]
)
def test_a_result_that_is_wrong_anywhere_is_refused_and_the_right_one_still_taken(field, name):
    driver, plan = asking()
    right = full_answer(plan)
    attribute = "observed" if field == "observations" else field
    wrong = msgspec.structs.replace(right, **{attribute: WRONG[field][name](right)})
    before = snapshot(driver)
    with pytest.raises(InvalidTransition, match=field) as caught:
        driver.scheduler.commit(plan, wrong)
    assert caught.value.where == "commit"
    assert caught.value.remedy
    assert snapshot(driver) == before
    assert driver.scheduler.commit(plan, right).token_ids.tolist() == [1, 1]


def test_best_of_is_never_ranked_by_log_probabilities_that_nobody_gave():
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a", 3, n=1, best_of=3, max_tokens=1))
    plan = scheduler.schedule()
    with pytest.raises(InvalidTransition, match="logprobs"):
        scheduler.commit(plan, StepResult(token_ids=[1, 2, 3]))
    result = StepResult(token_ids=[1, 2, 3], logprobs=np.array([-3, -1, -2], np.float32))
    ends = scheduler.commit(plan, result).finished
    assert [end.cumulative_logprob for end in ends] == [-3, -1, -2]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_draw_that_failed_has_no_log_probability_and_ends_alone(token):
    driver, plan = asking()
    right = full_answer(plan)
    right.token_ids[0], right.logprobs[0] = token, np.nan
    right.top_ids[0], right.top_logprobs[0] = -1, np.nan
    (end,) = driver.scheduler.commit(plan, right).finished
    assert (end.request_id, end.finish_reason) == ("a", "error")


def test_what_nobody_asked_for_is_not_looked_at():
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a", 3))
    plan = scheduler.schedule()
    output = scheduler.commit(plan, StepResult(token_ids=[7], logprobs="rubbish", top_ids=object()))
    assert output.token_ids.tolist() == [7]


def test_a_refused_result_leaves_an_engine_that_goes_on():
    driver = Driver(make_config())
    driver.add(make_request("a", 5, max_tokens=3))
    execute, calls = driver.executor.execute, iter(range(100))

    class Flaky:
        def execute(self, plan):
            result = execute(plan)
            return StepResult(token_ids=[]) if next(calls) == 1 else result

    engine = Engine(driver.scheduler, Flaky())
    tokens = []
    while driver.scheduler.has_unfinished():
        if len(tokens) == 1:
            with pytest.raises(InvalidTransition, match="token_ids"):
                engine.step()
        _, _, output = engine.step()
        driver.executor.known[0] += output.token_ids.tolist()
        tokens += output.token_ids.tolist()
    assert len(tokens) == 3
