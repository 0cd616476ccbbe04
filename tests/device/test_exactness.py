"""Whatever the batch, outputs are transformers' own: logits to 1e-4, the same greedy tokens."""

import itertools

import numpy as np
import pytest
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.device.models import load_model
from tests.device.reference import reference_logits, reference_model

ARCHITECTURES = (
    "tiny-random",
    "tiny-random-qwen2",
    "tiny-random-qwen3",
    "tiny-random-mistral",
    "tiny-random-mistral-window",
    "tiny-random-gpt2",
    "tiny-random-gpt_neox",
)
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def watched(llm):
    """Keep the logits of every draw, by sequence and number of known tokens."""
    executor, table, seen = llm.engine.executor, llm.scheduler.table, {}
    forward = executor.forward

    def forward_and_keep(plan):
        logits, observed = forward(plan)
        for row, drawn in zip(plan.sample_rows.tolist(), logits, strict=True):
            seen[int(table.seq_id[row]), int(table.num_known[row])] = drawn.clone()
        return logits, observed

    executor.forward = forward_and_keep
    return seen


def agree(llm, seen, outputs, *, greedy=True):
    """Every logit drawn from is that of one plain forward over the sequence's tokens."""
    reference = reference_model(llm.model)
    seq_ids = itertools.count()
    for output in outputs:
        for completion in output.outputs:
            seq_id, known = next(seq_ids), output.prompt_token_ids + completion.token_ids
            truth = reference_logits(reference, known)
            for at in range(len(output.prompt_token_ids), len(known)):
                drawn = seen[seq_id, at]
                torch.testing.assert_close(drawn, truth[at - 1], atol=1e-4, rtol=0)
                if greedy:
                    assert known[at] == int(truth[at - 1].argmax())


def ragged(count, *, longest=60, shared=0, seed=0, vocab=256):
    rng = np.random.default_rng(seed)
    system = rng.integers(0, vocab, shared).tolist()
    lengths = rng.integers(1, longest, count)
    return [system + rng.integers(0, vocab, length).tolist() for length in lengths]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_requests_in_a_pool_that_preempts_all_the_time(architecture):
    num_blocks = 12 if architecture.endswith("window") else 22  # windows give blocks back
    llm = LLM(
        architecture,
        block_size=8,
        num_blocks=num_blocks,
        max_num_seqs=6,
        max_num_batched_tokens=48,
    )
    seen = watched(llm)
    prompts = ragged(8)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20, **GREEDY))
    assert llm.scheduler.stats().num_preemptions > 0
    agree(llm, seen, outputs)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
@pytest.mark.parametrize("budget", [11, 64, 2048])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_chunks_blocks_prefixes_and_forks_together(block_size, budget, prefix_caching):
    llm = LLM(
        "tiny-random",
        block_size=block_size,
        num_blocks=-(-420 // block_size),
        max_num_seqs=5,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
    )
    seen = watched(llm)
    params = [SamplingParams(max_tokens=12, n=1 + i % 3, **GREEDY) for i in range(6)]
    outputs = llm.generate(ragged(6, shared=33), params)
    assert (llm.scheduler.stats().prompt_tokens_cached > 0) <= prefix_caching
    agree(llm, seen, outputs)


def test_a_long_prefill_leaves_the_tokens_of_others_as_they_are():
    llm = LLM("tiny-random", block_size=16, num_blocks=64, max_num_batched_tokens=40)
    seen = watched(llm)
    prompts = [*ragged(3, longest=10), *ragged(1, longest=2, shared=300)]
    agree(llm, seen, llm.generate(prompts, SamplingParams(max_tokens=16, **GREEDY)))


def test_aborts_in_the_middle_change_nothing_for_the_rest():
    llm = LLM("tiny-random", block_size=8, num_blocks=26, max_num_seqs=6)
    seen = watched(llm)
    prompts = ragged(9)
    params = SamplingParams(max_tokens=20, **GREEDY)
    outputs, aborted = {}, {"1", "4", "7"}
    for step, partial in enumerate(llm.stream(prompts, params)):
        if partial.request_id in aborted and len(partial.token_ids) == 5 and not partial.finished:
            llm.abort(partial.request_id)
        outputs[partial.request_id] = partial
        assert step < 1000
    assert {key for key, output in outputs.items() if output.finish_reason == "abort"} == aborted
    order = [outputs[str(i)] for i in range(len(prompts))]
    assert all(len(output.token_ids) == 20 for output in order if output.request_id not in aborted)
    agree(llm, seen, order)


def test_seeded_sampling_draws_the_same_whatever_else_is_in_the_batch():
    prompts = ragged(6, shared=20)
    params = [
        SamplingParams(
            max_tokens=15, seed=7 + i, temperature=0.5 + 0.2 * i, top_p=0.9, top_k=40, n=1 + i % 2
        )
        for i in range(6)
    ]
    crowded = LLM("tiny-random", block_size=8, num_blocks=40, max_num_batched_tokens=33)
    together = crowded.generate(prompts, params)
    assert crowded.scheduler.stats().num_preemptions > 0
    alone = LLM("tiny-random", block_size=16, num_blocks=64, enable_prefix_caching=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (single,) = alone.generate([prompt], one)
        assert [c.token_ids for c in single.outputs] == [c.token_ids for c in output.outputs]


def test_forks_draw_apart_and_the_first_draws_as_if_alone():
    llm = LLM("tiny-random", block_size=8, num_blocks=64)
    (output,) = llm.generate([ragged(1)[0]], SamplingParams(n=4, seed=3, max_tokens=12))
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    (single,) = llm.generate([ragged(1)[0]], SamplingParams(seed=3, max_tokens=12))
    assert single.token_ids == output.token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_is_close(dtype):
    loaded = load_model("tiny-random")
    llm = LLM("tiny-random", dtype=dtype, block_size=16, num_blocks=64)
    seen = watched(llm)
    (output,) = llm.generate([ragged(1)[0]], SamplingParams(max_tokens=4, **GREEDY))
    truth = reference_logits(reference_model(loaded), output.prompt_token_ids)
    drawn = seen[0, len(output.prompt_token_ids)]
    spread = float(truth[-1].std())
    assert float((drawn.float() - truth[-1]).abs().max()) < 0.15 * spread
