"""The table of operators: what serves which device, dtype, block size and head size."""

import pytest
import torch

from pagedkv.device.dispatch import choose_operator
from pagedkv.device.operators import CpuPagedOp
from pagedkv.device.splitk import SplitKPagedOp
from pagedkv.errors import UnsupportedBackend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 256])
@pytest.mark.parametrize("head_dim", [1, 24, 64, 576])
def test_the_cpu_takes_any_shape(dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    operator = choose_operator("cpu", dtype, block_size=block_size, head_dim=head_dim)
    assert operator is CpuPagedOp


@pytest.mark.parametrize(("block_size", "tile"), [(16, 16), (32, 32), (48, 16), (64, 64)])
@pytest.mark.parametrize("head_dim", [16, 64, 512])
def test_cuda_reads_in_place_in_tiles_that_fit(block_size: int, tile: int, head_dim: int) -> None:
    for dtype in FLOATS[1:]:
        operator = choose_operator("cuda:0", dtype, block_size=block_size, head_dim=head_dim)
        assert issubclass(operator, SplitKPagedOp)
        assert tile == operator.KERNEL.BLOCK_N


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "told"),
    [
        ("cpu", torch.float64, {}, r"pagedkv_cpu was tried and refused: dtype=torch\.float64"),
        ("mps", torch.float32, {}, "pagedkv_cpu was tried and refused: device=mps"),
        ("cuda", torch.float32, {}, r"pagedkv_splitk was tried and refused: dtype=torch\.float32"),
        ("cuda", torch.float16, {"block_size": 8}, "block_size=8.* use a multiple of 16"),
        ("cuda", torch.float16, {"head_dim": 80}, "head_dim=80.* use device cpu"),
    ],
)
def test_refusals_name_what_was_tried_and_why(
    device: str, dtype: torch.dtype, shape: dict[str, int], told: str
) -> None:
    with pytest.raises(UnsupportedBackend, match=told):
        choose_operator(device, dtype, **shape)
