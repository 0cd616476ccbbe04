"""Finding a loaded model's geometry by calling it once and looking at what its layers ask for.

Configurations name the same thing in a dozen ways and leave much unsaid, so what can be measured is
measured: one forward of the same token at positions 0 and 1, with an attention that answers zeros.
The hidden states of the two rows are then equal in every layer, so any difference between their
queries is the layer's rotation, and it can be held against the model's own frequencies.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagedkv.device.bridge import Call, Recorder, forward
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.support import read_config, text_config
from pagedkv.errors import UnsupportedBackend

__all__ = ["probe"]

# Frequencies of these kinds depend on how long the sequence has become.
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})


def probe(loaded: LoadedModel) -> ModelGeometry:
    """Call the model once on two tokens and describe it. The model is left as it was.

    Raises:
        UnsupportedBackend: Its layers do not all ask for attention once, alike in heads and widths.
    """
    config = text_config(loaded.model.config)
    recorder, vocab_size = _call(loaded, config)
    calls = recorder.calls
    problem = _odd_calls(config, calls) or _odd_windows(config, recorder.windows)
    if problem:
        raise _refusal(loaded.name, config, problem)
    rotations = _rotations(loaded.model, config, calls)
    return ModelGeometry(
        num_layers=len(calls),
        num_query_heads=calls[0].query.shape[1],
        num_kv_heads=calls[0].key.shape[1],
        head_dim=calls[0].key.shape[2],
        max_model_len=_trained_positions(loaded.name, config),
        vocab_size=vocab_size,
        eos_token_ids=_eos_token_ids(loaded, config),
        rope=rotations is not None,
        sliding_window=tuple(recorder.windows),
        rope_frequencies=rotations.frequencies if rotations else ((),) * len(calls),
        rope_interleaved=rotations.interleaved if rotations else False,
    )


def _refusal(name: str, config: Any, problem: str) -> UnsupportedBackend:
    return UnsupportedBackend(
        f"the architecture {config.model_type!r} cannot be served: {problem}",
        where=name,
        remedy="use a decoder-only model whose layers all have the same plain attention",
    )


def _call(loaded: LoadedModel, config: Any) -> tuple[Recorder, int]:
    """One forward of one token at positions 0 and 1: what was asked, and the logits' width."""
    recorder, device = Recorder(), loaded.model.device
    # A token from the middle of the vocabulary: padding tokens may have an all-zero embedding.
    token = int(config.vocab_size) // 2
    tokens, positions, index = ([token, token], [0, 1], [1])
    try:
        logits = forward(
            loaded,
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            recorder,
            torch.tensor(index, device=device),
        )
    except UnsupportedBackend as error:
        raise _refusal(loaded.name, config, f"{error.where}: {error.what}") from error
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        # A model that wants more than tokens and positions fails in its own words.
        raise _refusal(loaded.name, config, f"calling it failed ({error})") from error
    return recorder, logits.shape[-1]


def _odd_calls(config: Any, calls: list[Call]) -> str:
    """What is wrong unless every layer called once, in order, with equal shapes; else ""."""
    expected = int(config.num_hidden_layers)
    shapes = {(c.query.shape, c.key.shape, c.value.shape) for c in calls}
    if not calls or [c.layer_idx for c in calls] != list(range(expected)):
        return f"its {expected} layers ask for attention {len(calls)} times, or not in order"
    if len(shapes) > 1:
        return "its layers differ in head count or width"
    ((_, query_heads, width), key, value) = shapes.pop()
    if key != value or width != key[2]:
        return "its queries, keys and values differ in width"
    return "" if query_heads % key[1] == 0 else "its query heads do not share out its key heads"


def _odd_windows(config: Any, windows: list[int]) -> str:
    """What is wrong if layers that the config calls sliding name no window, or others do."""
    kinds = read_config(config, "layer_types")
    if kinds and [kind == "sliding_attention" for kind in kinds] != [w > 0 for w in windows]:
        return "its config and its layers disagree on which of them have a sliding window"
    return ""


def _trained_positions(name: str, config: Any) -> int:
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = read_config(config, field)
        if length:
            return int(length)
    raise UnsupportedBackend(
        "the configuration does not say how many positions the model was trained on",
        where=name,
        remedy="set max_position_embeddings in its config.json",
    )


def _eos_token_ids(loaded: LoadedModel, config: Any) -> tuple[int, ...]:
    """Whatever the generation config, else the config, else the tokenizer calls an end."""
    generation = getattr(loaded.model, "generation_config", None)
    for source in (generation, config, loaded.tokenizer):
        ids = read_config(source, "eos_token_id")
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()


class _Rotations(NamedTuple):
    frequencies: tuple[tuple[float, ...], ...]
    interleaved: bool


def _rotations(model: torch.nn.Module, config: Any, calls: list[Call]) -> _Rotations | None:
    """Each layer's rotation, or None if positions enter in any way not fully understood."""
    if _rope_changes(config):
        return None
    candidates = list(_inverse_frequencies(model))
    for interleaved in (False, True):
        layers = [_explain(call.query, candidates, interleaved) for call in calls]
        if all(layer is not None for layer in layers) and any(layers):
            return _Rotations(tuple(layer or () for layer in layers), interleaved)
    return None


def _rope_changes(config: Any) -> bool:
    """Whether angles or query scales depend on more than the position's distance."""
    parameters = read_config(config, "rope_parameters") or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return any(
        one.get("rope_type") in _CHANGING_ROPE or one.get("llama_4_scaling_beta")
        for one in [parameters, *nested]
    )


def _inverse_frequencies(model: torch.nn.Module) -> Iterator[Tensor]:
    """The angles per position that the model's rotary modules hold, as 1-D tensors."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.ndim == 1:
            yield buffer.detach().float().cpu()


def _explain(
    query: Tensor, candidates: list[Tensor], interleaved: bool
) -> tuple[float, ...] | None:
    """The frequencies that turn a layer's query at position 0 into its query at position 1.

    Returns an empty tuple if the two are equal, and None if no candidate explains the second.
    """
    # bf16 carries 8 bits, and an unrelated vector differs by about its own size.
    relative = 1e-3 if query.dtype == torch.float32 else 0.03
    at_zero, at_one = query.detach().float().cpu()
    tolerance = relative * float(at_zero.abs().max()) + 1e-6
    if float((at_one - at_zero).abs().max()) < tolerance:
        return ()
    best: tuple[float, Tensor] | None = None
    for frequencies in candidates:
        if 2 * frequencies.numel() > at_zero.shape[-1]:
            continue
        error = float((_turn(at_zero, frequencies, interleaved) - at_one).abs().max())
        if error < tolerance and (best is None or error < best[0]):
            best = error, frequencies
    return None if best is None else tuple(best[1].double().tolist())


def _turn(vectors: Tensor, frequencies: Tensor, interleaved: bool) -> Tensor:
    """Rotate `[heads, head_dim]` by one position's angles."""
    pairs = frequencies.numel()
    turned = vectors.clone()
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if interleaved
        else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    cosine, sine = frequencies.cos(), frequencies.sin()
    turned[:, first] = vectors[:, first] * cosine - vectors[:, second] * sine
    turned[:, second] = vectors[:, second] * cosine + vectors[:, first] * sine
    return turned
