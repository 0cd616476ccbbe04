"""Linear layers whose weights lie in the order that the processor multiplies in.

A small batch through a large matrix is bound by how that matrix is read: a layout of our own
(`cpu/linear.py`) has it read once, in one direction. fp32 on the CPU; weights that were quantised
before lie in bytes where that loses nothing, bit for bit.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.errors import ConfigError, UnsupportedBackend

__all__ = ["PackedLinear", "pack_weights"]

_CHOICES = ("none", "lm_head", "all")


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed weight, fp32 on the CPU.

    A weight that others read too, as a tied embedding does, stays as it is, with the packed copy
    beside it. Any other is kept packed and not plain: its parameter lies on torch's "meta" device,
    where it has name, shape and type and no numbers; `plain` gives them back.

    Args:
        linear: Whose weight and bias it takes over.
        shared: Others read the weight.
    """

    def __init__(self, linear: nn.Linear, *, shared: bool) -> None:
        from pagedkv.device.cpu.linear import get_ready, multiply, pack

        nn.Module.__init__(self)
        get_ready()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._multiply = multiply
        self.panels: Tensor = pack(linear.weight.detach())
        weight = linear.weight if shared else nn.Parameter(linear.weight.to("meta"), False)
        self.weight, self.bias = weight, linear.bias

    def plain(self) -> Tensor:
        """Return the weight that was packed, bit for bit: [out_features, in_features]."""
        from pagedkv.device.cpu.linear import unpack

        return unpack(self.panels, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``: [..., in_features] to [..., out_features]."""
        rows = input.reshape(-1, self.in_features)
        out: Tensor = self._multiply(rows, self.panels, self.out_features)
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)


def pack_weights(model: Any, which: str, name: str) -> None:
    """Have a transformers model multiply by packed weights; what is packed already stays so.

    Args:
        which: "none", "lm_head" for the output embedding, or "all" for all linear layers.
        name: What the model was asked for by; for errors.

    Raises:
        ConfigError: `which` is none of these.
        UnsupportedBackend: A layer is not one in fp32 on the CPU, the product cannot be compiled
            here, or it is not the plain one within rounding. Layers before it are packed already.

    Cost: a tied output embedding once more in memory, of the rest one matrix for a moment; two
        seconds for 500 MB.
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
        if isinstance(plain, PackedLinear):
            continue
        shared = readers[id(getattr(plain, "weight", None))] > 1
        model.set_submodule(path, _packed(plain, shared, f"{name}, {path}"))


def _packed(plain: Any, shared: bool, where: str) -> PackedLinear:
    """Return a layer packed, or raise UnsupportedBackend."""
    problem = ""
    if not isinstance(plain, nn.Linear):
        problem = f"this is {type(plain).__name__}, not a linear layer"
    elif plain.weight.device.type != "cpu" or plain.weight.dtype != torch.float32:
        kind = str(plain.weight.dtype).removeprefix("torch.")
        problem = f"the weight is {kind} on {plain.weight.device}; packing is for float32 on cpu"
    else:
        try:
            packed = PackedLinear(plain, shared=shared)
            problem = _difference(packed, plain)
        except ImportError as error:
            problem = f"numba cannot be imported ({error}): install pagedkv[cpu]"
    if problem:
        raise UnsupportedBackend(
            f"pack_weights cannot be had: {problem}", where=where, remedy="leave pack_weights out"
        )
    return packed


def _difference(packed: nn.Linear, plain: nn.Linear) -> str:
    """Say how the two differ on random rows, if by more than rounding; else ""."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(
        3, plain.in_features, generator=generator, dtype=torch.float32, device="cpu"
    )
    with torch.no_grad():
        expected, found = plain(probe), packed(probe)
    bound = 1e-4 * float(expected.abs().max())
    error = float((found - expected).abs().max())
    return "" if error <= bound else f"the packed product is off by {error:.1e} (bound {bound:.1e})"
