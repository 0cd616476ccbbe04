"""The bridge from a transformers model to pagedkv's attention.

transformers lets a model look its attention function up by name. `register` puts one there called
"pagedkv", which hands query, key and value of every layer to the step that travels with the call as
an extra keyword. Nothing is registered at import and nothing is global but that one name.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.utils import logging

from pagedkv.device.loaded import LoadedModel
from pagedkv.errors import UnsupportedBackend

__all__ = [
    "ATTENTION_NAME",
    "HARMLESS",
    "READY_NAME",
    "AttentionStep",
    "Call",
    "Recorder",
    "forward",
    "paged_attention",
    "progress_bars",
    "register",
]

ATTENTION_NAME = "pagedkv"
# What a forward's native layers share, `layers.Ready`; of a model, what makes it.
READY_NAME = "pagedkv_ready"

# Keywords that models pass along to every attention function and that change nothing here: masks
# and windows are the step's own business (the geometry says them), positions are already in the
# rotated query and key. Any other keyword with a value is refused, because ignoring it would give
# wrong logits without a word.
HARMLESS = frozenset(
    {
        READY_NAME,
        "cache_position",
        "deterministic",
        "layer_idx",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


class AttentionStep(Protocol):
    """Attention over one step's packed tokens: what an executor brings along for each forward."""

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store the keys and values of T tokens, then attend from T queries.

        Args:
            layer_idx: 0-based layer; called once per layer and forward, in ascending order.
            query: `[T, query_heads, head_dim]`, after any rotation; may be a strided view, and
                may be overwritten by the next layer, like key and value.
            key: `[T, kv_heads, head_dim]`, after any rotation; may be a strided view.
            value: `[T, kv_heads, head_dim]`; may be a strided view.
            scaling: What the scores are multiplied by before the softmax.

        Returns:
            `[T, query_heads, head_dim]`, in the query's dtype.
        """
        ...


class Call(NamedTuple):
    """What one layer handed to its attention; shapes as in `AttentionStep.attend`."""

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor


class Recorder:
    """An attention that answers zeros and keeps what it was asked, for looking into a model.

    Attributes:
        calls: Every call, in order.
        windows: For each, the `sliding_window` that the layer named, 0 for none.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.windows: list[int] = []

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Keep the arguments; `[T, query_heads, value's head_dim]` of zeros."""
        del scaling
        self.calls.append(Call(layer_idx, query.clone(), key.clone(), value.clone()))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


def register() -> None:
    """Make "pagedkv" a valid `attn_implementation`. May be called any number of times.

    No mask function is registered under the name, which is how transformers is told not to build
    a dense mask: models then pass `attention_mask=None`.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Let transformers draw its bars within the block, or not; its setting is put back after."""
    was_on = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if show else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Hand one layer's attention to the step in `extra["pagedkv"]`.

    Args:
        module: The layer's attention module; its `layer_idx` names the layer.
        query: `[1, query_heads, T, head_dim]` after rotation.
        key: `[1, kv_heads, T, head_dim]` after rotation.
        value: `[1, kv_heads, T, head_dim]`.
        attention_mask: Must be None: what a token sees is the step's to say.
        scaling: Score factor; None means `head_dim ** -0.5`.
        dropout: Must be 0.
        extra: The model's further keywords, and the step.

    Returns:
        `[1, T, query_heads, head_dim]`, and None where transformers looks for attention weights.

    Raises:
        UnsupportedBackend: No step came along, or the layer asks for something that pagedkv's
            operators do not do.
    """
    step: AttentionStep | None = extra.pop(ATTENTION_NAME, None)
    if step is None:
        raise UnsupportedBackend(
            "the model was called without a pagedkv step",
            where=_place(module),
            remedy="call it through pagedkv.device.bridge.forward or an executor",
        )
    _refuse_unknown(module, attention_mask, dropout, extra)
    if query.shape[0] != 1:
        raise UnsupportedBackend(
            f"the model was called with {query.shape[0]} rows of tokens",
            where=_place(module),
            remedy="pack the tokens of all sequences into one row",
        )
    if isinstance(step, Recorder):
        step.windows.append(int(extra.get("sliding_window") or 0))
    out = step.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        # Not [0] and [None], which take torch some times as long.
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
    )
    return out.unsqueeze(0), None


def _place(module: torch.nn.Module) -> str:
    return f"{type(module).__name__}, layer {getattr(module, 'layer_idx', '?')}"


def _refuse_unknown(
    module: torch.nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    extra: dict[str, Any],
) -> None:
    """Raise UnsupportedBackend if the layer asks for more than plain causal attention."""
    asked = [
        name
        for name, value in extra.items()
        if name not in HARMLESS and name != "is_causal" and value is not None
    ]
    if attention_mask is not None:
        asked.append("attention_mask")
    if dropout:
        asked.append("dropout")
    causal = extra.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        asked.append("is_causal=False")
    if asked:
        names = ", ".join(sorted(asked))
        raise UnsupportedBackend(
            f"the layer asks its attention for {names}, which pagedkv's operators lack",
            where=_place(module),
            remedy="serve a decoder-only model with plain causal or sliding-window attention",
        )


def _without_autocast(device: str) -> AbstractContextManager[None]:
    """Let a model compute in the type it was loaded in: native code takes no other."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def forward(
    loaded: LoadedModel,
    token_ids: Tensor,
    positions: Tensor,
    step: AttentionStep,
    logits_index: Tensor,
) -> Tensor:
    """Run packed tokens through a model: the executor's only entry to it.

    Args:
        loaded: What `load_model` gave.
        token_ids: `i64[T]`, T >= 1, the tokens of all sequences one after another.
        positions: `i64[T]`, where each token stands; any integers the model has positions for.
        step: Stores this step's keys and values and attends over them.
        logits_index: `i64[S]`, which of the T tokens are asked for logits; S may be 0. Only those
            rows go through the vocabulary projection, where the architecture allows it.

    Returns:
        `f32[S, vocab_size]` logits on the model's device, in the order of `logits_index`.

    Raises:
        UnsupportedBackend: A layer asks for attention that pagedkv's operators lack.
    """
    narrow = {"logits_to_keep": logits_index} if loaded.narrows_logits else {}
    ready = getattr(loaded.model, READY_NAME, None)
    shared = {} if ready is None else {READY_NAME: ready()}
    with torch.no_grad(), _without_autocast(token_ids.device.type):
        output = loaded.model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            attention_mask=None,
            use_cache=False,
            **{ATTENTION_NAME: step},
            **shared,
            **narrow,
        )
    logits: Tensor = output.logits[0]
    return (logits if narrow else logits[logits_index]).float()
