"""How a step's arrays get to the device that attends."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

__all__ = ["Send", "sender"]

Send = Callable[[npt.NDArray[Any]], torch.Tensor]
"""Makes a tensor of an array, on the device that attends."""


def sender(device: torch.device) -> Send:
    """Return what sends each array by itself, for what a step's own transfer does not take."""
    return torch.from_numpy if device.type == "cpu" else partial(_send, device)


def _send(device: torch.device, array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
