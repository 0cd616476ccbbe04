"""`llm.score` is transformers' log_softmax without eviction, and the dense oracle's with it."""

import numpy as np
import pytest
import torch

from pagedkv import LLM, InvalidRequest, NeverFits, PolicyError, SamplingParams
from pagedkv.eviction import policy
from tests.device.eviction_oracle import Oracle, build_model, random_prompt
from tests.device.reference import reference_logits, reference_model

TOLERANCE = 1e-4
TINY = {"block_size": 8, "num_blocks": 64}
SHORT = "streaming + budget=16 + chunk=8"


def ragged(count=6, shared=0, vocab=256, seed=0):
    rng = np.random.default_rng(seed)
    head = rng.integers(0, vocab, shared).tolist()
    return [head + rng.integers(0, vocab, length).tolist() for length in rng.integers(2, 70, count)]


def agree(llm, outputs, sequences):
    """Every score is log_softmax of transformers' logits, and every greedy token their argmax."""
    reference = reference_model(llm.model)
    for output, tokens in zip(outputs, sequences, strict=True):
        assert output.token_ids == tokens
        truth = reference_logits(reference, tokens)[:-1].log_softmax(-1)
        own = truth[torch.arange(len(truth)), torch.tensor(tokens[1:])].numpy()
        np.testing.assert_allclose(output.logprobs, own, atol=TOLERANCE, rtol=0)
        best = truth[torch.arange(len(truth)), torch.from_numpy(output.greedy).long()]
        assert (truth.amax(-1) - best).max() < TOLERANCE
        assert output.perplexity == pytest.approx(np.exp(-own.mean()), rel=1e-3)


def test_a_ragged_batch_in_chunks_equals_log_softmax():
    llm = LLM("tiny-random", max_num_batched_tokens=37, **TINY)
    sequences = ragged()
    agree(llm, llm.score(sequences), sequences)


def preempting(llm):
    """Preempt whoever was admitted last after some of the steps."""
    scheduler = llm.scheduler

    def preempt(plan, result, output):
        if plan.step in (1, 4, 8) and len(scheduler.table.running):
            scheduler._roster.preempt(scheduler.table.sequences[scheduler.table.running[-1]])

    llm.engine.observers.append(preempt)


def test_preempted_in_the_middle_of_a_prompt():
    llm = LLM("tiny-random", max_num_batched_tokens=24, **TINY)
    sequences = ragged()
    preempting(llm)
    outputs = llm.score(sequences)
    agree(llm, outputs, sequences)
    assert sum(output.num_preemptions for output in outputs) > 1


def test_preempted_after_it_evicted():
    loaded = build_model("llama")
    tokens = random_prompt(70)
    small = {"block_size": 4, "num_blocks": 64, "max_num_batched_tokens": 8}
    preempted = LLM(loaded, **small)
    preempting(preempted)
    (truth,), (output,) = (
        llm.score(tokens, eviction=SHORT) for llm in (LLM(loaded, **small), preempted)
    )
    np.testing.assert_allclose(output.logprobs, truth.logprobs, atol=TOLERANCE, rtol=0)
    assert output.num_preemptions > 0
    assert output.num_evicted_tokens == truth.num_evicted_tokens > 0


def test_a_cached_prefix_is_computed_again_for_its_scores():
    llm = LLM("tiny-random", **TINY)
    sequences = ragged(4, shared=33)
    llm.generate(sequences[0], SamplingParams(max_tokens=2))
    agree(llm, llm.score(sequences), sequences)
    assert llm.scheduler.stats().prompt_tokens_cached == 0
    outputs = llm.generate(sequences, SamplingParams(max_tokens=2))
    assert all(output.num_cached_tokens >= 32 for output in outputs)


@pytest.mark.parametrize("granularity", ["sequence", "layer", "head"])
def test_under_eviction_scores_are_the_oracles(granularity):
    loaded = build_model("llama")
    prompts = [random_prompt(61, seed=5), random_prompt(50, seed=6)]
    small = {"block_size": 4, "num_blocks": 1024, "granularity": granularity}
    llm = LLM(loaded, max_num_batched_tokens=40, **small)
    for kind in ("cache", "original"):
        for name, text in {"streaming": "streaming", "h2o": "h2o", "peak": "peak"}.items():
            chosen = policy(text, budget=20, chunk=8, positions=kind)
            for output, tokens in zip(llm.score(prompts, eviction=chosen), prompts, strict=True):
                oracle = Oracle(loaded, chosen, 4, len(tokens), granularity)
                logits = torch.stack([oracle.feed([token]) for token in tokens])[:-1]
                truth = logits.log_softmax(-1)[torch.arange(len(logits)), torch.tensor(tokens[1:])]
                difference = np.abs(output.logprobs - truth.numpy()).max()
                assert difference < TOLERANCE, (name, kind)
                assert output.num_evicted_tokens == pytest.approx(oracle.num_evicted)
                assert output.num_evicted_tokens > 0
                assert output.forfeited_mass == pytest.approx(oracle.forfeited, abs=1e-4)


def test_eviction_changes_scores():
    """Or the test above would pass for an engine that never evicts."""
    llm = LLM(build_model("llama"), block_size=4, num_blocks=64)
    tokens = random_prompt(60)
    (full,), (short,) = llm.score(tokens), llm.score(tokens, eviction=SHORT)
    assert full.num_evicted_tokens == full.forfeited_mass == 0
    assert short.num_evicted_tokens > 0
    assert np.abs(full.logprobs - short.logprobs).max() > 0.01


def test_prompt_logprobs_have_the_likeliest_alternatives():
    llm = LLM("tiny-random", max_num_batched_tokens=16, **TINY)
    tokens = ragged(1)[0]
    params = [
        SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=k, n=n)
        for k, n in ((3, 1), (0, 2), (None, 1))
    ]
    many, none, unasked = llm.generate([tokens] * 3, params)
    truth = reference_logits(reference_model(llm.model), tokens).log_softmax(-1)
    assert unasked.prompt_logprobs is None
    for output, k in ((many, 3), (none, 0)):
        assert len(output.prompt_logprobs) == len(tokens)
        assert output.prompt_logprobs[0] is None
        for i, entries in enumerate(output.prompt_logprobs[1:]):
            assert next(iter(entries)) == tokens[i + 1]
            ranked = {entry.rank: token for token, entry in entries.items() if entry.rank}
            top = truth[i].topk(3)
            assert [ranked[rank + 1] for rank in range(k)] == top.indices[:k].tolist()
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(float(truth[i, token]), abs=TOLERANCE)


def test_what_cannot_be_scored_is_refused_and_nothing_runs():
    llm = LLM("tiny-random", **TINY)
    for wrong in ([5], [[1, 2], [3]], [[1, 2], []]):
        with pytest.raises(InvalidRequest, match="two tokens"):
            llm.score(wrong)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.score([1, 2, 10**6])
    with pytest.raises(NeverFits):
        llm.score([1] * 600)
    with pytest.raises(PolicyError):
        llm.score([1, 2], eviction="strreaming")
    assert llm.score([]) == []
    assert not llm.scheduler.has_unfinished()


def test_arrays_are_one_sequence():
    llm = LLM("tiny-random", **TINY)
    tokens = np.array(ragged(1)[0], np.int32)
    agree(llm, llm.score(tokens), [tokens.tolist()])
