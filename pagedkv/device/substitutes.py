"""Parts of a transformers model that native code does instead, where it computes the same.

Between its matrix products a model asks torch for many small operations. In a decode step each
costs more in calls than in arithmetic. Three kinds of them are done natively on the CPU in fp32:
RMS norms, the rotation of queries and keys, and the gates of feed-forward layers. All are
recognised by what they compute, on random numbers, and only then replaced, in this model and no
other; whatever differs stays as it is. So are the products of linear layers with few rows, where
ours are the faster ones.
"""

import copy
import math
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.device.geometry import ModelGeometry

__all__ = ["substitute"]

# What all transformers models with rotary positions call theirs, each in its own file.
_ROTATION = "apply_rotary_pos_emb"
_TOLERANCE = 1e-5
_GATED = ("gate_proj", "up_proj", "down_proj")
# Numbers in a layer's tensor: with more, as in prompts, its parts are called one by one.
MOST = 1 << 18
_Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def native(x: Tensor, most: float = math.inf) -> bool:
    """Whether native code is for this tensor; a model may be moved after it was loaded."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype == torch.float32
        and x.numel() <= most
        and not x.requires_grad
    )


def rotation(theirs: _Rotation) -> _Rotation:
    """Return a rotation of queries and keys [1, heads, T, dim] by angles [1, T, 2 * pairs]."""
    from pagedkv.device.cpu.rowwise import rotate

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, tokens, dim = q.shape
        whole = all(native(x) and x.is_contiguous() for x in (cos, sin))
        if (
            whole
            and batch == 1
            and cos.shape == sin.shape == (1, tokens, cos.shape[-1])
            and cos.shape[-1] <= dim
            and all(native(x) and x.stride(3) == 1 for x in (q, k))
        ):
            return rotate(q, k, cos, sin)
        return theirs(q, k, cos, sin)

    return ours


def norm(epsilon: float) -> Callable[[Any, Tensor], Tensor]:
    """Return a forward for RMS norm modules with this epsilon."""
    from pagedkv.device.cpu.rowwise import rms_norm

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if native(hidden_states) and hidden_states.is_contiguous():
            return rms_norm(hidden_states, self._parameters["weight"], epsilon)
        out: Tensor = type(self).forward(self, hidden_states)
        return out

    return forward


def gated(self: Any, x: Tensor) -> Tensor:
    """Forward of modules whose feed-forward layer is gated by SiLU."""
    from pagedkv.device.cpu.rowwise import silu_gate

    gate, up = self.gate_proj(x), self.up_proj(x)
    whole = gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()
    whole = whole and native(gate) and native(up)
    mixed = silu_gate(gate, up) if whole else nn.functional.silu(gate) * up
    out: Tensor = self.down_proj(mixed)
    return out


def linear(self: Any, x: Tensor) -> Tensor:
    """Forward of linear layers, their weights as they are."""
    from pagedkv.device.cpu.linear import MOST_PLAIN_ROWS, multiplies_plain, multiply

    weight, bias = self._parameters["weight"], self._parameters["bias"]
    inputs = weight.shape[1]
    known = native(x, MOST_PLAIN_ROWS * inputs) and x.shape[-1] == inputs and x.numel()
    if not (known and multiplies_plain(weight)):
        return nn.functional.linear(x, weight, bias)
    out = multiply(x.reshape(-1, inputs), weight, len(weight))
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], len(weight))


def is_replaced(module: Any) -> bool:
    """Whether a part was found to compute what native code does, which does it since."""
    return "forward" in vars(module)


def substitute(model: Any, geometry: ModelGeometry) -> None:
    """Replace what can be; does nothing but for fp32 on the CPU.

    Raises:
        UnsupportedBackend: The native code cannot be compiled here.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return
    try:
        from pagedkv.device.cpu import rowwise
    except ImportError:  # without numba the model can be looked at, and not served
        return
    from pagedkv.device.cpu import linear as products

    rowwise.get_ready()
    products.get_ready()
    with torch.no_grad():
        for module in model.modules():
            if type(module) is nn.Linear and products.MOST_PLAIN_ROWS:
                module.forward = MethodType(linear, module)  # type: ignore[method-assign]
            elif type(module).__name__.endswith("RMSNorm"):
                _replace_norm(module)
            elif all(hasattr(module, name) for name in _GATED):
                _replace_gate(module)
            elif isinstance(getattr(module, "layer_idx", None), int):
                _replace_rotation(module, geometry)


def epsilon_of(module: nn.Module) -> float | None:
    """Return an RMS norm's epsilon; None if it is not called as usual."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _replace_norm(module: nn.Module) -> None:
    epsilon = epsilon_of(module)
    weight = getattr(module, "weight", None)
    if epsilon is None or not isinstance(weight, nn.Parameter):
        return
    if len([*module.parameters()]) > 1:
        return
    probe, ours = noise(3, 1, len(weight)), norm(epsilon)
    if alike(lambda: (module(probe),), lambda: (ours(module, probe),)):
        module.forward = MethodType(ours, module)


class _Stub(nn.Module):
    """Stands in for a product: known numbers of the size that the gate is tried on."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def _replace_gate(module: nn.Module) -> None:
    """Try the module without its weights: these may be of any size, and all alike."""
    bare = copy.copy(module)
    stubs = (_Stub(lambda x: 3 * x), _Stub(lambda x: x.flip(-1)), _Stub(lambda x: 2 * x))
    bare._modules = {**module._modules, **dict(zip(_GATED, stubs, strict=True))}
    probe = noise(1, 3, 40)
    if alike(lambda: (bare(probe),), lambda: (gated(bare, probe),)):
        module.forward = MethodType(gated, module)


def _replace_rotation(module: nn.Module, geometry: ModelGeometry) -> None:
    """Give one attention module a forward that looks the name of its rotation up in ours."""
    forward = type(module).forward
    theirs = getattr(forward, "__globals__", {}).get(_ROTATION)
    width = 2 * len(geometry.rope_frequencies[int(module.layer_idx)])  # type: ignore[arg-type]
    if theirs is None or not width:
        return
    ours = rotation(theirs)
    if not _same_rotation(theirs, ours, geometry, width):
        return
    assert isinstance(forward, FunctionType)
    own = forward.__globals__ | {_ROTATION: ours}
    renamed = FunctionType(
        forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__
    )
    renamed.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(renamed, module)


def _same_rotation(theirs: _Rotation, ours: _Rotation, geometry: ModelGeometry, width: int) -> bool:
    dim, tokens = geometry.head_dim, 5
    query = noise(1, tokens, geometry.num_query_heads, dim).transpose(1, 2)
    key = noise(1, tokens, geometry.num_kv_heads, dim).transpose(1, 2)
    angles = noise(1, tokens, width), noise(1, tokens, width)
    return alike(lambda: theirs(query, key, *angles), lambda: ours(query, key, *angles))


def alike(theirs: Callable[[], tuple[Tensor, ...]], ours: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether both give the same within rounding; false if theirs cannot be called so."""
    try:
        expected = theirs()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    found = ours()
    return len(expected) == len(found) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in zip(expected, found, strict=True)
    )


def noise(*shape: int) -> Tensor:
    """Return fp32 numbers on the CPU, as native code takes them, whatever torch's defaults are."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
