"""How a step's arrays get to the device, and answers back: one copy there, few waits."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SharedMemory", "Staging", "Transfer", "fetch", "transfer_to"]

Array = npt.NDArray[Any]
_ALIGNED = 16  # bytes: any element type may begin there


class Transfer(Protocol):
    """Takes a step's arrays to where its tensors are."""

    def take(self, array: Array) -> torch.Tensor:
        """Return a tensor on the device that holds the array once `send` was called.

        Nothing may be computed from it before, and it is overwritten in the next step.
        """
        ...

    def send(self) -> None:
        """Send what was taken since the last time."""
        ...


class SharedMemory:
    """The CPU's: tensors are the arrays themselves."""

    def take(self, array: Array) -> torch.Tensor:
        """Return the array as a tensor."""
        return torch.from_numpy(array)

    def send(self) -> None:
        """Do nothing: there is nowhere to send to."""


class Staging:
    """Gathers arrays one after another in pinned memory and sends them in one copy.

    The copy waits for nothing and nobody waits for it: what the step launches afterwards runs
    after it. Memory on both sides is kept for the next step, and grows to what a step needs.

    Attributes:
        num_copies: Sent so far; one per step, but for the first ones, which find how much it is.
    """

    def __init__(self, device: torch.device, capacity: int = 1 << 20) -> None:
        self.num_copies = 0
        self._used = 0
        self._device = device
        self._outgrown: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sent: torch.cuda.Event | None = None
        self._begin(capacity)

    def take(self, array: Array) -> torch.Tensor:
        """As in `Transfer`; the array is copied at once and may change afterwards."""
        if not self._used and self._sent is not None:
            self._sent.synchronize()  # a step that draws nothing ends before its copy has
        start = -(-self._used // _ALIGNED) * _ALIGNED
        if start + array.nbytes > len(self._host):
            self._outgrown.append((self._host[: self._used], self._there[: self._used]))
            self._begin(2 * (len(self._host) + array.nbytes))
            start = 0
        self._used = start + array.nbytes
        same = torch.from_numpy(np.ascontiguousarray(array))
        for memory in (self._host, self._there):
            place = memory[start : self._used].view(same.dtype).view(same.shape)
            if memory is self._host:
                place.copy_(same)
        return place

    def send(self) -> None:
        """As in `Transfer`."""
        parts = [*self._outgrown, (self._host[: self._used], self._there[: self._used])]
        for here, there in parts:
            there.copy_(here, non_blocking=True)
        self.num_copies += len(parts)
        self._outgrown, self._used = [], 0
        if self._device.type == "cuda":
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()

    def _begin(self, capacity: int) -> None:
        pinned = self._device.type == "cuda"
        self._host = torch.empty(capacity, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._there = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        self._used = 0


def transfer_to(device: torch.device) -> Transfer:
    """Return the way to a device."""
    return SharedMemory() if device.type == "cpu" else Staging(device)


def fetch(tensor: torch.Tensor) -> Array:
    """Return what a tensor holds, on the host: where a step waits for its device."""
    array: Array = tensor.detach().cpu().numpy()
    return array
