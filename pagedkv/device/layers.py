"""Decoder layers whose products are native, each done by two calls around its attention.

A layer is replaced where its norms, its gate and its rotation have been, and where it gives the
same bits, tried on random numbers with a made-up attention. In steps of few tokens its modules are
then not called, unless somebody has changed one or put a hook on it.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from operator import is_, methodcaller
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.device.bridge import ATTENTION_NAME, HARMLESS, READY_NAME, AttentionStep
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.packing import PackedLinear
from pagedkv.device.substitutes import MOST, epsilon_of, is_replaced, linear, native, noise
from pagedkv.errors import UnsupportedBackend

__all__ = ["substitute_layers"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_USUAL = HARMLESS | {ATTENTION_NAME, "attention_mask", "past_key_values"}

_own_forward = methodcaller("get", "forward")


class _Made:
    """An attention whose answer shows all that it was asked."""

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        others = 2 * key + 3 * value + layer_idx
        return query * scaling + others.repeat_interleave(query.shape[1] // key.shape[1], 1)


class _Native:
    """A layer's parts, as they were when the model was loaded, and what native code makes of them.

    Args:
        layer: A decoder layer.
        modules: Its norms of hidden states before and after attention, of heads of queries and of
            keys (None for those that it lacks), and its seven linear layers.
    """

    def __init__(self, layer: Any, modules: list[Any]) -> None:
        from pagedkv.device.cpu.layer import Layer, Norm, Weight
        from pagedkv.device.cpu.linear import MOST_PLAIN_ROWS

        norms, weights = modules[:4], modules[4:]
        self.attention = layer.self_attn
        self.hooks = layer._forward_hooks, layer._forward_pre_hooks
        self.calls = Layer(
            [None if n is None else Norm(n.weight.detach(), epsilon_of(n) or 0.0) for n in norms],
            [
                Weight(w.panels if _is_packed(w) else w.weight.detach(), w.out_features, w.bias)
                for w in weights
            ],
            self.attention.head_dim,
        )
        most = MOST if all(map(_is_packed, weights)) else MOST_PLAIN_ROWS
        self.most = min(most, MOST // self.calls.shape.width)
        # What `is_unchanged` compares: some fifty things for every layer of a step, so by maps.
        self._parents = [p._modules for p in (layer, layer.self_attn, layer.mlp)]
        self._modules = self._current()
        real = [module for module in self._modules if module is not None]
        self._hooks = [hooks for m in real for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._vars = [*map(vars, real)]
        self._forwards = [own.get("forward") for own in self._vars]
        own = [(m._parameters, name) for m in modules if m is not None for name in m._parameters]
        self._owners, self._names = zip(*own, strict=True)
        self._tensors = [owner[name] for owner, name in own]
        self._lying = [tensor for tensor in self._tensors if tensor is not None]
        self._places = [*map(Tensor.data_ptr, self._lying)]

    def __reduce__(self) -> Any:
        """A copy of the layer calls its modules: its tensors lie elsewhere."""
        return type(None), ()

    def _current(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._parents))]

    def step(self, angles: Any) -> Any:
        """Return what layers of this shape share in a step of few tokens; None in others."""
        from pagedkv.device.cpu.layer import Step

        if type(angles) is not tuple or not all(native(x) and x.is_contiguous() for x in angles):
            return None
        (batch, tokens, width), head_dim = angles[0].shape, self.attention.head_dim
        few = batch == 1 and tokens <= self.most and width <= head_dim
        return Step(self.calls.shape, *angles) if few else None

    def is_unchanged(self) -> bool:
        """Whether modules and tensors are those that were loaded, and lie where they lay."""
        return (
            self._current() == self._modules
            and not any(self._hooks)
            and [*map(_own_forward, self._vars)] == self._forwards
            and all(map(is_, map(dict.get, self._owners, self._names), self._tensors))
            and [*map(Tensor.data_ptr, self._lying)] == self._places
        )

    def forward(
        self,
        hidden: Tensor,
        ready: "Ready",
        attend: AttentionStep,
        angles: Any,
    ) -> Tensor | None:
        """What the layer computes; None if that is for its modules."""
        step, attention = ready.step(self, angles), self.attention
        if (
            step is None
            or not (hidden is ready.latest or _takes(hidden, angles[0]))
            or attention.training
            or not getattr(attention, "is_causal", True)
            or not ready.is_unchanged(self)
        ):
            return None
        query, key, value = self.calls.before(step, hidden)
        attended = attend.attend(attention.layer_idx, query, key, value, attention.scaling)
        ready.latest = self.calls.after(step, hidden, attended.contiguous())
        return ready.latest


def _takes(hidden: Tensor, angles: Tensor) -> bool:
    """Whether native code is for these hidden states."""
    return native(hidden) and hidden.is_contiguous() and hidden.shape[:2] == angles.shape[:2]


class Ready:
    """What a model's native layers share in one forward, so that each need not find it out.

    Args:
        layers: All of them, or none: then each is looked at by itself.
    """

    def __init__(self, layers: Sequence[_Native | None] = ()) -> None:
        self.latest: Tensor | None = None  # what a native layer gave is what the next one takes
        self._layers = layers
        self._unchanged: set[_Native] | None = None
        self._steps: dict[Any, Any] = {}

    def step(self, layer: _Native, angles: Any) -> Any:
        """Return what layers of this shape and these angles share; None if they are called."""
        key = layer.calls.shape, layer.most, id(angles)
        if key not in self._steps:
            self._steps[key] = angles, layer.step(angles)  # the id is taken as long as they live
        return self._steps[key][1]

    def is_unchanged(self, layer: _Native) -> bool:
        """Whether a layer is what it was when it was loaded; all are looked at at once."""
        if self._unchanged is None:
            # What a hook on one layer does may change the next.
            layers = [each for each in self._layers if each is not None]
            hooked = any(chain.from_iterable(each.hooks for each in layers))
            self._unchanged = set() if hooked else {x for x in layers if x.is_unchanged()}
        return layer in self._unchanged or layer.is_unchanged()


def substitute_layers(model: Any, geometry: ModelGeometry) -> None:
    """Replace the layers that can be; the model's other parts have been already.

    Raises:
        UnsupportedBackend: The native code cannot be compiled here.

    Cost: the products of each layer twice, for a few tokens.
    """
    layers = []
    for module in model.modules():
        parts = _parts(module)
        if parts is None or not _has_threads():
            continue
        found = _Native(module, parts)
        if _same(module, found, geometry):
            module.pagedkv_native = found
            module.forward = MethodType(_forward, module)
            layers.append(found)
    if layers:
        setattr(model, READY_NAME, partial(Ready, layers))


def _has_threads() -> bool:
    """Whether native code can start as many threads as torch does."""
    from pagedkv.device.cpu.kernel import parallel_address

    return torch.get_num_threads() == 1 or bool(parallel_address())


def _parts(layer: nn.Module) -> list[Any] | None:
    """Return the modules that `_Native` wants of a decoder layer; None if this is none."""
    own = layer._modules
    attention, feed_forward = own.get("self_attn"), own.get("mlp")
    if attention is None or feed_forward is None:
        return None
    inner, outer = attention._modules, feed_forward._modules
    norms = [*map(own.get, _NORMS), *map(inner.get, _HEAD_NORMS)]
    weights = [*map(inner.get, _PROJECTIONS), *map(outer.get, _FEED_FORWARD)]
    known = (
        all(_is_packed(each) or _is_plain(each) for each in weights)
        and None not in norms[:2]
        and all(map(is_replaced, (attention, feed_forward, *filter(None, norms))))
        and all(hasattr(attention, name) for name in ("head_dim", "layer_idx", "scaling"))
    )
    return [*norms, *weights] if known else None


def _is_packed(module: Any) -> bool:
    return type(module) is PackedLinear


def _is_plain(module: Any) -> bool:
    """Whether a linear layer's products are native, its weight as it is."""
    if type(module) is not nn.Linear:
        return False
    from pagedkv.device.cpu.linear import multiplies_plain

    replaced = getattr(vars(module).get("forward"), "__func__", None) is linear
    return replaced and multiplies_plain(module.weight)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of decoder layers that were replaced."""
    found: _Native | None = self.pagedkv_native
    attend = kwargs.get(ATTENTION_NAME)  # without one, somebody else attends
    if found is not None and attend is not None and not args and _is_usual(kwargs):
        ready = kwargs.get(READY_NAME) or Ready()
        made = found.forward(hidden_states, ready, attend, kwargs.get("position_embeddings"))
        if made is not None:
            return made
    out: Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
    return out


def _is_usual(asked: dict[str, Any]) -> bool:
    """Whether nothing is asked of attention that the modules would have to look at."""
    return (
        asked.get("past_key_values") is None
        and asked.get("attention_mask") is None
        and asked.keys() <= _USUAL
    )


def _same(module: Any, found: _Native, geometry: ModelGeometry) -> bool:
    """Whether native code gives the bits that a layer's own forward gives.

    Small hidden states let show what small weights add to them.
    """
    width, tokens = 2 * len(geometry.rope_frequencies[module.self_attn.layer_idx]), 3
    hidden = 1e-4 * noise(1, tokens, module.self_attn.q_proj.in_features)
    asked: dict[str, Any] = {
        "position_embeddings": (noise(1, tokens, width), noise(1, tokens, width)),
        "attention_mask": None,
        "position_ids": torch.arange(tokens, device="cpu")[None],
        "past_key_values": None,
        "use_cache": False,
        ATTENTION_NAME: _Made(),
    }
    with torch.no_grad():
        try:
            expected = type(module).forward(module, hidden, **asked)
        except (TypeError, ValueError, RuntimeError, AttributeError, UnsupportedBackend):
            return False  # it is called otherwise, or its attention wants more than ours does
        made = found.forward(hidden, Ready(), asked[ATTENTION_NAME], asked["position_embeddings"])
        return isinstance(expected, Tensor) and made is not None and torch.equal(expected, made)
