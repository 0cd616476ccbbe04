"""Priorities and tenants, given with the prompts: who goes first, and on whose account."""

from typing import Any

import pytest

from pagedkv import LLM, InvalidRequest, SamplingParams

FEW = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def order_of_ends(llm: LLM, **given: Any) -> list[int]:
    """Serve one at a time and return which prompts ended first, second and third."""
    ends = [each for each in llm.stream(PROMPTS, FEW, **given) if each.finished]
    return [PROMPTS.index(list(each.prompt_token_ids)) for each in ends]


def one_at_a_time(**fields: Any) -> LLM:
    return LLM("tiny-random", num_blocks=40, block_size=4, max_num_seqs=1, **fields)


def test_the_lowest_priority_is_served_first() -> None:
    llm = one_at_a_time(scheduling_policy="priority")
    assert order_of_ends(llm) == [0, 1, 2]
    assert order_of_ends(llm, priority=[5, -1, 2]) == [1, 2, 0]
    assert order_of_ends(llm, priority=3) == [0, 1, 2]
    assert order_of_ends(llm, priority=(2, 1, 0)) == [2, 1, 0]


def test_a_fair_scheduler_deals_to_tenants_in_turn() -> None:
    llm = one_at_a_time(scheduling_policy="fair")
    assert order_of_ends(llm, tenant=["a", "a", "b"]) == [0, 2, 1]
    assert order_of_ends(llm, tenant="a") == [0, 1, 2]


def test_a_scheduler_with_tenants_serves_those_it_lists() -> None:
    llm = LLM("tiny-random", num_blocks=40, block_size=4, tenants=["a=20", "b"])
    turns = [{"role": "user", "content": "hi"}]
    by_name = [
        llm.generate(PROMPTS, FEW, tenant=["a", "b", "a"]),
        list(llm.stream(PROMPTS[0], FEW, tenant="b"))[-1:],
        llm.chat(turns, FEW, tenant="b"),
    ]
    assert all(len(output.token_ids) == 4 for outputs in by_name for output in outputs)
    assert len(llm.score(PROMPTS[0], tenant="a")[0].logprobs) == 2
    for wrong in (None, "c", ["a", "b", "c"]):
        with pytest.raises(InvalidRequest, match="give one of 'a', 'b'"):
            llm.generate(PROMPTS, FEW, tenant=wrong)
    assert not llm.scheduler.has_unfinished()


def test_a_quota_bounds_its_tenant_alone() -> None:
    """Four blocks of four tokens are for one prompt of three and its four tokens at a time."""
    llm = LLM("tiny-random", num_blocks=40, block_size=4, tenants=["a=3", "b"])
    most = {"a": 0, "b": 0}
    for name in most:
        for _ in llm.stream(PROMPTS, FEW, tenant=name):
            most[name] = max(most[name], llm.scheduler.manager.pool.num_held)
    assert most["a"] <= 3 < most["b"]


def test_whom_it_goes_by_does_not_change_what_is_said() -> None:
    llm = LLM("tiny-random", num_blocks=40, block_size=4)
    plain, marked = (
        [output.token_ids for output in llm.generate(PROMPTS, FEW, **given)]
        for given in ({}, {"tenant": ["x", "y", "x"], "priority": [3, 2, 1]})
    )
    assert plain == marked
