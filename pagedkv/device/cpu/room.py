"""Memory that native code writes to: fp32 on the CPU, whatever torch's defaults are."""

import torch
from torch import Tensor

__all__ = ["room"]

_CPU = torch.device("cpu")


def room(*shape: int) -> Tensor:
    """Return uninitialised fp32 numbers in that shape."""
    return torch.empty(shape, dtype=torch.float32, device=_CPU)
