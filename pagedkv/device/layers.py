"""Decoder layers whose products are native, each done by two calls around its attention.

A layer is replaced where its norms, its gate and its rotation have been, and where it gives the
same bits, tried on random numbers with a made-up attention. In steps of few tokens its modules are
then not called, unless somebody has changed one or put a hook on it.
"""

from itertools import chain
from operator import is_, methodcaller
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.device.bridge import ATTENTION_NAME, paged_attention
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.packing import PackedLinear
from pagedkv.device.substitutes import MOST, epsilon_of, is_replaced, linear, native, noise
from pagedkv.errors import UnsupportedBackend

__all__ = ["substitute_layers"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


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
        self.calls = Layer(
            [None if n is None else Norm(n.weight.detach(), epsilon_of(n) or 0.0) for n in norms],
            [
                Weight(w.panels if _is_packed(w) else w.weight.detach(), w.out_features, w.bias)
                for w in weights
            ],
            self.attention.head_dim,
        )
        self._most = MOST if all(map(_is_packed, weights)) else MOST_PLAIN_ROWS
        # What `_is_unchanged` compares: some fifty things for every layer of a step, so by maps.
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

    def takes(self, hidden: Tensor, angles: Any) -> bool:
        """Whether native code is for a step: one row of few tokens, through an unchanged layer."""
        if not (native(hidden) and type(angles) is tuple and not self.attention.training):
            return False
        batch, tokens, _ = hidden.shape
        turned = angles[0].shape
        return (
            batch == 1
            and tokens <= min(self._most, MOST // self.calls.width)
            and turned[:2] == (1, tokens)
            and turned[2] <= self.attention.head_dim
            and all(native(x) and x.is_contiguous() for x in (hidden, *angles))
            and self._is_unchanged()
        )

    def _is_unchanged(self) -> bool:
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
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """What the layer computes, with the attention that comes along in `extra`."""
        query, key, value = self.calls.before(hidden, *position_embeddings)
        attended, _ = paged_attention(
            self.attention, query, key, value, attention_mask, self.attention.scaling, **extra
        )
        return self.calls.after(hidden, attended.contiguous())


def substitute_layers(model: Any, geometry: ModelGeometry) -> None:
    """Replace the layers that can be; the model's other parts have been already.

    Raises:
        UnsupportedBackend: The native code cannot be compiled here.

    Cost: the products of each layer twice, for a few tokens.
    """
    for module in model.modules():
        parts = _parts(module)
        if parts is None or not _has_threads():
            continue
        found = _Native(module, parts)
        if _same(module, found, geometry):
            module.pagedkv_native = found
            module.forward = MethodType(_forward, module)


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
    step = kwargs.get(ATTENTION_NAME)  # without one, somebody else attends
    usual = not args and step is not None and kwargs.get("past_key_values") is None
    if (
        found is not None
        and usual
        and found.takes(hidden_states, kwargs.get("position_embeddings"))
    ):
        return found.forward(hidden_states, **kwargs)
    out: Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
    return out


def _same(module: Any, found: _Native, geometry: ModelGeometry) -> bool:
    """Whether native code gives the bits that a layer's own forward gives.

    Small hidden states let show what small weights add to them.
    """
    width, tokens = 2 * len(geometry.rope_frequencies[module.self_attn.layer_idx]), 3
    hidden = 1e-4 * noise(1, tokens, module.self_attn.q_proj.in_features)
    asked: dict[str, Any] = {
        "position_embeddings": (noise(1, tokens, width), noise(1, tokens, width)),
        "attention_mask": None,
        "position_ids": torch.arange(tokens)[None],
        "past_key_values": None,
        "use_cache": False,
        ATTENTION_NAME: _Made(),
    }
    with torch.no_grad():
        try:
            expected = type(module).forward(module, hidden, **asked)
        except (TypeError, ValueError, RuntimeError, AttributeError, UnsupportedBackend):
            return False  # it is called otherwise, or its attention wants more than ours does
        return isinstance(expected, Tensor) and torch.equal(
            expected, found.forward(hidden, **asked)
        )
