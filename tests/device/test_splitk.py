"""xformers' own split-K kernel, run by Triton's interpreter, against the reference operator."""

from typing import Any

import numpy as np
import pytest
import torch

from pagedkv.device.operators import PagedBias, ReferenceOp, paged_attention
from pagedkv.device.splitk import SplitKPagedOp, splitk_op

# Of xformers, where it declares its kernels, and of the interpreter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:warmup, rep, and use_cuda_graph"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}  # the interpreter's bfloat16 is wrong


def interpreted(block_size: int) -> type[SplitKPagedOp]:
    """The operator as CUDA gets it, but for where it may run."""
    operator = splitk_op(block_size)
    here = {"SUPPORTED_DEVICES": {"cpu"}, "SUPPORTED_DTYPES": set(TOLERANCE)}
    kernel = type("Interpreted", (operator.KERNEL,), here)
    return type("InterpretedOp", (operator,), here | {"KERNEL": kernel})


class Case:
    """Sequences of (queries, resident tokens) over a shuffled pool."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        block_size: int = 16,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_heads: int = 2,
        group: int = 3,
    ) -> None:
        rng, noise = np.random.default_rng(1), torch.Generator().manual_seed(1)
        queries, self.resident = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        self.starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        width = int(-(-self.resident.max() // block_size)) + 1
        blocks = len(rows) * width
        self.table = rng.permutation(blocks).astype(np.int32).reshape(len(rows), width)
        shape = (blocks, block_size, kv_heads, dim)
        self.key, self.value = (torch.randn(shape, generator=noise).to(dtype) for _ in range(2))
        heads = kv_heads * group
        self.query = torch.randn(int(self.starts[-1]), heads, dim, generator=noise).to(dtype)
        self.block_size = block_size

    def run(self, op: Any, **options: Any) -> tuple[torch.Tensor, PagedBias]:
        bias = PagedBias.build(self.starts, self.resident, self.table, self.block_size, **options)
        return paged_attention(self.query, self.key, self.value, bias, op=op), bias


def agree(case: Case, **options: Any) -> None:
    out, bias = case.run(interpreted(case.block_size), want_block_lse=True, **options)
    want, oracle = case.run(ReferenceOp, want_block_lse=True, **options)
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(bias.lse, oracle.lse, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias.block_lse, oracle.block_lse, atol=1e-3, rtol=1e-3)
    assert bias.block_lse is not None
    torch.testing.assert_close(bias.block_lse.logsumexp(-1).T, bias.lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_decode(dtype: torch.dtype) -> None:
    agree(Case([(1, 5), (1, 33), (1, 16), (1, 1)], dtype=dtype))


def test_decode_and_prefill_in_one_batch() -> None:
    agree(Case([(1, 20), (21, 40), (3, 17), (16, 16), (1, 48)]))


@pytest.mark.parametrize(("block_size", "dim"), [(32, 32), (64, 16), (48, 16)])
def test_block_sizes(block_size: int, dim: int) -> None:
    agree(Case([(1, 50), (5, 70)], block_size=block_size, dim=dim))


def test_many_query_heads_share_a_key() -> None:
    agree(Case([(2, 19), (1, 30)], kv_heads=1, group=9))


def test_every_query_sees_all() -> None:
    agree(Case([(3, 19), (1, 30)]), causal=False)


def test_tiles_of_keys_fit_the_block() -> None:
    sizes = {size: splitk_op(size).KERNEL.BLOCK_N for size in (16, 32, 48, 64, 96, 128, 256)}
    assert sizes == {16: 16, 32: 32, 48: 16, 64: 64, 96: 32, 128: 64, 256: 64}


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (Case([(1, 5)], dim=24), {}, "head_dim 24 is none of"),
        (Case([(1, 5)]), {"window": 3}, "no sliding window"),
    ],
)
def test_refusals_say_why(case: Case, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        case.run(interpreted(16), **options)


def test_the_real_one_is_for_cuda() -> None:
    with pytest.raises(ValueError, match="device=cpu"):
        Case([(1, 5)], dtype=torch.float16).run(splitk_op(16))
