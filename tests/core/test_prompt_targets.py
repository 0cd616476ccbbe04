"""Which prompt tokens a plan asks log-probabilities for: each once, whatever the chunks."""

import pickle

import numpy as np
import pytest

from pagedkv import InvalidTransition, Scheduler, StepResult
from pagedkv.core.plan import PromptLogprobs
from tests.core.fakes import Driver, make_config, make_request


def watched(driver):
    """Answer every prompt target, and keep who was asked for what."""
    asked, execute = [], driver.executor.execute

    def answering(plan):
        result = execute(plan)
        targets = plan.prompt_targets
        if targets is None:
            return result
        assert len(targets.index) > 0
        asked.extend(zip(targets.seq_ids.tolist(), targets.place.tolist(), strict=True))
        before = np.searchsorted(plan.query_start, targets.index, side="right") - 1
        assert (plan.seq_ids[before] == targets.seq_ids).all()
        for seq_id, place, token in zip(
            targets.seq_ids.tolist(), targets.place.tolist(), targets.token_ids, strict=True
        ):
            assert driver.executor.known[seq_id][place] == token
        scores = answer(targets)
        return StepResult(token_ids=result.token_ids, prompt_logprobs=scores)

    driver.executor.execute = answering
    return asked


def answer(targets, count=None):
    count = len(targets.index) if count is None else count
    most = int(targets.num_logprobs.max())
    return PromptLogprobs(
        logprobs=np.zeros(count, np.float32),
        top_ids=np.zeros((count, most), np.int32),
        top_logprobs=np.zeros((count, most), np.float32),
    )


@pytest.mark.parametrize("most", [3, 64])
@pytest.mark.parametrize("num_blocks", [9, 64])
def test_every_prompt_token_but_the_first_is_asked_for_once(most, num_blocks):
    driver = Driver(make_config(num_blocks=num_blocks, max_num_batched_tokens=most))
    asked = watched(driver)
    lengths = {0: 19, 1: 1, 2: 13, 3: 18}
    for i, length in lengths.items():
        wanted = {"prompt_logprobs": 0} if i != 2 else {}
        driver.add(make_request(f"r{i}", length, seed=i, max_tokens=12, **wanted))
    driver.run()
    assert (driver.scheduler.stats().num_preemptions > 0) == (num_blocks == 9)
    expected = [(i, place) for i in (0, 3) for place in range(1, lengths[i])]
    assert sorted(asked) == expected  # equal prompts: none was taken from the prefix cache


def test_of_siblings_the_first_alone_is_asked():
    driver = Driver(make_config())
    asked = watched(driver)
    driver.run(make_request("r", 9, n=3, prompt_logprobs=2))
    assert asked == [(0, place) for place in range(1, 9)]


@pytest.mark.parametrize("count", [None, 0, 12, 14])
def test_an_answer_of_another_length_is_refused_and_the_right_one_still_taken(count):
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a", 14, prompt_logprobs=0))
    plan = scheduler.schedule()
    token_ids = np.ones(1, np.int32)
    scores = None if count is None else answer(plan.prompt_targets, count)
    before = pickle.dumps(scheduler)
    with pytest.raises(InvalidTransition, match="prompt"):
        scheduler.commit(plan, StepResult(token_ids=token_ids, prompt_logprobs=scores))
    assert pickle.dumps(scheduler) == before
    right = answer(plan.prompt_targets)
    scheduler.commit(plan, StepResult(token_ids=token_ids, prompt_logprobs=right))
