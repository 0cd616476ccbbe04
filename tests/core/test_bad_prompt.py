"""A wrong prompt is refused by name; nothing changes and the others are served exactly."""

import numpy as np
import pytest

from pagedkv import InvalidRequest, Request
from tests.core.fakes import VOCAB, Driver, alone, make_config, make_request
from tests.core.refusals import refused, snapshot


def test_the_snapshot_notices_a_change(busy):
    before = snapshot(busy)
    assert snapshot(busy) == before
    busy.scheduler.manager.pool.cached._level[-1] += 1
    assert snapshot(busy) != before
    busy.scheduler.manager.pool.cached._level[-1] -= 1
    assert snapshot(busy) == before


WRONG_PROMPTS = {
    "empty list": ([], "empty"),
    "empty array": (np.array([], np.int32), "empty"),
    "empty string": ("", "empty"),
    "string": ("hello", "whole numbers"),
    "bytes": (b"hello", "whole numbers"),
    "strings": (["1", "2"], "whole numbers"),
    "floats": ([1.0, 2.0], "whole numbers"),
    "nan": ([float("nan")], "whole numbers"),
    "float array": (np.ones(3), "whole numbers"),
    "bools": ([True, False], "whole numbers"),
    "a bool among numbers": ([1, True], "whole numbers"),
    "none": (None, "whole numbers"),
    "a none among numbers": ([1, None], "whole numbers"),
    "number": (5, "whole numbers"),
    "nested": ([[1, 2], [3, 4]], "whole numbers"),
    "ragged": ([[1], [2, 3]], "whole numbers"),
    "nested and empty": ([[]], "empty"),
    "two dimensions": (np.ones((2, 2), np.int32), "whole numbers"),
    "no dimension": (np.array(5), "whole numbers"),
    "a set has no order": ({1, 2}, "whole numbers"),
    "dict": ({1: 2}, "whole numbers"),
    "negative": ([1, -1], "index 1 is outside the vocabulary"),
    "vocabulary size": ([VOCAB], "outside the vocabulary"),
    "32 bits overflow": ([2**32 + 1], "outside the vocabulary"),
    "64 bits unsigned": ([2**64 - 1], "outside the vocabulary"),
    "huge": ([2**70], "whole numbers"),
    "huge and negative": ([2**63, -1], "whole numbers"),
    "longer than the model": ([1] * 4096, "4096"),
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_a_wrong_prompt_is_refused(busy, name):
    prompt, word = WRONG_PROMPTS[name]
    request = Request(request_id="bad", prompt_token_ids=prompt)
    refused(busy, request, InvalidRequest, "bad", "prompt_token_ids", word)


@pytest.mark.parametrize(
    "prompt", [(1, 2), np.array([1, 2], np.int64), np.array([1, 2], np.uint8), range(1, 3)]
)
def test_any_flat_sequence_of_token_ids_is_a_prompt(prompt):
    driver = Driver(make_config())
    assert (
        driver.run(make_request("a", prompt))["a", 0].token_ids
        == (alone(make_request("a", [1, 2]), make_config())[0][0])
    )


def test_a_prompt_changed_after_it_was_added_does_not_matter():
    prompt = np.array([1, 2, 3], np.int32)
    driver = Driver(make_config())
    driver.add(make_request("a", prompt))
    prompt[:] = 9
    assert (
        driver.run()["a", 0].token_ids == (alone(make_request("a", [1, 2, 3]), make_config())[0][0])
    )
