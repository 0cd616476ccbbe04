"""Beam search finds what transformers' does, whatever happens to the beams on the way."""

import pytest
import torch
from msgspec.structs import replace

from pagedkv import LLM, SamplingParams
from pagedkv.device.models import load_model
from tests.device.reference import reference_model
from tests.device.test_exactness import ragged

MODEL = "tiny-random"
# Enough that sequences of a random model end now and then.
STOPS = (3, 17, 40, 41, 77, 90, 128, 130, 131, 200, 222, 251)
PROMPTS = ragged(5, longest=30, seed=4)


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def reference(loaded):
    return reference_model(loaded)


def params(width, **fields):
    fixed = {"temperature": 0.0, "max_tokens": 14, "n": width, "ignore_eos": True}
    return SamplingParams(**(fixed | {"beam_width": width, "stop_token_ids": STOPS} | fields))


def transformers_answer(reference, prompt, asked):
    """Tokens, up to and with the stop token, and scores of one prompt's best sequences."""
    stops = list(asked.stop_token_ids)
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=asked.beam_width,
            num_return_sequences=asked.n,
            do_sample=False,
            max_new_tokens=asked.max_tokens,
            length_penalty=asked.length_penalty,
            early_stopping=asked.early_stopping,
            eos_token_id=stops or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    answers = []
    for tokens in found.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens) - 1)
        answers.append(tokens[: end + 1])
    return answers, found.sequences_scores.tolist()


def assert_same(reference, outputs, asked, prompts=PROMPTS):
    for output, prompt in zip(outputs, prompts, strict=True):
        tokens, scores = transformers_answer(reference, prompt, asked)
        assert [each.token_ids for each in output.outputs] == tokens
        judged = [
            each.cumulative_logprob / len(each.token_ids) ** asked.length_penalty
            for each in output.outputs
        ]
        assert judged == pytest.approx(scores, abs=1e-4, rel=1e-5)
        for each in output.outputs:
            stopped = each.token_ids[-1] in asked.stop_token_ids
            assert each.finish_reason == ("stop" if stopped else "length")


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7, 2.5])
def test_sequences_and_scores_are_transformers(loaded, reference, early_stopping, length_penalty):
    asked = params(3, early_stopping=early_stopping, length_penalty=length_penalty)
    llm = LLM(loaded, num_blocks=128, block_size=4)
    outputs = llm.generate(PROMPTS, asked)
    assert_same(reference, outputs, asked)
    ends = [each.finish_reason for output in outputs for each in output.outputs]
    assert "stop" in ends
    assert llm.scheduler.stats().blocks_held == 0


@pytest.mark.parametrize("width", [2, 5, 8])
def test_any_width_and_fewer_answers_than_beams(loaded, reference, width):
    asked = params(width, n=(width + 1) // 2)
    llm = LLM(loaded, num_blocks=256, block_size=4)
    assert_same(reference, llm.generate(PROMPTS, asked), asked)


def test_without_stop_tokens_all_go_to_their_length(loaded, reference):
    asked = params(4, stop_token_ids=())
    outputs = LLM(loaded, num_blocks=128, block_size=4).generate(PROMPTS, asked)
    assert_same(reference, outputs, asked)
    assert {len(each.token_ids) for output in outputs for each in output.outputs} == {14}


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("granularity", ["sequence", "layer"])
def test_preemption_chunks_and_neighbours_change_nothing(loaded, reference, caching, granularity):
    asked = params(4, max_tokens=20)
    llm = LLM(
        loaded,
        num_blocks=24 * (loaded.geometry.num_layers if granularity == "layer" else 1),
        block_size=4,
        max_num_batched_tokens=7,
        enable_prefix_caching=caching,
        granularity=granularity,
    )
    others = [replace(asked, beam_width=None, n=1, seed=1, stop_token_ids=())] * 2
    found = llm.generate([*PROMPTS, *PROMPTS[:2]], [asked] * 5 + others)
    assert llm.scheduler.stats().num_preemptions > 3
    assert_same(reference, found[:5], asked)
    alone = LLM(loaded, num_blocks=128, block_size=4).generate(PROMPTS[:2], others)
    assert [o.token_ids for o in found[5:]] == [o.token_ids for o in alone]


def test_beams_share_what_they_have_in_common(loaded):
    prompt, width = ragged(1, longest=2, shared=200)[0], 6
    llm = LLM(loaded, num_blocks=256, block_size=4)
    scheduler, most = llm.scheduler, 0
    schedule = scheduler.schedule

    def watched():
        nonlocal most
        plan = schedule()
        most = max(most, scheduler.stats().blocks_held)
        return plan

    scheduler.schedule = watched
    llm.generate([prompt], params(width, max_tokens=8, stop_token_ids=()))
    assert most <= len(prompt) // 4 + width * 3
    assert scheduler.stats().tokens_moved == 0


def test_a_stream_yields_a_search_once_it_is_over(loaded):
    llm = LLM(loaded, num_blocks=64, block_size=4)
    asked = params(3)
    streamed = list(llm.stream(PROMPTS[:2], asked))
    assert all(output.finished for output in streamed)
    whole = llm.generate(PROMPTS[:2], asked)
    texts = {output.prompt_token_ids[0]: output.outputs for output in streamed}
    for output in whole:
        for one, other in zip(texts[output.prompt_token_ids[0]], output.outputs, strict=True):
            assert (one.text, one.token_ids) == (other.text, other.token_ids)


@pytest.mark.parametrize(
    "eviction",
    ["sinks=4 + recent=8 + budget=16", "sinks=4 + recent=4 + heavy=12:lift + unit=token"],
)
def test_what_beams_forget_follows_them(loaded, eviction):
    """In a roomy pool and in one that is too small the same sequences are found."""
    asked, prompts = params(3, max_tokens=30, stop_token_ids=()), PROMPTS[:4]
    roomy = LLM(loaded, num_blocks=256, block_size=4)
    tight = LLM(loaded, num_blocks=26, block_size=4, max_num_batched_tokens=16)
    expected = roomy.generate(prompts, asked, eviction=eviction)
    found = tight.generate(prompts, asked, eviction=eviction)
    assert tight.scheduler.stats().num_preemptions > 0
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert a.token_ids == b.token_ids
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
            assert a.num_evicted_tokens == b.num_evicted_tokens > 0
            assert a.forfeited_mass == pytest.approx(b.forfeited_mass, abs=1e-4)


@pytest.mark.parametrize("eviction", ["random + budget=16", "recent=4 + score=last + budget=12"])
@pytest.mark.parametrize("unit", ["block", "token"])
def test_beams_that_are_pushed_back_when_they_have_just_parted_lose_nothing(loaded, eviction, unit):
    """Then what they share is all that they had computed, and nothing is left to replay."""
    asked = params(3, max_tokens=12, stop_token_ids=())

    def found(discarded):
        llm = LLM(loaded, num_blocks=256, block_size=1)

        def discard(plan, *_):
            if plan.step == discarded:
                llm.scheduler.discard(llm.scheduler.schedule())

        llm.engine.observers.append(discard)
        policy = f"{eviction} + unit={unit} + chunk=16"
        (output,) = llm.generate([PROMPTS[0] * 2], asked, eviction=policy)
        return output.outputs

    expected = found(-1)
    for step in range(2, 12):
        for one, other in zip(found(step), expected, strict=True):
            assert one.num_preemptions == 1
            assert one.token_ids == other.token_ids
            assert one.num_evicted_tokens == other.num_evicted_tokens > 0
            assert one.forfeited_mass == pytest.approx(other.forfeited_mass, abs=1e-4)
