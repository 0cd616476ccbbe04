"""Packed weights kept in bytes: the same bits as in fp32, or they are not kept so."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pagedkv.device.cpu import linear
from pagedkv.device.cpu.codes import encode
from pagedkv.device.packing import PackedLinear, pack_weights
from pagedkv.device.tiny import tiny_config

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


def quantised(weight, kind=Kind.Q4_1):
    """What a GGUF file's weights become in fp32; here the reference implementation says so."""
    packed = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


def normal(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / 20


def in_fp32(weight):
    """The panels of a weight that is in no format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "encode", lambda *_: None)
        return linear.pack(weight)


def bits(x):
    return x.view(torch.int32)


def assert_in_bytes(weight):
    """Packs in bytes and gives back the same bits."""
    panels = linear.pack(weight)
    assert panels.dtype == torch.int8
    assert torch.equal(bits(linear.unpack(panels, len(weight))), bits(weight))
    return panels


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 110),
    st.sampled_from([32, 64, 96, 128, 224, 576]),
    st.integers(0, 70),
    st.integers(0, 1000),
)
def test_products_are_bit_for_bit_those_of_fp32_panels(kind, outputs, inputs, tokens, seed):
    weight = quantised(normal(outputs, inputs, seed), kind)
    panels, plain = assert_in_bytes(weight), in_fp32(weight)
    assert plain.dtype == torch.float32
    rows = normal(tokens, inputs, seed + 1)
    found, expected = (linear.multiply(rows, each, outputs) for each in (panels, plain))
    assert torch.equal(bits(found), bits(expected))
    torch.testing.assert_close(found, rows @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_rows_in_several_chunks_and_many_panels(tokens):
    weight = quantised(normal(1000, 1536))
    panels, rows = assert_in_bytes(weight), normal(tokens, 1536, 1)
    found, expected = (linear.multiply(rows, each, 1000) for each in (panels, in_fp32(weight)))
    assert torch.equal(bits(found), bits(expected))


def test_a_byte_is_all_that_a_weight_takes_but_for_its_groups_scale_and_offset():
    columns = 2 * linear.COLUMNS
    panels = assert_in_bytes(quantised(normal(columns, 64)))
    assert panels.nbytes == columns * 64 + 2 * 4 * columns * 64 // 32


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_zeros_or_of_one_number(kind):
    weight = normal(50, 96)
    weight[3], weight[7, 32:64], weight[20, :32], weight[21, :32] = 0, 0, 0.25, -0.25
    assert_in_bytes(quantised(weight, kind))
    assert_in_bytes(torch.zeros(5, 32))


# Weights that differ from those of a format in one place: nothing near it will do.
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf"), -0.0, 0.0123, 1e30])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (60, 95)])
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0])
def test_one_weight_that_fits_no_format_leaves_all_of_them_in_fp32(kind, row, column, spoiled):
    weight = quantised(normal(61, 96), kind)
    assert_in_bytes(weight)
    weight[row, column] = spoiled
    panels = linear.pack(weight)
    assert panels.dtype == torch.float32
    assert torch.equal(bits(linear.unpack(panels, 61)), bits(weight))


def test_the_last_bit_of_a_weight_counts():
    weight = quantised(normal(61, 96))
    bits(weight)[33, 5] ^= 1
    assert linear.pack(weight).dtype == torch.float32


@pytest.mark.parametrize(
    "weight",
    [
        normal(48, 64),
        quantised(normal(48, 64))[:, :48],
        torch.full((48, 32), torch.nan),
        normal(48, 32) * 1e-38,
    ],
    ids=["ordinary", "part of a group", "nan", "subnormal"],
)
def test_what_is_in_no_format_stays_in_fp32(weight):
    assert linear.pack(weight).dtype == torch.float32
    assert encode(torch.zeros(0, 32), linear.COLUMNS) is None


def test_a_quantised_model_computes_the_same_bits_as_with_fp32_panels(monkeypatch):
    def model():
        config = tiny_config("tiny-random")
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for module in made.modules():
            if isinstance(module, torch.nn.Linear):
                head = module is made.get_output_embeddings()
                module.weight.copy_(quantised(module.weight, Kind.Q8_0 if head else Kind.Q4_1))
        return made

    plain, packed = model(), model()
    pack_weights(packed, "all", "quantised")
    panels = [m.panels for m in packed.modules() if isinstance(m, PackedLinear)]
    assert panels
    assert all(each.dtype == torch.int8 for each in panels)
    monkeypatch.setattr(linear, "encode", lambda *_: None)
    wide = model()
    pack_weights(wide, "all", "quantised")
    for tokens in (torch.tensor([[5]]), torch.arange(70)[None]):
        found = packed(tokens).logits
        assert torch.equal(found, wide(tokens).logits)
        torch.testing.assert_close(found, plain(tokens).logits, atol=1e-5, rtol=0)
