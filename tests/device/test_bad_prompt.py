"""Prompts, conversations and what goes with them: what says nothing, or two things, is refused."""

from typing import Any

import numpy as np
import pytest

from pagedkv import LLM, InvalidRequest, SamplingParams

FEW = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-random", num_blocks=40, block_size=4)


def refused(call: Any, *told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert caught.value.where
    assert caught.value.remedy
    for words in told:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ({"prompt": "a", "cache_sallt": "x"}, "'cache_sallt'; did you mean 'cache_salt'?"),
        ({"promt": "a"}, "no key 'promt'; did you mean 'prompt'?"),
        ({"prompt": "a", 5: 6}, "no key 5; give prompt, prompt_token_ids, cache_salt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt and prompt_token_ids are both given"),
        ({"cache_salt": "x"}, "no prompt is given; give prompt or prompt_token_ids"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids is the text 'abc'; give it as prompt"),
        (np.array(3), "the prompts are array(3)"),
    ],
)
def test_what_a_prompt_says_is_said_once_and_understood(llm: LLM, prompt: Any, told: str) -> None:
    for call in (llm.generate, llm.stream):
        refused(lambda call=call: call(prompt, FEW), told)
        if isinstance(prompt, dict):
            refused(lambda call=call: call(["b", prompt], FEW), told)
    assert not llm.scheduler.has_unfinished()


@pytest.mark.parametrize(
    "tokens",
    [[None], [[1, 2], 5], [[1, 2], None], [np.array(3)], [{"prompt_token_ids": [1, 2], "a": 1}]],
)
def test_what_is_scored_is_two_tokens_or_more(llm: LLM, tokens: Any) -> None:
    wrong = len(tokens) - 1
    refused(lambda: llm.score(tokens), f"sequence {wrong} of token_ids: it is not two tokens")


def test_a_stop_token_is_one_of_the_vocabulary(llm: LLM) -> None:
    size = llm.model.geometry.vocab_size
    params = SamplingParams(max_tokens=2, stop_token_ids=(5, size))
    told = f"token {size} is outside", "stop_token_ids", f"0 to {size - 1}"
    refused(lambda: llm.generate("a", params), *told)
    llm.generate("a", SamplingParams(max_tokens=2, stop_token_ids=(size - 1,)))


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"foo": 1}, "the message is {'foo': 1}"),
        ({"content": "x"}, "the message is"),
        ({"role": 5, "content": "x"}, "the message is"),
        ({"role": "user"}, "the content is None"),
        ({"role": "user", "content": 5}, "the content is 5"),
        ({"role": "user", "content": []}, "the content is []"),
        ({"role": "user", "content": ["x"]}, "the content is ['x']"),
        ({"role": "user", "content": [{"type": "text"}]}, "the content is"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "the content is"),
    ],
)
def test_a_message_is_a_role_and_text(llm: LLM, message: Any, told: str) -> None:
    good = {"role": "user", "content": "x"}
    refused(lambda: llm.chat([good, message], FEW), f"messages[1]: {told}", "give ")
    refused(lambda: llm.chat([[good], [message]], FEW), told)


def test_a_conversation_has_messages(llm: LLM) -> None:
    for wrong in ([], None, "x", 5):
        refused(lambda wrong=wrong: llm.chat_prompt(wrong), "messages: the messages are")
    refused(lambda: llm.chat([[], []]), "messages: the messages are []")


def test_parts_of_text_are_one_text(llm: LLM) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    (output,) = llm.chat([{"role": "user", "content": parts}], FEW)
    assert output.prompt == llm.chat_prompt([{"role": "user", "content": "one\ntwo"}])
    (call,) = ({"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},)
    assert "assistant" in llm.chat_prompt([call])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"priority": [1]}, "priority: 1 priorities for 2 prompts; give one for all or one each"),
        ({"priority": "1"}, "priority: the priorities are '1'; give a whole number, or a list"),
        ({"priority": [1, None]}, "priority: the priorities are [1, None]"),
        ({"priority": True}, "priority: the priorities are True"),
        ({"priority": 1.0}, "priority: the priorities are 1.0"),
        ({"priority": 2**40}, "priority is 1099511627776; give a number from"),
        ({"tenant": ["a", "b", "c"]}, "tenant: 3 tenants for 2 prompts; give one for all"),
        ({"tenant": 5}, "tenant: the tenants are 5; give a name, or a list"),
        ({"tenant": ["a", 5]}, "tenant: the tenants are ['a', 5]"),
        ({"tenant": "\ud800"}, "give text that can be encoded"),
    ],
)
def test_priorities_and_tenants_that_are_none(llm: LLM, given: Any, told: str) -> None:
    for call in (llm.generate, llm.stream):
        refused(lambda call=call: call(["a", "b"], FEW, **given), told)
    refused(lambda: llm.score([[1, 2], [3, 4]], **given), told)
    turns = [[{"role": "user", "content": "x"}]] * 2
    refused(lambda: llm.chat(turns, FEW, **given), told)
    assert not llm.scheduler.has_unfinished()
