"""Layers in two native calls: the bits that their modules compute, or none at all."""

import copy
import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig
from transformers.activations import ACT2FN

from pagedkv import LLM, SamplingParams, UnsupportedBackend
from pagedkv.device.bridge import ATTENTION_NAME, forward, register
from pagedkv.device.cpu import kernel, linear
from pagedkv.device.cpu.rowwise import put_rows
from pagedkv.device.layers import _Made, _Native
from pagedkv.device.models import _examined, load_model
from pagedkv.device.packing import pack_weights
from tests.device.reference import kept_logits

ARCHITECTURES = ("tiny-random", "tiny-random-qwen2", "tiny-random-qwen3", "tiny-random-mistral")
PROMPTS = [[5, 6, 7], list(range(40)), [9] * 17]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def odd(kind=LlamaConfig, intermediate_size=100, **fields):
    """A model with biases and sizes that are no whole panels; weights are noise."""
    config = kind(
        hidden_size=80,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        attention_bias=True,
        mlp_bias=True,
        **fields,
    )
    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    model.eval().requires_grad_(False)
    for seed, parameter in enumerate(model.parameters()):
        parameter.copy_(noise(*parameter.shape, seed=seed) / 8)
    return model


def examined(model, weights="packed"):
    """Its layers, with whatever native code takes over."""
    if weights == "packed":
        pack_weights(model, "all", "odd")
    return _examined(model, None, "odd").model.model.layers


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """Have plain weights multiplied natively whatever the processor."""
    monkeypatch.setattr(linear, "MOST_PLAIN_ROWS", 128)


def layers_of(name, weights="packed"):
    if name == "odd":  # plain weights are taken by whole vectors of inputs
        return examined(odd(intermediate_size=100 if weights == "packed" else 112), weights)
    which = {"packed": "all", "plain": "none"}[weights]
    return load_model(name, pack_weights=which).model.model.layers


def asked(layer, tokens, seed=0):
    attention = layer.self_attn
    hidden = noise(1, tokens, attention.q_proj.in_features, seed=seed)
    angles = noise(1, tokens, attention.head_dim, seed=1), noise(1, tokens, attention.head_dim)
    return hidden, {"position_embeddings": angles, ATTENTION_NAME: _Made()}


def by_modules(layer, hidden, extra):
    return type(layer).forward(layer, hidden, **extra)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "odd"])
@pytest.mark.parametrize("weights", ["packed", "plain"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 13, 129])
def test_a_layer_gives_the_bits_that_its_modules_give(name, weights, tokens):
    for layer in layers_of(name, weights):
        assert "forward" in vars(layer)
        hidden, extra = asked(layer, tokens)
        expected = by_modules(layer, hidden, extra)
        assert torch.equal(layer(hidden, **extra), expected)


@pytest.mark.parametrize("weights", ["packed", "plain"])
def test_any_number_of_threads_gives_the_same_bits(weights):
    layer = layers_of("odd", weights)[0]
    hidden, extra = asked(layer, 13)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(layer(hidden, **extra))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("which", ["all", "lm_head", "none"])
def test_a_served_model_computes_the_same_logits_with_and_without(which):
    def logits(native):
        loaded = load_model("tiny-random", pack_weights=which)
        for layer in () if native else loaded.model.model.layers:
            del layer.forward
        llm = LLM(loaded, block_size=8, num_blocks=64)
        kept = kept_logits(llm)
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        return kept

    assert all(map(torch.equal, logits(True), logits(False)))


class _Asked:
    """An attention that keeps nothing and can be told what to do when it is asked."""

    def __init__(self, then=lambda layer_idx: None):
        self.attend_made, self.then = _Made().attend, then

    def attend(self, layer_idx, query, *others):
        self.then(layer_idx)
        return self.attend_made(layer_idx, query, *others)


def logits_of(loaded, step=None):
    ids = torch.arange(5)
    return forward(loaded, ids, ids, step or _Asked(), ids)


def test_a_forward_looks_at_each_layer_once_and_calls_none_of_its_modules(monkeypatch):
    loaded, looked = load_model("tiny-random", pack_weights="all"), Counter()
    expected = logits_of(loaded)
    is_unchanged = _Native.is_unchanged

    def counted(native):
        looked[native.attention.layer_idx] += 1
        return is_unchanged(native)

    def never(*args, **kwargs):
        raise AssertionError("a module was called")

    monkeypatch.setattr(_Native, "is_unchanged", counted)
    for layer in loaded.model.model.layers:
        monkeypatch.setattr(type(layer), "forward", never)
    assert torch.equal(logits_of(loaded), expected)
    assert looked == dict.fromkeys(range(len(loaded.model.model.layers)), 1)


def test_every_forward_looks_anew():
    loaded = load_model("tiny-random", pack_weights="all")
    before = logits_of(loaded)
    last = loaded.model.model.layers[-1]
    double(last.input_layernorm, "weight")
    after = logits_of(loaded)
    assert not torch.allclose(before, after)
    del last.forward
    assert torch.equal(logits_of(loaded), after)


def test_what_a_hook_on_a_layer_changes_counts_at_once():
    loaded = load_model("tiny-random", pack_weights="all")
    first, last = loaded.model.model.layers[0], loaded.model.model.layers[-1]
    before = logits_of(loaded)
    first.register_forward_hook(lambda *call: double(last.input_layernorm, "weight"))
    assert not torch.allclose(logits_of(loaded), before)


def test_a_copy_of_a_model_calls_its_modules():
    loaded = load_model("tiny-random", pack_weights="all")
    other = replace(loaded, model=copy.deepcopy(loaded.model))
    assert torch.equal(logits_of(other), logits_of(loaded))
    double(loaded.model.model.layers[0].input_layernorm, "weight")
    assert not torch.allclose(logits_of(other), logits_of(loaded))


@pytest.mark.parametrize("beyond", [{"attention_mask": torch.ones(5, 5)}, {"softcap": 3.0}])
def test_what_our_attention_refuses_is_refused(beyond):
    layer = layers_of("tiny-random")[0]
    hidden, extra = asked(layer, 5)
    with pytest.raises(UnsupportedBackend, match=next(iter(beyond))):
        layer(hidden, **extra, **beyond)


def test_an_attention_that_sees_what_follows_is_refused():
    layer = layers_of("tiny-random")[0]
    hidden, extra = asked(layer, 5)
    layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedBackend, match="is_causal"):
        layer(hidden, **extra)


@pytest.mark.parametrize("change", ["gate", "residual", "norm"])
@pytest.mark.parametrize("scale", [1, 1e-4])
def test_a_layer_that_computes_something_else_is_left_alone(change, scale):
    """Small weights add little to the hidden states; what they add is looked at all the same."""
    model = odd(GraniteConfig, residual_multiplier=0.99) if change == "residual" else odd()
    for parameter in model.parameters():
        parameter.mul_(scale if parameter.dim() > 1 else 1)
    if change != "residual":
        for layer in model.model.layers:
            if change == "gate":
                layer.mlp.act_fn = ACT2FN["gelu"]
            else:
                layer.post_attention_layernorm = nn.LayerNorm(80).requires_grad_(False)
    assert not any("forward" in vars(layer) for layer in examined(model))


def test_where_torch_multiplies_a_layer_is_left_alone(monkeypatch):
    assert not any("forward" in vars(layer) for layer in examined(odd(), "plain"))
    monkeypatch.setattr(linear, "MOST_PLAIN_ROWS", 0)
    assert not any("forward" in vars(layer) for layer in layers_of("tiny-random", "plain"))


def test_without_openmp_modules_do_it_on_all_threads(monkeypatch):
    monkeypatch.setattr(kernel, "parallel_address", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not any("forward" in vars(layer) for layer in examined(odd()))


def test_a_module_that_is_exchanged_later_is_called():
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    layer = layers_of("tiny-random")[0]
    hidden, extra = asked(layer, 5)
    before = layer(hidden, **extra)
    layer.self_attn.o_proj = Twice(layer.self_attn.o_proj)
    after = layer(hidden, **extra)
    assert not torch.allclose(before, after)
    assert torch.equal(after, by_modules(layer, hidden, extra))


def double(module, name):
    module._parameters[name] = nn.Parameter(2 * module._parameters[name], requires_grad=False)


CHANGES = {
    "a norm's weight": lambda layer: double(layer.input_layernorm, "weight"),
    "a bias": lambda layer: double(layer.self_attn.v_proj, "bias"),
    "no bias": lambda layer: layer.self_attn.v_proj.register_parameter("bias", None),
    "a module's forward": lambda layer: setattr(layer.mlp, "forward", lambda x: 0 * x),
    "an inner module's forward": lambda layer: setattr(
        layer.self_attn.v_proj, "forward", lambda x: x.new_zeros(*x.shape[:2], 16)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("weights", ["packed", "plain"])
def test_what_is_changed_later_counts(change, weights):
    layer = layers_of("odd", weights)[0]
    hidden, extra = asked(layer, 5)
    before = layer(hidden, **extra)
    CHANGES[change](layer)
    after = layer(hidden, **extra)
    assert not torch.allclose(before, after)
    assert torch.equal(after, by_modules(layer, hidden, extra))


def test_several_rows_and_training_are_for_the_modules():
    layer = layers_of("odd")[0]
    _, extra = asked(layer, 5)
    with pytest.raises(UnsupportedBackend, match="2 rows of tokens"):
        layer(noise(2, 5, 80), **extra)
    layer.train()
    layer.self_attn.attention_dropout = 0.5
    with pytest.raises(UnsupportedBackend, match="dropout"):
        layer(noise(1, 5, 80), **extra)


def test_another_attention_is_asked_where_no_step_comes_along():
    plain, loaded = (load_model("tiny-random", pack_weights=which) for which in ("none", "all"))
    found = []
    for model in (plain.model, loaded.model):
        model.set_attn_implementation("sdpa")
        found.append(model(torch.tensor([[1, 2, 3]]), use_cache=False).logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_hooks_are_called():
    layer = layers_of("tiny-random")[0]
    hidden, extra = asked(layer, 5)
    expected, seen = layer(hidden, **extra), []
    handle = layer.mlp.up_proj.register_forward_hook(lambda *call: seen.append(call))
    assert torch.equal(layer(hidden, **extra), expected)
    handle.remove()
    assert torch.equal(layer(hidden, **extra), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("weights", ["packed", "plain"])
def test_weights_that_are_moved_later_are_read_where_they_are(weights):
    layer = layers_of("odd", weights)[0]
    hidden, extra = asked(layer, 5)
    before = layer(hidden, **extra)
    norm, bias = layer.input_layernorm.weight, layer.self_attn.v_proj.bias
    norm.data = 2 * norm.data
    scaled = layer(hidden, **extra)
    bias.data = 2 * bias.data
    moved = layer(hidden, **extra)
    assert not torch.allclose(before, scaled)
    assert not torch.allclose(scaled, moved)
    assert torch.equal(moved, by_modules(layer, hidden, extra))
    if weights == "plain":
        weight = layer.mlp.up_proj.weight
        weight.data = -weight.data
        turned = layer(hidden, **extra)
        assert not torch.allclose(turned, moved)
        assert torch.equal(turned, by_modules(layer, hidden, extra))


def test_a_copy_has_weights_of_its_own():
    layer = layers_of("odd")[0]
    hidden, extra = asked(layer, 5)
    expected = layer(hidden, **extra)
    other = copy.deepcopy(layer)
    layer.input_layernorm.weight.zero_()
    layer.self_attn.v_proj.bias.zero_()
    del layer
    gc.collect()
    assert torch.equal(other(hidden, **extra), expected)
    other.input_layernorm.weight.mul_(2)
    changed = other(hidden, **extra)
    assert not torch.allclose(changed, expected)
    assert torch.equal(changed, by_modules(other, hidden, extra))


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_vectors_are_put_where_index_copy_puts_them(tokens):
    key, value = noise(3, tokens, 20).transpose(0, 1), noise(tokens, 3, 20, seed=1)
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:tokens]
    pools = [torch.zeros(16, 60) for _ in range(4)]
    put_rows(key, value, *pools[:2], slots)
    for pool, fresh in zip(pools[2:], (key, value), strict=True):
        pool.index_copy_(0, slots, fresh.flatten(1))
    assert torch.equal(pools[0], pools[2])
    assert torch.equal(pools[1], pools[3])


@pytest.mark.parametrize("slot", [-1, 16])
def test_a_slot_outside_the_pool_is_an_error_and_nothing_is_written(slot):
    pools, vector = torch.zeros(2, 18, 60), noise(2, 3, 20)
    with pytest.raises(IndexError, match="outside the pool of 16"):
        put_rows(vector, vector, pools[0][1:17], pools[1][1:17], torch.tensor([3, slot]))
    assert not pools.any()
