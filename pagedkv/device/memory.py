"""Host memory for keys and values, in huge pages where the system gives them.

Blocks lie in random order, so with pages of 4 KiB nearly every block is a few misses of the
address cache. Linux hands out pages of 2 MiB to who asks (`/sys/kernel/mm/transparent_hugepage`).
"""

import contextlib
import math
import mmap
import os
from pathlib import Path

import torch

__all__ = ["empty", "free", "total"]

_HUGE = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in host memory; like torch's, it takes memory as it is written to.

    Small tensors, and systems without such pages, get torch's own memory. Freed with the tensor.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        # Shared memory, mmap's default, has no huge pages unless the administrator says so.
        memory = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.empty(
            shape, dtype=dtype, device="cpu"
        )  # which raises torch's error if there is no room
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + num_bytes].view(dtype).view(shape)


def total(device: torch.device) -> int:
    """Return the bytes of memory that the device, or for the CPU the machine, has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free(device: torch.device) -> int:
    """Return the bytes that could be allocated now; on the host without swapping anybody out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux, or one too old to know
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
