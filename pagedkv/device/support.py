"""Which architectures can be served: a table of reasons why one cannot, by name.

The table reads configurations only, so a refusal costs no download and no weights. What a
configuration does not tell is found out by `probe`, which calls the loaded model once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from pagedkv.errors import UnsupportedBackend

__all__ = ["OBSTACLES", "Obstacle", "check_config", "read_config", "text_config"]

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_RECURRENT = ("state_size", "ssm_state_size", "mamba_d_state", "attention_hidden_size", "lru_width")


class Obstacle(NamedTuple):
    """One reason not to serve a model."""

    reason: str
    applies: Callable[[Any, Any], bool]


def read_config(config: Any, name: str, default: Any = None) -> Any:
    """`config.name`, or `default` where the config has no such field or it differs by layer."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # how transformers refuses to name one value for layers that differ
        return default


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the decoder over text."""
    return config.get_text_config(decoder=True)


def _layer_kinds(config: Any) -> set[str]:
    kinds: set[str] = set()
    for field in ("layer_types", "layers_block_type"):
        kinds.update(read_config(config, field) or ())
    return kinds


def _is_recurrent(config: Any, _model_class: Any) -> bool:
    other = _layer_kinds(config) - _SERVED_LAYERS
    if any(word in kind for kind in other for word in ("linear", "mamba", "recurrent", "conv")):
        return True
    return any(read_config(config, field) is not None for field in _RECURRENT)


def _has_other_layers(config: Any, _model_class: Any) -> bool:
    return bool(_layer_kinds(config) - _SERVED_LAYERS)


def _has_alibi(config: Any, _model_class: Any) -> bool:
    # MPT keeps the flag one level down, BLOOM always does it and has no flag.
    nested = read_config(config, "attn_config")
    return bool(
        read_config(config, "alibi") or read_config(nested, "alibi") or config.model_type == "bloom"
    )


def _has_sinks(config: Any, _model_class: Any) -> bool:
    # No configuration says it; others are caught when they pass `s_aux` to the attention function.
    return bool(config.model_type == "gpt_oss")


def _has_soft_cap(config: Any, _model_class: Any) -> bool:
    return read_config(config, "attn_logit_softcapping") is not None


def _has_latent_kv(config: Any, _model_class: Any) -> bool:
    return read_config(config, "kv_lora_rank") is not None


def _shares_kv(config: Any, _model_class: Any) -> bool:
    return bool(read_config(config, "num_kv_shared_layers"))


def _differs_by_layer(config: Any, _model_class: Any) -> bool:
    heads = read_config(config, "num_key_value_heads")
    return bool(isinstance(heads, list | tuple) or read_config(config, "is_heterogeneous"))


def _lacks_interface(_config: Any, model_class: Any) -> bool:
    return not getattr(model_class, "_supports_attention_backend", False)


# The first that applies is the one reported, so the telling ones come before the general ones.
OBSTACLES: tuple[Obstacle, ...] = (
    Obstacle("it is an encoder-decoder model", lambda c, _: bool(c.is_encoder_decoder)),
    Obstacle("it has no causal language-model head", lambda _, model_class: model_class is None),
    Obstacle("it adds ALiBi biases to its attention scores", _has_alibi),
    Obstacle("it has state-space or linear-attention layers", _is_recurrent),
    Obstacle("it caps its attention scores (soft-capping)", _has_soft_cap),
    Obstacle("it has learned attention sinks", _has_sinks),
    Obstacle("its keys and values differ in width (latent attention)", _has_latent_kv),
    Obstacle("its layers differ in head count or width", _differs_by_layer),
    Obstacle("its layers read the keys of other layers", _shares_kv),
    Obstacle("it has layers that are neither full nor sliding-window attention", _has_other_layers),
    Obstacle("transformers cannot exchange its attention function", _lacks_interface),
)


def check_config(config: Any, name: str) -> None:
    """Refuse a configuration that cannot be served. Reads no weights.

    Args:
        config: A transformers configuration.
        name: What the user called the model, for the message.

    Raises:
        UnsupportedBackend: One of `OBSTACLES` applies; the message names the architecture.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    text = text_config(config)
    for obstacle in OBSTACLES:
        if obstacle.applies(text, model_class) or obstacle.applies(config, model_class):
            raise UnsupportedBackend(
                f"the architecture {config.model_type!r} cannot be served: {obstacle.reason}",
                where=name,
                remedy="use a decoder-only model with rotary or learned positions, such as "
                "Llama, Qwen 2 or 3, Mistral, GPT-2 or GPT-NeoX",
            )
