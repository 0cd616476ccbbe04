"""Counted work against torch's own counter on the models' reference runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pagedkv import EngineConfig, Request, SamplingParams
from pagedkv.config import with_fields
from pagedkv.device.assembly import assemble
from pagedkv.device.meter import Meter, Work, run_without_cache
from pagedkv.device.models import load_model
from tests.device.reference import reference_model

MODELS = (
    "tiny-random-gpt2",
    "tiny-random-llama",
    "tiny-random-qwen3",
    "tiny-random-mistral-window",
    "tiny-random-gpt_neox",
)
TEXT = [5, 17, 80, 3, 200, 41, 9, 77, 12, 33, 140]


@pytest.fixture(scope="module")
def models():
    return {name: load_model(name, progress=False) for name in MODELS}


def engine_for(loaded, **fields):
    config = with_fields(EngineConfig(), **({"block_size": 4, "num_blocks": 64} | fields))
    engine = assemble(loaded, config)
    engine.executor = Meter(engine.executor)
    return engine


def serve(loaded, *prompts, max_tokens=4, n=1, **fields):
    """Return the work of each step."""
    engine = engine_for(loaded, **fields)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, n=n)
    for i, prompt in enumerate(prompts):
        request = Request(request_id=str(i), prompt_token_ids=prompt, sampling=params)
        engine.scheduler.add(request)
    for _ in engine.run():
        pass
    return engine.executor.steps


def reference_flops(loaded, token_ids, past=None):
    """What torch counts in an eager run: products in linear layers, and those in attention."""
    model = reference_model(loaded, "eager")
    known = 0 if past is None else past.get_seq_length()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.tensor([token_ids[known:]]),
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=1,
        )
    counts = counter.get_flop_counts()
    total = sum(counts["Global"].values())
    attention = sum(
        flops.get(torch.ops.aten.bmm, 0)
        for name, flops in counts.items()
        if name.endswith(("attn", "attention"))
    )
    # transformers makes rotary angles with a product whose inner width is 1; not counted here.
    rotary = sum(sum(flops.values()) for name, flops in counts.items() if "rotary_emb" in name)
    return total - attention - rotary, attention


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_prompt_costs_what_torch_counts(models, name):
    loaded = models[name]
    _, work = run_without_cache(loaded, TEXT)
    linear, attention = reference_flops(loaded, TEXT)
    assert work.projections + work.mlp + work.head == linear
    # An eager run computes the whole square of scores, a causal model needs its lower half.
    length = len(TEXT)
    assert work.attention * 2 * length == attention * (length + 1)
    assert work.tokens == length


@pytest.mark.parametrize("name", MODELS[:2])
def test_a_decode_step_costs_what_torch_counts_with_a_cache(models, name):
    from transformers import DynamicCache

    loaded = models[name]
    steps = serve(loaded, TEXT, max_tokens=2)
    past = DynamicCache()
    reference_flops(loaded, TEXT, past)
    linear, attention = reference_flops(loaded, [*TEXT, 7], past)
    assert steps[1].tokens == 1
    assert steps[1].projections + steps[1].mlp + steps[1].head == linear
    assert steps[1].attention == attention


def test_parts_are_told_apart(models):
    loaded = models["tiny-random-gpt2"]
    config = loaded.model.config
    width, layers, vocab = config.n_embd, config.n_layer, config.vocab_size
    _, work = run_without_cache(loaded, TEXT)
    assert work.projections == 2 * len(TEXT) * layers * 4 * width**2
    assert work.mlp == 2 * len(TEXT) * layers * 8 * width**2
    assert work.head == 2 * width * vocab
    assert work.flops == work.projections + work.attention + work.mlp + work.head


@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_attention_work_does_not_depend_on_how_a_prompt_is_cut(models, chunk):
    loaded = models["tiny-random-mistral-window"]
    prompt = (TEXT * 6)[:50]  # longer than the window of 32
    whole = serve(loaded, prompt)
    cut = serve(loaded, prompt, max_num_batched_tokens=chunk)
    assert len(cut) >= len(whole)
    total, expected = sum(cut, Work()), sum(whole, Work())
    for part in ("tokens", "projections", "attention", "mlp", "head", "kv_written", "handed_on"):
        assert getattr(total, part) == getattr(expected, part), part
    assert (total.weights_read > expected.weights_read) == (chunk < 50)
    assert (total.kv_read > expected.kv_read) == (chunk < 50)


def test_a_window_bounds_what_is_read(models):
    loaded = models["tiny-random-mistral-window"]
    geometry = loaded.geometry
    per_token = geometry.kv_elements_per_token * 4
    steps = serve(loaded, (TEXT * 6)[:50], max_tokens=3)
    assert steps[0].kv_read == 50 * per_token  # every key is seen by some query of the prompt
    assert steps[1].kv_read == 32 * per_token
    assert steps[1].kv_written == per_token


def test_bytes_are_those_of_the_tensors(models):
    loaded = models["tiny-random-llama"]
    parameters = dict(loaded.model.named_parameters())
    embedding = parameters.pop("model.embed_tokens.weight")
    steps = serve(loaded, TEXT, max_tokens=3)
    rows = embedding[0].nbytes
    matrices = sum(p.nbytes for p in parameters.values())
    assert steps[0].weights_read == matrices + len(TEXT) * rows
    assert steps[1].weights_read == matrices + rows
    per_token = loaded.geometry.kv_elements_per_token * 4
    assert [step.kv_read // per_token for step in steps] == [11, 12, 13]
    assert [step.kv_written // per_token for step in steps] == [11, 1, 1]
    width = loaded.model.config.hidden_size
    assert steps[0].handed_on == len(TEXT) * width * 4 * loaded.geometry.num_layers


def test_a_batch_reads_weights_once_and_every_context(models):
    loaded = models["tiny-random-llama"]
    alone = [serve(loaded, prompt, max_tokens=2)[1] for prompt in (TEXT, TEXT[:5])]
    together = serve(loaded, TEXT, TEXT[:5], max_tokens=2)[1]
    for part in ("tokens", "projections", "attention", "mlp", "head", "kv_read", "kv_written"):
        assert getattr(together, part) == sum(getattr(work, part) for work in alone), part
    embedded = loaded.model.config.hidden_size * 4
    assert together.weights_read == alone[0].weights_read + embedded


def test_metering_changes_no_token_and_leaves_no_hook(models):
    loaded = models["tiny-random-gpt2"]
    tokens = []
    for metered in (False, True):
        engine = engine_for(loaded)
        if not metered:
            engine = assemble(loaded, engine.scheduler.config)
        params = SamplingParams(temperature=0, max_tokens=8, n=2, seed=3)
        engine.scheduler.add(Request(request_id="0", prompt_token_ids=TEXT, sampling=params))
        tokens.append([e.token_ids for _, _, out in engine.run() for e in out.finished])
    assert tokens[0] == tokens[1]
    modules = list(loaded.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_without_a_cache_the_next_token_is_the_same(models):
    loaded = models["tiny-random-llama"]
    engine = engine_for(loaded)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.scheduler.add(Request(request_id="0", prompt_token_ids=TEXT, sampling=params))
    known = list(TEXT)
    for _, result, _ in engine.run():
        anew, work = run_without_cache(loaded, known)
        np.testing.assert_array_equal(anew.token_ids, result.token_ids)
        assert work.tokens == len(known)
        assert work.kv_written == work.kv_read
        known += result.token_ids.tolist()
    assert len(known) == len(TEXT) + 6


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_groups_of_any_size_do_the_same_work(models, granularity):
    loaded = models["tiny-random-llama"]
    whole = serve(loaded, TEXT, TEXT[:7])
    split = serve(loaded, TEXT, TEXT[:7], granularity=granularity, num_blocks=512)
    assert split == whole


def test_the_documented_table_is_what_the_shape_of_gpt2_asks_for():
    from benchmarks.kv_cache_cost import digits

    text = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    table = text.split("#### gpt2-small")[1].split("####")[0]
    rows = {
        cells[0]: cells[1:]
        for line in table.splitlines()
        if line.startswith("| ") and (cells := [cell.strip() for cell in line[2:-2].split(" | ")])
    }
    layers, width, vocab = 12, 768, 50257
    sides = [(length, tokens) for length in (16, 128, 1000) for tokens in (length, 1)]
    counted = {
        "queries, keys, values, output": [2 * t * layers * 4 * width**2 / 1e9 for _, t in sides],
        "attention over the context": [
            4 * layers * width * (n * (n + 1) // 2 if t > 1 else n) / 1e9 for n, t in sides
        ],
        "MLP": [2 * t * layers * 8 * width**2 / 1e9 for _, t in sides],
        "vocabulary": [2 * width * vocab / 1e9 for _ in sides],
        "keys and values read": [n * layers * 2 * width * 4 / 1e6 for n, _ in sides],
        "keys and values written": [t * layers * 2 * width * 4 / 1e6 for _, t in sides],
        "handed from layer to layer": [t * layers * width * 4 / 1e6 for _, t in sides],
    }
    for words, numbers in counted.items():
        assert rows[words] == [digits(number) for number in numbers], words


def test_the_cost_script_runs(models):
    from benchmarks.kv_cache_cost import measure, table

    lines = list(table("tiny", measure(models["tiny-random-gpt2"], [4, 9])))
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 13
    assert {line.count("|") for line in rows} == {6}
