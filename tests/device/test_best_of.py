"""The likeliest of several draws are returned, whatever happens to them on the way."""

import pytest

from pagedkv import LLM, InvalidRequest, SamplingParams

PROMPT = [5] * 11


def drawn(llm, **params):
    fixed = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    return llm.generate([PROMPT], SamplingParams(**(fixed | params)))[0].outputs


def test_best_of_returns_the_likeliest_of_all_that_were_drawn():
    llm = LLM("tiny-random", num_blocks=64, block_size=4)
    every = drawn(llm, n=6, logprobs=0)
    best = sorted(every, key=lambda output: -output.cumulative_logprob)[:2]
    chosen = drawn(llm, n=2, best_of=6)
    assert [output.token_ids for output in chosen] == [output.token_ids for output in best]
    assert [output.index for output in chosen] == [0, 1]
    assert all(output.logprobs is None for output in chosen)


def test_preemption_and_swapping_change_no_ranking():
    roomy = drawn(LLM("tiny-random", num_blocks=64, block_size=4), n=2, best_of=6)
    tight = LLM("tiny-random", num_blocks=14, num_cpu_blocks=8, block_size=4)
    assert [o.token_ids for o in drawn(tight, n=2, best_of=6)] == [o.token_ids for o in roomy]
    assert tight.scheduler.stats().num_preemptions > 0


def test_fewer_draws_than_answers_are_refused():
    with pytest.raises(InvalidRequest, match="best_of is 2 and n is 3"):
        SamplingParams(n=3, best_of=2)


def aborted_once_two_have_ended(**params):
    """Six draws, two of which stop early; the outputs after an abort."""
    llm = LLM("tiny-random", num_blocks=64, block_size=4)
    stops = [output.token_ids[3] for output in drawn(llm, n=6)[:2]]
    ended = []

    def abort(plan, result, output):
        ended.extend(output.finished)
        if len(ended) >= 2:
            llm.engine.observers.remove(abort)
            llm.abort("1")

    llm.engine.observers.append(abort)
    (output,) = llm.generate(
        [PROMPT],
        SamplingParams(seed=3, max_tokens=12, ignore_eos=True, stop_token_ids=stops, **params),
    )
    assert 2 <= len(ended) < 6
    return output, ended


def test_an_aborted_request_says_so_though_as_many_have_ended_as_it_wants():
    output, ended = aborted_once_two_have_ended(n=2, best_of=6)
    assert output.finish_reason == "abort"
    assert [(o.finish_reason, o.stop_reason) for o in output.outputs] == [("abort", None)] * 2
    assert {tuple(o.token_ids) for o in output.outputs} <= {tuple(e.token_ids) for e in ended}


def test_of_an_aborted_request_that_wants_all_those_that_have_ended_are_answers():
    output, ended = aborted_once_two_have_ended(n=6)
    complete = {end.index for end in ended}
    reasons = ["stop" if i in complete else "abort" for i in range(6)]
    assert [o.finish_reason for o in output.outputs] == reasons
