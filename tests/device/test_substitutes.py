"""What native code does in a model's place: the same numbers, only where they are the same."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_part
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pagedkv.device.cpu import linear, rowwise
from pagedkv.device.models import load_model
from pagedkv.device.substitutes import linear as product
from pagedkv.device.substitutes import rotation, substitute
from tests.device.reference import reference_logits, reference_model

ROTATED = ("tiny-random", "tiny-random-qwen2", "tiny-random-qwen3", "tiny-random-mistral")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [16, 40, 64, 70])
@pytest.mark.parametrize("tokens", [1, 5, 1500])
def test_rotations_are_bit_for_bit_those_of_the_model(dim, tokens):
    query = noise(1, tokens, 9, dim).transpose(1, 2)
    key = noise(1, 3, tokens, dim, seed=1)
    for width, theirs in ((dim, apply_rotary_pos_emb), (dim // 2 // 2 * 2, rotate_part)):
        angles = noise(1, tokens, width, seed=2), noise(1, tokens, width, seed=3)
        expected = theirs(query, key, *angles)
        for turned in (rowwise.rotate(query, key, *angles), rotation(theirs)(query, key, *angles)):
            assert all(map(torch.equal, expected, turned))


def test_what_native_code_does_not_take_is_rotated_all_the_same():
    def angles(*shape):
        return noise(*shape, seed=2), noise(*shape, seed=3)

    query, key = noise(1, 3, 9, 64), noise(1, 3, 64, 9, seed=1).transpose(2, 3)
    cases = [
        (query, key, *(each[..., ::2] for each in angles(1, 9, 128))),
        (query, key.contiguous(), *angles(1, 1, 64)),
        (noise(2, 3, 9, 64), noise(2, 3, 9, 64, seed=1), *angles(1, 9, 64)),
        (noise(2, 3, 9, 64), noise(2, 3, 9, 64, seed=1), *angles(2, 9, 64)),
        (query, key.contiguous().double(), *angles(1, 9, 64)),
    ]
    for case in cases:
        found = rotation(apply_rotary_pos_emb)(*case)
        assert all(map(torch.equal, apply_rotary_pos_emb(*case), found))


@pytest.mark.parametrize("size", [7, 16, 576])
@pytest.mark.parametrize("rows", [1, 700])
def test_norms_are_those_of_the_model(size, rows):
    norm = LlamaRMSNorm(size, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(noise(size))
    x = 30 * noise(2, rows, size)
    ours = rowwise.rms_norm(x, norm.weight, 1e-5)
    torch.testing.assert_close(ours, norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [7, 16, 1536])
def test_gates_are_those_of_torch(size):
    gate, up = 30 * noise(2, 5, size), noise(2, 5, size, seed=1)
    gate[0, 0, :5] = torch.tensor([0.0, -200.0, 200.0, torch.inf, torch.nan])
    expected = nn.functional.silu(gate) * up
    ours = rowwise.silu_gate(gate, up)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert torch.equal(rowwise.silu_gate(gate[1, 3], up[1, 3]), ours[1, 3])


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_that_share_the_rows_change_no_bit(threads):
    """Of prompts, long enough for several shares, and the last of them short."""
    gate, up = noise(1, 1111, 210), noise(1, 1111, 210, seed=1)
    query, key = gate.view(1, 1111, 5, 42).transpose(1, 2), up.view(1, 1111, 5, 42).transpose(1, 2)
    angles = noise(1, 1111, 30, seed=2), noise(1, 1111, 30, seed=3)

    def found():
        turned = rowwise.rotate(query, key, *angles)
        return [rowwise.silu_gate(gate, up), rowwise.rms_norm(gate, up[0, 0], 1e-5), *turned]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = found()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, found(), alone))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("activation", "replaced"), [("silu", True), ("gelu", False)])
def test_a_gate_is_known_by_what_it_computes_whatever_its_weights(activation, replaced):
    loaded = load_model("tiny-random", dtype="bfloat16")
    model = loaded.model.float()
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN[activation]
        for parameter in layer.mlp.parameters():
            parameter.data.zero_()
    substitute(model, loaded.geometry)
    assert all(("forward" in vars(layer.mlp)) == replaced for layer in model.model.layers)


@pytest.mark.parametrize("tokens", [1, 6, 3000])
def test_a_replaced_gate_answers_as_before(tokens):
    mlp = load_model("tiny-random").model.model.layers[0].mlp
    x = noise(1, tokens, 192)
    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ROTATED)
def test_models_that_norm_and_rotate_so_have_both_replaced(architecture):
    model = load_model(architecture).model
    norms = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    attentions = [layer.self_attn for layer in model.model.layers]
    assert norms
    assert all("forward" in vars(each) for each in [*norms, *attentions])
    name, own = "apply_rotary_pos_emb", attentions[0].forward.__func__.__globals__
    assert own[name] is not type(attentions[0]).forward.__globals__[name]


def test_a_model_that_is_moved_later_goes_back_to_its_own():
    plain = load_model("tiny-random", dtype="bfloat16")
    moved = load_model("tiny-random")
    for parameter in moved.model.parameters():  # not the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    tokens = [5, 6, 7, 8]
    expected = reference_logits(reference_model(plain), tokens)
    moved.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(reference_logits(moved.model, tokens), expected)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("tiny-random-gpt2", "float32"), ("tiny-random", "bfloat16")]
)
def test_other_models_and_dtypes_stay_as_they_are(monkeypatch, architecture, dtype):
    monkeypatch.setattr(linear, "MOST_PLAIN_ROWS", 0)
    model = load_model(architecture, dtype=dtype).model
    assert not any("forward" in vars(each) for each in model.modules())


@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 33, 128, 129, 700])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 6), (192, 96), (576, 100), (48, 49), (32, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_torch_and_do_not_depend_on_other_rows(
    monkeypatch, tokens, inputs, outputs, bias
):
    monkeypatch.setattr(linear, "MOST_PLAIN_ROWS", 128)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    rows = noise(1, inputs, tokens, seed=tokens).transpose(1, 2)
    found = product(layer, rows)
    expected = nn.functional.linear(rows.double(), *(p.double() for p in layer.parameters()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    if 0 < tokens <= 128 and outputs > 5:
        assert torch.equal(product(layer, rows[0, tokens // 2]), found[0, tokens // 2])


@pytest.mark.parametrize("change", ["inputs", "columns", "double", "gradient"])
def test_what_native_products_do_not_take_is_multiplied_all_the_same(monkeypatch, change):
    monkeypatch.setattr(linear, "MOST_PLAIN_ROWS", 128)
    layer = nn.Linear(15 if change == "inputs" else 16, 8).requires_grad_(False)
    rows = noise(3, layer.in_features)
    if change == "columns":
        layer.weight.data = layer.weight.data.t().contiguous().t()
    elif change == "double":
        layer, rows = layer.double(), rows.double()
    elif change == "gradient":
        rows.requires_grad_()
    assert torch.equal(product(layer, rows), nn.functional.linear(rows, layer.weight, layer.bias))


def test_what_computes_something_else_is_left_alone(monkeypatch):
    """Gemma's norm adds 1 to its weight; GLM pairs neighbours."""
    loaded = load_model("tiny-random", dtype="bfloat16")
    model = loaded.model.float()
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setitem(attention.forward.__globals__, "apply_rotary_pos_emb", rotate_interleaved)
    model.model.norm = GemmaRMSNorm(192).requires_grad_(False)
    model.model.layers[1].input_layernorm = nn.RMSNorm(192, eps=1e-6).requires_grad_(False)
    substitute(model, loaded.geometry)
    first, second = model.model.layers[:2]
    assert "forward" not in vars(model.model.norm)
    assert "forward" not in vars(first.self_attn)
    assert "forward" in vars(first.input_layernorm)
    assert "forward" in vars(second.input_layernorm)
