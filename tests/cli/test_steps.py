"""A greedy run shown step by step, with the cache and without."""

import re

import pytest

from pagedkv import InvalidRequest, SamplingParams
from pagedkv.cli.steps import show_steps
from pagedkv.device.llm import LLM

PROMPT = "Lionel Messi is a"


@pytest.fixture(scope="module")
def llm():
    return LLM("tiny-random-gpt2", num_blocks=16, block_size=4)


def shown(llm, **options):
    lines = []
    steps = show_steps(llm, PROMPT, write=lines.append, **options)
    return steps, "\n".join(lines)


def test_steps_are_those_of_an_ordinary_greedy_run(llm):
    steps, _ = shown(llm, max_tokens=8, stop=())
    params = SamplingParams(temperature=0, max_tokens=8)
    (plain,) = llm.generate(PROMPT, params)
    assert [step.token_id for step in steps] == plain.token_ids
    assert steps[-1].text.startswith(PROMPT)
    assert all(step.agrees for step in steps)
    assert all(0 < step.chance <= 1 for step in steps)


def test_only_the_new_token_goes_through_the_layers(llm):
    llm.scheduler.reset_prefix_cache()
    steps, _ = shown(llm, max_tokens=6, stop=())
    length = len(PROMPT)  # bytes are tokens in the tiny models
    assert [step.cached.tokens for step in steps] == [length, 1, 1, 1, 1, 1]
    assert [step.uncached.tokens for step in steps] == [length + i for i in range(6)]
    assert steps[0].cached == steps[0].uncached
    assert steps[-1].cached.flops < steps[-1].uncached.flops
    assert steps[-1].cached.kv_read == steps[-1].uncached.kv_read


def test_every_line_fits_and_the_totals_add_up(llm):
    llm.scheduler.reset_prefix_cache()
    steps, text = shown(llm, max_tokens=30, stop=())
    assert max(map(len, text.splitlines())) <= 100
    row = re.search(r"tokens through the layers +([\d,]+) +([\d,]+)", text)
    assert int(row[1]) == sum(step.cached.tokens for step in steps)
    assert int(row[2]) == sum(step.uncached.tokens for step in steps)
    assert "same token at every step" in text
    assert all(line.isprintable() for line in text.splitlines()), "noise could steer a terminal"


def test_a_stop_string_ends_the_run_and_the_engine_is_as_before(llm):
    executor = llm.engine.executor
    whole, _ = shown(llm, max_tokens=12, stop=())
    letter = whole[-1].text[len(PROMPT)]
    steps, _ = shown(llm, max_tokens=12, stop=(letter,))
    assert 0 < len(steps) < len(whole)
    assert llm.engine.executor is executor
    assert not llm.scheduler.has_unfinished()


def test_a_difference_is_said(llm, monkeypatch):
    from pagedkv.cli import steps as module

    honest = module.run_without_cache

    def astray(loaded, token_ids):
        result, work = honest(loaded, token_ids)
        return type(result)(token_ids=result.token_ids + 1), work

    monkeypatch.setattr(module, "run_without_cache", astray)
    _, text = shown(llm, max_tokens=3, stop=())
    assert "differ in 3 tokens" in text


def test_a_wrong_prompt_is_refused_and_the_engine_is_as_before(llm):
    executor = llm.engine.executor
    with pytest.raises(InvalidRequest):
        show_steps(llm, "", write=lambda _: None)
    assert llm.engine.executor is executor
