"""A wrong request is refused by name; nothing changes and the others are served exactly."""

import numpy as np
import pytest

from pagedkv import InvalidRequest, NeverFits, PolicyError, Request, SamplingParams
from tests.core.fakes import Driver, make_config, make_request
from tests.core.refusals import refused, snapshot, unharmed


def test_a_prompt_that_the_pool_can_never_hold_is_refused(busy):
    request = make_request("huge", [1] * 41)
    refused(busy, request, NeverFits, "huge", "11 blocks", "10", "cache.num_blocks")


def test_more_sequences_than_can_ever_run_are_refused(busy):
    request = make_request("many", 3, n=5)
    refused(busy, request, InvalidRequest, "many", "n is 5", "max_num_seqs")


def test_no_number_of_sequences_is_too_large_to_be_refused(busy):
    refused(busy, make_request("many", 3, n=2**60), InvalidRequest, "many", "max_num_seqs")


@pytest.mark.parametrize("name", ["runs", "waits", "forked"])
def test_an_id_in_use_is_refused(busy, name):
    refused(busy, make_request(name, 3), InvalidRequest, name, "in use")


def test_an_id_is_free_again_when_its_request_has_finished(busy):
    busy.run()
    busy.finished.clear()
    busy.run(make_request("runs", 3))
    assert ("runs", 0) in busy.finished


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", 5),
        ("request_id", None),
        ("request_id", ["a"]),
        ("cache_salt", None),
        ("cache_salt", 5),
        ("cache_salt", b"salt"),
        ("cache_salt", "\ud800"),
        ("sampling", None),
        ("sampling", {"n": 2}),
        ("eviction", 5),
        ("eviction", ["h2o"]),
    ],
)
def test_a_wrong_field_of_a_request_is_refused(busy, field, value):
    fields = {"request_id": "bad", "prompt_token_ids": [1, 2]} | {field: value}

    def submit():
        busy.scheduler.add(Request(**fields))

    before = snapshot(busy)
    with pytest.raises(InvalidRequest, match=field):
        submit()
    assert snapshot(busy) == before
    unharmed(busy)


@pytest.mark.parametrize("eviction", ["", "nonsense", "sinks=", "tokens=1", "sinks=1 + recent=-4"])
def test_an_eviction_policy_that_cannot_be_read_or_held_is_refused(busy, eviction):
    request = Request(request_id="bad", prompt_token_ids=[1, 2], eviction=eviction)
    before = snapshot(busy)
    with pytest.raises(PolicyError) as caught:
        busy.scheduler.add(request)
    assert caught.value.where
    assert caught.value.remedy
    assert snapshot(busy) == before
    unharmed(busy)


WRONG_SAMPLING = [
    ("n", 0),
    ("n", -1),
    ("n", 1.5),
    ("n", True),
    ("n", "2"),
    ("n", None),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", None),
    ("temperature", "hot"),
    ("temperature", 1e300),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("top_k", -2),
    ("top_k", 2.5),
    ("top_k", 2**40),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 0.5),
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", 1.5),
    ("stop", ""),
    ("stop", ("a", "")),
    ("stop", 5),
    ("stop", (5,)),
    ("stop_token_ids", 5),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", ("a",)),
    ("stop_token_ids", (2**40,)),
    ("ignore_eos", "yes"),
    ("logprobs", -1),
    ("logprobs", 65),
    ("repetition_penalty", 0),
    ("repetition_penalty", float("inf")),
    ("repetition_penalty", 1e300),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("min_tokens", -1),
    ("min_tokens", 17),  # more than max_tokens
    ("logit_bias", {1: 101}),
    ("logit_bias", {1: float("nan")}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", {"one": 1}),
    ("logit_bias", [1]),
    ("logit_bias", np.array([1.0])),
    ("logit_bias", {"1" * 5000: 1}),
    ("logit_bias", {"5": 1, 5: 2}),
    ("allowed_token_ids", np.array(5)),
    ("allowed_token_ids", ()),
    ("allowed_token_ids", (-1,)),
    ("allowed_token_ids", 5),
]


@pytest.mark.parametrize(("field", "value"), WRONG_SAMPLING, ids=repr)
def test_a_wrong_sampling_parameter_is_refused(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.where == f"sampling.{field}"
    assert caught.value.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan")], ids=repr)
def test_a_number_that_is_not_finite_is_refused_as_such(value):
    with pytest.raises(InvalidRequest, match=r"temperature is (nan|inf); give a finite number"):
        SamplingParams(temperature=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", np.float64(0.5)),
        ("temperature", np.float32(0.5)),
        ("top_k", np.int64(5)),
        ("max_tokens", None),
        ("max_tokens", 2**40),
        ("logprobs", 0),
        ("stop", "one"),
        ("stop", None),
        ("stop_token_ids", None),
        ("stop_token_ids", [np.int64(3)]),
        ("stop", ["one", "two"]),
        ("stop_token_ids", [1, 2]),
        ("stop_token_ids", np.array([1, 2])),
        ("seed", 2**63 - 1),
    ],
    ids=repr,
)
def test_what_anyone_may_write_is_accepted_and_served(field, value):
    params = {"max_tokens": 2} | {field: value}
    driver = Driver(make_config(num_blocks=4))
    driver.run(make_request("a", 3, **params))
    end = driver.finished["a", 0]
    assert end.finish_reason == "length" or "outgrown" in end.error, "a small pool ends the endless"


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)])
def test_stop_strings_are_one_or_many(stop):
    assert SamplingParams(stop=stop).stop == ("END",)


@pytest.mark.parametrize("value", ["maybe", "True", ""])
def test_early_stopping_is_one_of_three(value):
    with pytest.raises(InvalidRequest, match=r"early_stopping: .*; give True, False or 'never'"):
        SamplingParams(beam_width=2, early_stopping=value)
