"""A device that is not there: tensors without numbers that behave as on a GPU of their own.

torch's fake tensors know shapes and devices; what mixes devices or asks for a number raises. So it
shows, on a machine without a GPU, that everything a step launches lies where it is launched, and
that nothing in it waits for an answer. `Crossings` sees what torch lets pass in silence: copies
between devices, and indices on the host.
"""

from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pagedkv.device.tiled import TiledOp

__all__ = ["NAME", "Crossings", "Launcher", "fake_device", "moved", "unknown", "zeros_for"]

NAME = "elsewhere"


def fake_device() -> FakeTensorMode:
    """Return the mode in which tensors of device `NAME` can be made."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    return FakeTensorMode(allow_non_fake_inputs=True)


class Crossings(TorchDispatchMode):
    """Counts what goes there and comes back; refuses operations on tensors of both.

    Attributes:
        sent: Copies there.
        fetched: Copies back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        devices = [x.device.type for x in flat if isinstance(x, torch.Tensor) and x.dim()]
        name = func.overloadpacket.__name__
        # Inference mode shows a copy as `to`, whole: none where that returns its argument.
        if name in ("to", "_to_copy") and devices != [out.device.type] * len(devices):
            self._count(out.device.type)
        elif name == "copy_" and len(set(devices)) > 1:
            self._count(devices[0])
        elif len(set(devices)) > 1:
            raise AssertionError(f"{name} on tensors of {sorted(set(devices))}")
        return out

    def _count(self, target: str) -> None:
        if target == "cpu":
            self.fetched += 1
        else:
            self.sent += 1


class Launcher:
    """Stands in for a kernel: checks where its inputs lie, and answers without having run."""

    BLOCK_N, NAME = 16, "launcher"

    def __init__(self) -> None:
        self.launches = 0

    def not_supported_reasons(self, inp: Any) -> list[str]:
        return []

    def apply(self, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        mask = inp.attn_bias
        tensors = [inp.query, inp.key, inp.value, mask.k_seqinfo.seqlen, mask.q_seqinfo.seqstart]
        tensors += [mask.block_tables] if hasattr(mask, "block_tables") else []
        assert {x.device.type for x in tensors} == {NAME}
        assert inp.query.shape[2:] == inp.key.shape[2:] or inp.key.dtype == torch.int32
        self.launches += 1
        out = torch.empty_like(inp.query)
        lse = out.new_empty((1, *inp.query.shape[2:-1], inp.query.shape[1]), dtype=torch.float32)
        return out, type("Context", (), {"lse": lse})

    def operator(self, kind: type[TiledOp]) -> type[TiledOp]:
        """An operator for CUDA, launching this; its own tests compile its kernel."""
        instead = {"SUPPORTED_DEVICES": {NAME}, "KERNEL": self, "get_ready": lambda *_: None}
        return type("There", (kind,), instead)


def moved(network: torch.nn.Module) -> None:
    """Put a model's parameters there, in fp16, and its buffers as they are."""
    for module in network.modules():
        for name, each in module._parameters.items():
            if each is not None:
                there = torch.empty(each.shape, dtype=torch.float16, device=NAME)
                module._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = torch.empty(each.shape, dtype=each.dtype, device=NAME)


def unknown(array: np.ndarray) -> torch.Tensor:
    """An array that was sent there."""
    return torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype, device=NAME)


def zeros_for(tensor: torch.Tensor) -> np.ndarray:
    """What a fetch returns: nobody knows the numbers."""
    assert isinstance(tensor, FakeTensor)
    kinds = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}
    return np.zeros(tensor.cpu().shape, kinds[tensor.dtype])
