"""Which operator attends on which device: the one place that knows."""

from typing import Any

import torch

from pagedkv.errors import UnsupportedBackend

from .operators import CpuPagedOp
from .splitk import BLOCK_SIZES, HEAD_DIMS, SplitKPagedOp, splitk_op

__all__ = ["choose_operator"]


def choose_operator(
    device: torch.device | str, dtype: torch.dtype, *, block_size: int = 16, head_dim: int = 64
) -> Any:
    """Return the operator class, for `op=`, that attends over paged blocks.

    | device | dtype | block_size | head_dim | operator |
    |---|---|---|---|---|
    | cpu | fp32, fp16, bf16 | any | any | `CpuPagedOp` |
    | cuda | fp16, bf16 | multiples of 16 | 16, 32 ... 512 | `SplitKPagedOp`, tiles of 64, 32, 16 |

    Raises:
        UnsupportedBackend: Nothing serves this combination; names what was tried and why not.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        refusal = _cuda_refusal(dtype, block_size, head_dim)
        tried = SplitKPagedOp.NAME
    else:
        refusal = _cpu_refusal(kind, dtype)
        tried = CpuPagedOp.NAME
    if refusal:
        what, remedy = refusal
        raise UnsupportedBackend(
            f"{tried} was tried and refused: {what}", where="device.dispatch", remedy=remedy
        )
    return splitk_op(block_size) if kind == "cuda" else CpuPagedOp


def _cpu_refusal(kind: str, dtype: torch.dtype) -> tuple[str, str] | None:
    """Return what is wrong and what would do; None if nothing is."""
    if kind not in CpuPagedOp.SUPPORTED_DEVICES:
        return f"device={kind} (supported: cpu)", "use device cpu or cuda"
    if dtype not in CpuPagedOp.SUPPORTED_DTYPES:
        return f"dtype={dtype}", "use float32, float16 or bfloat16"
    try:
        from .cpu import simd
    except ImportError as error:
        return f"numba cannot be imported ({error})", "install pagedkv[cpu]"
    if dtype == torch.float16 and not simd.HAS_HALF:
        return "this processor has no instruction that converts fp16", "use float32 or bfloat16"
    return None


def _cuda_refusal(dtype: torch.dtype, block_size: int, head_dim: int) -> tuple[str, str] | None:
    if dtype not in SplitKPagedOp.SUPPORTED_DTYPES:
        return f"dtype={dtype}", "use float16 or bfloat16"
    if block_size % BLOCK_SIZES[-1]:
        return f"block_size={block_size}", "use a multiple of 16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} (supported: {HEAD_DIMS})", "use device cpu for this model"
    return None
