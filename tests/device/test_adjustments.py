"""Which tokens are drawn, from the public face: allowed, biased, and none that ends too early."""

import pytest
import torch

from pagedkv import LLM, InvalidRequest, SamplingParams
from tests.device.reference import reference_logits, reference_model

GREEDY = {"temperature": 0.0, "max_tokens": 10}
PROMPTS = [[1, 2, 3], [9] * 20, [40, 41]]


@pytest.fixture(scope="module")
def llm():
    return LLM("tiny-random", block_size=8, num_blocks=64)


def naive(llm, prompt, change, count=10):
    """Draw greedily, one token after the other, from changed logits of plain forwards."""
    reference, known = reference_model(llm.model), list(prompt)
    for done in range(count):
        known.append(int(change(reference_logits(reference, known)[-1].clone(), done).argmax()))
    return known[len(prompt) :]


def test_only_allowed_tokens_are_drawn(llm):
    allowed = torch.tensor([200, 5, 77])

    def change(logits, _done):
        return torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])

    params = SamplingParams(**GREEDY, ignore_eos=True, allowed_token_ids=allowed.tolist())
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert output.token_ids == naive(llm, prompt, change)


def test_biases_are_added(llm):
    (free,) = llm.generate([PROMPTS[0]], SamplingParams(**GREEDY, ignore_eos=True))
    bias = {free.token_ids[0]: -100.0, free.token_ids[1]: 0.3, 7: 0.5}

    def change(logits, _done):
        for token, value in bias.items():
            logits[token] += value
        return logits

    params = SamplingParams(**GREEDY, ignore_eos=True, logit_bias=bias)
    (output,) = llm.generate([PROMPTS[0]], params)
    assert output.token_ids == naive(llm, PROMPTS[0], change) != free.token_ids


def test_neighbours_are_left_alone(llm):
    plain = SamplingParams(**GREEDY, ignore_eos=True)
    alone = [llm.generate([prompt], plain)[0].token_ids for prompt in PROMPTS]
    picky = SamplingParams(**GREEDY, ignore_eos=True, allowed_token_ids=[5], logit_bias={5: 1})
    outputs = llm.generate(PROMPTS, [plain, picky, plain])
    assert [output.token_ids for output in outputs] == [alone[0], [5] * 10, alone[2]]


def test_no_end_before_min_tokens(llm):
    """Every other token ends it: those are not drawn at first, and then the first of them does."""
    stops = list(range(0, llm.model.geometry.vocab_size, 2))
    for least in (0, 1, 4):
        fields = {"stop_token_ids": stops, "min_tokens": least, "ignore_eos": True}
        params = SamplingParams(**GREEDY, **fields)

        def change(logits, done, least=least):
            if done < least:
                logits[stops] = -torch.inf
            return logits

        (output,) = llm.generate([PROMPTS[0]], params)
        want = naive(llm, PROMPTS[0], change)
        ends = [i for i, token in enumerate(want) if i >= least and token % 2 == 0]
        assert output.token_ids == want[: ends[0] + 1 if ends else None]
        assert len(output.token_ids) > least


def test_no_stop_string_before_min_tokens(llm):
    drawn = {"temperature": 5.0, "seed": 1, "max_tokens": 40, "ignore_eos": True}
    *_, free = llm.stream("hello", SamplingParams(**drawn))
    stop = next(c for c in free.text if c.isascii() and c.isprintable())
    (early,) = llm.generate("hello", SamplingParams(**drawn, stop=stop))
    (late,) = llm.generate("hello", SamplingParams(**drawn, stop=stop, min_tokens=30))
    assert len(early.token_ids) < 30 < len(late.token_ids)
    assert late.token_ids == free.token_ids[: len(late.token_ids)]


def test_nothing_left_to_draw_fails_alone(llm):
    fields = {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}
    params = [SamplingParams(**GREEDY), SamplingParams(**GREEDY, **fields)]
    fine, failed = llm.generate(PROMPTS[:2], params)
    assert fine.finish_reason == "length"
    assert failed.finish_reason == "error"


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_tokens_that_the_model_does_not_have_are_refused(llm, name):
    beyond = llm.model.geometry.vocab_size
    params = SamplingParams(**{name: {beyond: 1} if name == "logit_bias" else [3, beyond]})
    with pytest.raises(InvalidRequest, match=f"token {beyond} is outside the vocabulary") as caught:
        llm.generate(PROMPTS, params)
    assert name in caught.value.where
    assert not llm.scheduler.has_unfinished()
