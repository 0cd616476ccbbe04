"""The operators as CUDA gets them, but for where they run: Triton's interpreter, on a CPU."""

from typing import Any

import torch

from pagedkv.device.gathered import GatheredOp
from pagedkv.device.library import triton_splitk
from pagedkv.device.splitk import SplitKPagedOp, splitk_op
from pagedkv.device.tiled import TiledOp

__all__ = ["TOLERANCE", "gathered", "interpreted"]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}  # the interpreter's bfloat16 is wrong
HERE = {"SUPPORTED_DEVICES": {"cpu"}, "SUPPORTED_DTYPES": set(TOLERANCE)}


def interpreted(block_size: int) -> type[SplitKPagedOp]:
    """The operator that reads blocks in place."""
    operator = splitk_op(block_size)
    kernel = type("Interpreted", (operator.KERNEL,), HERE)
    return type("InterpretedOp", (operator,), HERE | {"KERNEL": kernel})


def gathered(_block_size: int) -> type[TiledOp]:
    """The one that gathers them; of xformers' ordinary operators the interpreter runs this one."""
    kernel: dict[str, Any] = HERE | {"BLOCK_N": 16}
    limits = {"KERNEL": type("Interpreted", (triton_splitk.FwOp,), kernel), "MOST_QUERIES": 16}
    return type("GatheredHere", (GatheredOp,), HERE | limits)
