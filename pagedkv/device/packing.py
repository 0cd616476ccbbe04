"""Linear layers whose weights lie in the order that the processor multiplies in.

A small batch through a large matrix spends much of its time copying that matrix into the order
that the product wants. oneDNN, which torch brings, can keep it in that order.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.errors import ConfigError, UnsupportedBackend

__all__ = ["PackedLinear", "pack_weights"]

# What the layout is tuned for; a matrix packed for 32 rows serves any number of them.
_ROWS = 32
_CHOICES = ("none", "lm_head", "all")


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed weight.

    Its weight is packed itself (`to_dense` gives it back, bit for bit) unless others read it too,
    as a tied embedding does: then it stays as it is and there is a packed copy beside it. Names,
    shapes and counts of parameters are as before either way. What is packed follows no later
    change, and cannot be deep-copied or converted.

    Args:
        linear: Whose weight and bias it takes over.
        shared: Others read the weight.
    """

    def __init__(self, linear: nn.Linear, *, shared: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._packed = packed
        self.weight = linear.weight if shared else nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``: [..., in_features] to [..., out_features]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self._packed, self.bias, "none", [], ""
        )
        return out


def pack_weights(model: Any, which: str, name: str) -> None:
    """Have a transformers model multiply by packed weights.

    Args:
        which: "none", "lm_head" for the output embedding, or "all" for all linear layers.
        name: What the model was asked for by; for errors.

    Raises:
        ConfigError: `which` is none of these.
        UnsupportedBackend: torch does not pack a matrix on this machine, or the packed product
            is not the plain one within rounding. Layers before it are packed already.

    Cost: a tied output embedding once more in memory, of the rest one matrix for a moment; a
        second for 500 MB.
    """
    if which not in _CHOICES:
        raise ConfigError(
            f"{which!r} says not which weights to pack",
            where="pack_weights",
            remedy=f"use one of {', '.join(_CHOICES)}",
        )
    if which == "none":
        return
    head = model.get_output_embeddings()
    readers = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    paths = [path for path, module in model.named_modules() if module is head]
    if which == "all":
        # What a subclass does with its weight is its own business.
        paths += [path for path, m in model.named_modules() if type(m) is nn.Linear]
    for path in dict.fromkeys(paths):
        plain = model.get_submodule(path)
        shared = readers[id(getattr(plain, "weight", None))] > 1
        model.set_submodule(path, _packed(plain, shared, f"{name}, {path}"))


def _packed(plain: Any, shared: bool, where: str) -> PackedLinear:
    """Return a layer packed, or raise UnsupportedBackend."""
    problem = ""
    if not isinstance(plain, nn.Linear):
        problem = f"this is {type(plain).__name__}, not a linear layer"
    elif plain.weight.device.type != "cpu":
        problem = f"the weight is on {plain.weight.device}; packing is for the CPU"
    else:
        try:
            packed = PackedLinear(plain, shared=shared)
            problem = _difference(packed, plain)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            problem = f"torch {torch.__version__} does not pack it here ({lines[0]})"
    if problem:
        raise UnsupportedBackend(
            f"pack_weights cannot be had: {problem}", where=where, remedy="leave pack_weights out"
        )
    return packed


def _difference(packed: nn.Linear, plain: nn.Linear) -> str:
    """Say how the two differ on random rows, if by more than rounding; else ""."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, plain.in_features, generator=generator).to(plain.weight.dtype)
    with torch.no_grad():
        expected, found = plain(probe).float(), packed(probe).float()
    # bf16 and fp16 round every product's sum to their own few bits.
    bound = max(1e-4, 2 * torch.finfo(plain.weight.dtype).eps) * float(expected.abs().max())
    error = float((found - expected).abs().max())
    return "" if error <= bound else f"the packed product is off by {error:.1e} (bound {bound:.1e})"
