"""What a request asks of certain tokens: allowed, biased, and none that ends it too early."""

import numpy as np
import pytest

from pagedkv import InvalidRequest
from tests.core.fakes import Driver, make_config, make_request

NEVER = -np.inf


def pairs(plan):
    wanted = plan.sampling.adjustments
    kept = list(zip(wanted.kept_sample.tolist(), wanted.kept_token.tolist(), strict=True))
    biased = wanted.sample.tolist(), wanted.token.tolist(), wanted.bias.tolist()
    return kept, list(zip(*biased, strict=True))


def test_each_sample_brings_what_it_asks_for():
    driver = Driver(make_config(4, 60))
    driver.add(make_request("plain", 5))
    driver.add(make_request("biased", 5, logit_bias={3: -1.5, 4: 2}))
    driver.add(make_request("picky", 5, allowed_token_ids=[9, 8], logit_bias={"9": 1}))
    for _ in range(3):
        driver.step()
        kept, biased = pairs(driver.plans[-1])
        assert kept == [(2, 9), (2, 8)]
        assert biased == [(1, 3, -1.5), (1, 4, 2.0), (2, 9, 1.0)]


def test_indices_follow_who_runs():
    driver = Driver(make_config(4, 60))
    driver.add(make_request("plain", 5, max_tokens=1))
    driver.add(make_request("biased", 5, logit_bias={3: -1.5}))
    driver.step()
    assert pairs(driver.plans[-1]) == ([], [(1, 3, -1.5)])
    driver.step()
    assert pairs(driver.plans[-1]) == ([], [(0, 3, -1.5)])


def test_tokens_that_end_a_sequence_are_barred_until_it_is_long_enough():
    model = {"eos_token_ids": (60, 59)}
    driver = Driver(make_config(4, 60, model=model))
    fields = {"min_tokens": 2, "stop_token_ids": [7]}
    driver.add(make_request("a", 5, **fields, logit_bias={7: 5}))
    driver.add(make_request("b", 5, **fields, ignore_eos=True))
    driver.add(make_request("c", 5))
    driver.step()
    a = [(0, token, NEVER) for token in (7, 59, 60)]
    for _ in range(2):
        assert pairs(driver.plans[-1]) == ([], [(0, 7, 5.0), *a, (1, 7, NEVER)])
        driver.step()
    assert pairs(driver.plans[-1]) == ([], [(0, 7, 5.0)])


def test_a_token_that_comes_too_early_all_the_same_ends_nothing():
    """An executor of one's own may draw what it likes."""
    drawn = Driver(make_config(4, 60)).run(make_request("a", 5, max_tokens=8))["a", 0].token_ids
    for least in (0, 2, 7):
        driver = Driver(make_config(4, 60))
        stops = tuple(sorted(set(drawn)))
        end = driver.run(make_request("a", 5, stop_token_ids=stops, min_tokens=least))["a", 0]
        assert end.token_ids == drawn[: least + 1]
        assert end.finish_reason == "stop"


def test_who_comes_back_has_drawn_what_it_had():
    """Preempted and computed anew, a sequence is as long as it was."""
    pushed = Driver(make_config(4, 12, max_num_seqs=4))
    fields = {"min_tokens": 20, "max_tokens": 24, "stop_token_ids": tuple(range(61))}
    ends = pushed.run(*(make_request(f"r{i}", [i] * 9, **fields) for i in range(4)))
    assert pushed.scheduler.totals.num_preemptions > 0
    assert [len(end.token_ids) for end in ends.values()] == [21] * 4


def test_nobody_pays_for_adjustments_that_nobody_asks_for():
    driver = Driver(make_config(4, 60))
    driver.add(make_request("plain", 5, stop_token_ids=[3]))
    driver.step()
    assert driver.plans[-1].sampling.adjustments is None


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_tokens_beyond_the_vocabulary_are_refused(name):
    driver = Driver(make_config(4, 60))
    value = {61: 1.0} if name == "logit_bias" else (3, 61)
    with pytest.raises(
        InvalidRequest, match=r"token 61 is outside the vocabulary; give .* 0 to 60"
    ):
        driver.add(make_request("a", 5, **{name: value}))
    assert not driver.scheduler.has_unfinished()


def test_an_end_that_the_vocabulary_does_not_hold_is_not_barred():
    """There are models whose files name one."""
    driver = Driver(make_config(4, 60, model={"eos_token_ids": (60, 265)}))
    driver.add(make_request("a", 5, min_tokens=2))
    driver.step()
    assert pairs(driver.plans[-1]) == ([], [(0, 60, NEVER)])
