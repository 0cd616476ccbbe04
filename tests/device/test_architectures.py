"""Which architectures are served, that they are served rightly, and how the others are refused."""

from typing import Any

import pytest
import torch
import transformers

from pagedkv.device.bridge import forward, register
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import _examined
from pagedkv.device.support import OBSTACLES, check_config
from pagedkv.errors import UnsupportedBackend

from .reference import DenseStep, packed, reference_logits, reference_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING, FULL = "sliding_attention", "full_attention"


def small_model(model_type: str, fields: dict[str, Any]) -> LoadedModel:
    """A model of any architecture with random weights, examined as `load_model` would."""
    register()
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | fields))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pagedkv")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return _examined(model.eval(), None, f"small {model_type}")


# Beyond the tiny models: what is special, and the rotated pairs and windows it should come to.
SERVED: dict[str, tuple[dict[str, Any], list[int], list[int], bool]] = {
    "cohere2": (  # interleaved rotation, none in the full layers
        GROUPED | {"sliding_window": 8, "layer_types": [SLIDING, FULL] * 2},
        [4, 0, 4, 0],
        [8, 0, 8, 0],
        True,
    ),
    "gemma3_text": (  # two sets of frequencies
        GROUPED | {"sliding_window": 8, "layer_types": [SLIDING, FULL] * 2},
        [4, 4, 4, 4],
        [8, 0, 8, 0],
        False,
    ),
    "glm4": (GROUPED, [2] * 4, [0] * 4, True),  # partial and interleaved
    "granite": ({"num_key_value_heads": 2, "attention_multiplier": 0.3}, [4] * 4, [0] * 4, False),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, [0] * 4, [0] * 4, False),  # offset by 2
    "qwen3_moe": (
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        [4] * 4,
        [0] * 4,
        False,
    ),
    "smollm3": ({"num_key_value_heads": 2}, [4, 4, 4, 0], [0] * 4, False),  # one layer unrotated
    "starcoder2": ({"num_key_value_heads": 2, "sliding_window": 8}, [4] * 4, [8] * 4, False),
}


@pytest.mark.parametrize("model_type", SERVED)
def test_served_architectures_equal_their_own_runs(model_type: str) -> None:
    fields, pairs, windows, interleaved = SERVED[model_type]
    loaded = small_model(model_type, fields)
    g = loaded.geometry
    assert [len(frequencies) for frequencies in g.rope_frequencies] == pairs
    assert list(g.sliding_window) == windows
    assert (g.rope, g.rope_interleaved) == (any(pairs), interleaved)
    first, second = list(range(5, 14)), list(range(30, 60))
    step = DenseStep(g.sliding_window)
    ids, positions = packed([(first, 0), (second[:13], 0)])
    start = forward(loaded, ids, positions, step.begin([(0, 9), (1, 13)]), torch.arange(22))
    ids, positions = packed([(second[13:], 13)])
    rest = forward(loaded, ids, positions, step.begin([(1, 17)]), torch.arange(17))
    model = reference_model(loaded, "eager")
    expected = torch.cat([reference_logits(model, first), reference_logits(model, second)])
    scale = float(expected.abs().max())
    torch.testing.assert_close(torch.cat([start, rest]), expected, rtol=0, atol=1e-5 * scale)


def test_two_sets_of_frequencies_are_told_apart() -> None:
    frequencies = small_model("gemma3_text", SERVED["gemma3_text"][0]).geometry.rope_frequencies
    assert frequencies[0] == frequencies[2] == pytest.approx([1e4 ** (-i / 4) for i in range(4)])
    assert frequencies[1] == frequencies[3] == pytest.approx([1e6 ** (-i / 4) for i in range(4)])


@pytest.mark.parametrize("rope_type", ["yarn", "llama3", "dynamic"])
def test_scaled_rotations(rope_type: str) -> None:
    """Constant frequencies may be rotated further, those that grow with the sequence may not."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 32}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    loaded = small_model("llama", GROUPED | {"rope_parameters": rope})
    assert loaded.geometry.rope == (rope_type != "dynamic")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("t5", {}, "encoder-decoder"),
    ("bart", {}, "encoder-decoder"),
    ("vit", {}, "no causal"),
    ("bloom", {}, "ALiBi"),
    ("mpt", {}, "ALiBi"),
    ("falcon", {"alibi": True}, "ALiBi"),
    ("falcon", {}, "exchange"),
    ("gptj", {}, "exchange"),
    ("mamba", {}, "state-space"),
    ("mamba2", {}, "state-space"),
    ("jamba", {}, "state-space"),
    ("rwkv", {}, "state-space"),
    ("recurrent_gemma", {}, "state-space"),
    ("qwen3_next", {}, "linear-attention"),
    ("gemma2", {}, "soft-capping"),
    ("gpt_oss", {}, "sinks"),
    ("deepseek_v3", {}, "latent attention"),
    ("llama4_text", {}, "neither full nor sliding"),
    ("gemma3n_text", {}, "other layers"),
]


@pytest.mark.parametrize(("model_type", "fields", "reason"), REFUSED)
def test_refused_architectures_are_named(
    model_type: str, fields: dict[str, Any], reason: str
) -> None:
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with pytest.raises(UnsupportedBackend, match=reason) as caught:
        check_config(config, "some/model")
    assert repr(model_type) in str(caught.value)
    assert caught.value.where == "some/model"
    assert caught.value.remedy


def test_every_obstacle_is_met_by_some_architecture() -> None:
    """Except differ in head count, which no class has by default."""
    met = {o.reason for o in OBSTACLES if any(reason in o.reason for *_, reason in REFUSED)}
    assert {o.reason for o in OBSTACLES} - met == {"its layers differ in head count or width"}


def test_layers_that_differ_are_refused() -> None:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, per_layer_config={1: {"num_key_value_heads": 4}}
    )
    with pytest.raises(UnsupportedBackend, match="differ in head count"):
        check_config(config, "some/model")


UNTABLED: dict[str, tuple[str, dict[str, Any]]] = {
    "is_causal=False": ("bert", {}),
    "s_aux": ("gpt_oss", GROUPED | {"num_local_experts": 2}),
    "softcap": ("gemma2", GROUPED),
    "ask for attention 0 times": ("bloom", {}),
    "ask for attention 8 times": ("diffllama", GROUPED),
    "differ in width": ("deepseek_v3", {"first_k_dense_replace": 4}),
    "without a pagedkv step": ("nemotron", GROUPED),
    "set_default_language": ("xmod", {}),
}


@pytest.mark.parametrize("asks", UNTABLED)
def test_probe_refuses_what_the_table_would_miss(asks: str) -> None:
    with pytest.raises(UnsupportedBackend, match=asks) as caught:
        small_model(*UNTABLED[asks])
    assert caught.value.where == f"small {UNTABLED[asks][0]}"
