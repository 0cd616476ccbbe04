"""Which operator attends: one table by device, dtype, storage, block size and head size."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pagedkv.errors import UnsupportedBackend

from .gathered import GatheredOp
from .library import triton_splitk
from .operators import CpuPagedOp, PagedOp
from .splitk import BLOCK_SIZES, HEAD_DIMS, SplitKPagedOp, splitk_op
from .store import INT4

__all__ = ["OPERATORS", "Entry", "choose_operator"]

_NARROW = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_NARROW)


class Entry(NamedTuple):
    """One line of the table: what an operator takes.

    Attributes:
        device: Where it runs.
        operator: For blocks of one size, the class to hand to xformers.
        name: What it is called in messages.
        dtypes: What the model may compute in.
        stored: What keys and values may be stored as.
        block_size: Of which a block must have a multiple.
        head_dims: Sizes of a head; None for any.
        obstacle: Why it cannot run on this machine, for keys stored so; None if it can.
    """

    device: str
    operator: Callable[[int], type[PagedOp]]
    name: str
    dtypes: tuple[torch.dtype, ...]
    stored: tuple[torch.dtype, ...]
    block_size: int
    head_dims: frozenset[int] | None
    obstacle: Callable[[torch.dtype], str | None]

    def takes(self) -> str:
        """Return what it takes, in words."""
        sizes = "any" if self.head_dims is None else _sizes(self.head_dims)
        block = "any size" if self.block_size == 1 else f"multiples of {self.block_size}"
        stored = ", ".join(map(_name, self.stored))
        return f"keys in {stored}; blocks of {block}; heads of {sizes}"

    def refusal(
        self, dtype: torch.dtype, stored: torch.dtype, block_size: int, head_dim: int
    ) -> str | None:
        """Return what of this it does not take, and what it does; None if it takes all of it."""
        if dtype not in self.dtypes:
            return f"dtype={_name(dtype)} (takes {_names(self.dtypes)})"
        if stored not in self.stored:
            return f"keys and values in {_name(stored)} (takes {_names(self.stored)})"
        if block_size % self.block_size:
            return f"block_size={block_size} (takes multiples of {self.block_size})"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"head_dim={head_dim} (takes {_sizes(self.head_dims)})"
        return self.obstacle(stored)


def choose_operator(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    stored: torch.dtype | None = None,
    block_size: int = 16,
    head_dim: int = 64,
) -> type[PagedOp]:
    """Return the first operator of `OPERATORS` that takes all of this.

    Args:
        device: Where keys, values and model are.
        dtype: What the model computes in.
        stored: What keys and values are stored as; `dtype` if omitted. int8 and int4 are packed
            by `quantize`.
        block_size: Slots of a block.
        head_dim: Size of a head.

    Raises:
        UnsupportedBackend: None does; names each that was tried and why it refused.
    """
    kind = torch.device(device).type
    refusals = []
    for entry in OPERATORS:
        if entry.device != kind:
            continue
        refusal = entry.refusal(dtype, stored or dtype, block_size, head_dim)
        if refusal is None:
            return entry.operator(block_size)
        refusals.append(f"{entry.name} was tried and refused: {refusal}")
    devices = sorted({entry.device for entry in OPERATORS})
    none = f"no operator runs on device={kind} (there are some for {' and '.join(devices)})"
    raise UnsupportedBackend(
        "; ".join(refusals) or none,
        where="device.dispatch",
        remedy="change one of these; `pagedkv env` lists what each operator takes",
    )


def _cpu_obstacle(stored: torch.dtype) -> str | None:
    try:
        from .cpu import simd
    except ImportError as error:
        return f"numba cannot be imported ({error}): install pagedkv[cpu]"
    if stored == torch.float16 and not simd.HAS_HALF:
        return "this processor has no instruction that converts fp16"
    return None


def _cuda_obstacle(_stored: torch.dtype) -> str | None:
    """Nothing where there is no GPU: whoever asks then wants to know what would run on one."""
    needed = triton_splitk.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < needed:
        have = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"compute capability {have} (needs {'.'.join(map(str, needed))})"
    return None


def _triton_obstacle(stored: torch.dtype) -> str | None:
    if not triton_splitk.FwOp.is_available():
        return "triton cannot be imported: install pagedkv[gpu]"
    return _cuda_obstacle(stored)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(_name, dtypes))


def _sizes(sizes: frozenset[int]) -> str:
    few = sorted(sizes)
    return ", ".join(map(str, few)) if len(few) < 8 else f"{few[0]}, {few[1]} .. {few[-1]}"


def _always(operator: type[PagedOp]) -> Callable[[int], type[PagedOp]]:
    return lambda _block_size: operator


_TILE = BLOCK_SIZES[-1]
_EIGHTS = frozenset(range(8, 257, 8))

# Of those that take a combination the first is used: in place before gathered.
OPERATORS = (
    Entry(
        "cpu",
        _always(CpuPagedOp),
        CpuPagedOp.NAME,
        _FLOATS,
        (*_FLOATS, torch.int8),
        1,
        None,
        _cpu_obstacle,
    ),
    Entry(
        "cuda", splitk_op, SplitKPagedOp.NAME, _FLOATS, _NARROW, _TILE, HEAD_DIMS, _triton_obstacle
    ),
    Entry(
        "cuda",
        splitk_op,
        SplitKPagedOp.NAME,
        _NARROW,
        (INT4,),
        _TILE,
        HEAD_DIMS,
        _triton_obstacle,
    ),
    Entry(
        "cuda",
        _always(GatheredOp),
        GatheredOp.NAME,
        _FLOATS,
        _NARROW,
        1,
        _EIGHTS,
        _cuda_obstacle,
    ),
    Entry(
        "cuda",
        _always(GatheredOp),
        GatheredOp.NAME,
        _NARROW,
        (torch.int8, INT4),
        1,
        _EIGHTS,
        _cuda_obstacle,
    ),
)
