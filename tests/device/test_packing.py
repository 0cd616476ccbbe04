"""Packed weights: the same logits and tokens, or a refusal."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagedkv import LLM, ConfigError, SamplingParams, UnsupportedBackend
from pagedkv.device.cpu import linear
from pagedkv.device.meter import Meter
from pagedkv.device.models import load_model
from pagedkv.device.packing import PackedLinear, pack_weights
from pagedkv.device.tiny import TINY_MODELS, tiny_config
from tests.device.reference import kept_logits

PROMPTS = [[5, 6, 7], list(range(40)), [9] * 17]


def run(model, **fields):
    """Serve the prompts; every step's logits and work, and all tokens."""
    llm = LLM(model, block_size=8, num_blocks=64, **fields)
    logits, meter = kept_logits(llm), Meter(llm.engine.executor)
    llm.engine.executor = meter
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, n=2)
    outputs = llm.generate(PROMPTS, params)
    return [[each.token_ids for each in one.outputs] for one in outputs], logits, meter.steps


def layers(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("model", TINY_MODELS)
def test_logits_tokens_and_counted_work_are_those_of_the_plain_model(model):
    tokens, logits, work = run(model)
    for which in ("lm_head", "all"):
        packed_tokens, packed_logits, packed_work = run(model, pack_weights=which)
        assert packed_tokens == tokens
        assert packed_work == work
        for plain, packed in zip(logits, packed_logits, strict=True):
            torch.testing.assert_close(packed, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("which", ["lm_head", "all"])
def test_the_model_keeps_its_weights_and_their_names(which):
    plain = load_model("tiny-random").model
    packed = load_model("tiny-random", pack_weights=which).model
    assert isinstance(packed.get_output_embeddings(), PackedLinear)
    assert which == "lm_head" or all(type(each) is PackedLinear for each in layers(packed))
    expected, found = plain.state_dict(), packed.state_dict()
    assert {name: (x.shape, x.dtype) for name, x in expected.items()} == {
        name: (x.shape, x.dtype) for name, x in found.items()
    }
    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.plain(), expected[f"{path}.weight"])
        else:
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 33, 700])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (192, 96), (576, 100), (40000, 49)])
def test_products_are_those_of_torch_and_do_not_depend_on_other_rows(tokens, inputs, outputs):
    generator = torch.Generator().manual_seed(tokens)
    plain = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    packed = PackedLinear(plain, shared=False)
    rows = torch.randn(2, inputs, tokens, generator=generator).transpose(1, 2)
    found = packed(rows)
    expected = torch.nn.functional.linear(rows.double(), plain.weight.double(), plain.bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    for i in {0, tokens // 2} if tokens else ():
        assert torch.equal(packed(rows[1, i]), found[1, i])


def tied():
    config = tiny_config("tiny-random")
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_a_tied_embedding_stays_tied_and_no_rows_are_fine():
    model = tied()
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens).logits
    pack_weights(model, "all", "tied")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)
    none = torch.tensor([], dtype=torch.int64)
    assert model(tokens, logits_to_keep=none).logits.shape == (1, 0, model.config.vocab_size)


def test_packing_does_not_go_by_torchs_default_dtype():
    model = tied()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pack_weights(model, "all", "tied")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(type(each) is PackedLinear for each in layers(model))


def test_a_product_that_is_wrong_is_refused(monkeypatch):
    model = tied()
    head = model.get_output_embeddings()
    monkeypatch.setattr(linear, "multiply", lambda rows, _, outputs: torch.ones(len(rows), outputs))
    with pytest.raises(UnsupportedBackend, match="is off by"):
        pack_weights(model, "lm_head", "tied")
    assert model.get_output_embeddings() is head


def test_a_head_that_is_no_linear_layer_is_refused():
    model = tied()
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(UnsupportedBackend, match="Identity"):
        pack_weights(model, "lm_head", "odd")


def test_a_loaded_model_is_not_packed_behind_its_owners_back():
    loaded = load_model("tiny-random")
    with pytest.raises(ConfigError, match="load_model"):
        LLM(loaded, pack_weights="all")
    assert not isinstance(loaded.model.get_output_embeddings(), PackedLinear)


def test_other_types_are_refused():
    with pytest.raises(UnsupportedBackend, match="bfloat16 on cpu; packing is for float32"):
        load_model("tiny-random", dtype="bfloat16", pack_weights="all")


def test_what_to_pack_is_one_of_three():
    with pytest.raises(ConfigError, match="none, lm_head, all"):
        load_model("tiny-random", pack_weights="some")


def test_what_is_packed_already_stays_so():
    model = load_model("tiny-random", pack_weights="lm_head").model
    head = model.get_output_embeddings()
    pack_weights(model, "all", "a model")
    assert model.get_output_embeddings() is head
    assert all(type(each) is PackedLinear for each in layers(model))
