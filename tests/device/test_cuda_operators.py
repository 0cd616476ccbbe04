"""xformers' own kernels, run by Triton's interpreter, against the reference operator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from xformers.ops import fmha

from pagedkv.device.operators import PagedBias, PagedOp, ReferenceOp, paged_attention
from pagedkv.device.quantize import quantize, quantize4
from pagedkv.device.splitk import splitk_op
from pagedkv.device.tiles import pairs, rounded, tiles
from pagedkv.device.turned import TurnedBias
from pagedkv.device.turns import Turns
from pagedkv.errors import UnsupportedBackend
from tests.device.interpreted import TOLERANCE, gathered, interpreted

# Of xformers, where it declares its kernels, and of the interpreter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:warmup, rep, and use_cuda_graph"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
]

Make = Callable[[int], type[PagedOp]]
BOTH = pytest.mark.parametrize("make", [interpreted, gathered])


class Case:
    """Sequences of (queries, resident tokens) over a shuffled pool, NaN where nobody may look."""

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
        for row, tokens in zip(self.table, self.resident, strict=True):
            for i, block in enumerate(row):
                beyond = min(block_size, max(0, int(tokens) - i * block_size))
                self.key[block, beyond:] = self.value[block, beyond:] = torch.nan
        self.table[np.arange(width) * block_size >= self.resident[:, None]] = 2**31 - 1
        heads = kv_heads * group
        self.query = torch.randn(int(self.starts[-1]), heads, dim, generator=noise).to(dtype)
        self.block_size = block_size

    def packed(self, pack: Callable[[torch.Tensor], torch.Tensor]) -> "Case":
        self.key, self.value = pack(self.key), pack(self.value)
        return self

    def run(self, op: type[PagedOp], **options: Any) -> tuple[torch.Tensor, PagedBias]:
        bias = PagedBias.build(self.starts, self.resident, self.table, self.block_size, **options)
        return paged_attention(self.query, self.key, self.value, bias, op=op), bias


def agree(make: Make, case: Case, **options: Any) -> None:
    out, bias = case.run(make(case.block_size), want_block_lse=True, **options)
    want, oracle = case.run(ReferenceOp, want_block_lse=True, **options)
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(bias.lse, oracle.lse, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias.block_lse, oracle.block_lse, atol=1e-3, rtol=1e-3)
    assert bias.block_lse is not None
    torch.testing.assert_close(bias.block_lse.logsumexp(-1).T, bias.lse, atol=1e-3, rtol=1e-3)


# ---- both paths against the reference -----------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_decode(make: Make, dtype: torch.dtype) -> None:
    agree(make, Case([(1, 5), (1, 33), (1, 16), (1, 1)], dtype=dtype))


@BOTH
def test_decode_and_prefill_in_one_batch(make: Make) -> None:
    agree(make, Case([(1, 20), (21, 40), (3, 17), (16, 16), (1, 48)]))


@pytest.mark.parametrize(
    ("make", "block_size", "dim"),
    [
        (interpreted, 64, 16),
        (interpreted, 48, 16),
        (gathered, 48, 16),
        (gathered, 7, 32),
    ],
)
def test_block_sizes(make: Make, block_size: int, dim: int) -> None:
    agree(make, Case([(1, 50), (5, 70)], block_size=block_size, dim=dim))


def test_single_slots() -> None:
    """What policies that rank tokens listen with."""
    assert interpreted(16).by_slot().NAME == gathered(16).NAME
    agree(gathered, Case([(1, 9), (2, 12)], block_size=1))


@BOTH
def test_many_query_heads_share_a_key(make: Make) -> None:
    agree(make, Case([(2, 19), (1, 30)], kv_heads=1, group=9))


@BOTH
def test_every_query_sees_all(make: Make) -> None:
    agree(make, Case([(3, 19), (1, 30)]), causal=False)


@BOTH
@pytest.mark.parametrize("window", [1, 20])
def test_sliding_windows(make: Make, window: int) -> None:
    agree(make, Case([(1, 50), (3, 19), (1, 5)]), window=window)


@BOTH
def test_sequences_that_see_nothing(make: Make) -> None:
    agree(make, Case([(1, 0), (2, 1), (1, 18)]))


@pytest.mark.parametrize(
    ("make", "pack"), [(interpreted, quantize4), (gathered, quantize4), (gathered, quantize)]
)
def test_quantised_keys_and_values(make: Make, pack: Callable[..., torch.Tensor]) -> None:
    """4 bits by the split-K kernel itself; either widened by the gather."""
    rows = [(1, 33), (3, 17), (1, 5)]
    agree(make, Case(rows, dtype=torch.float16, dim=32).packed(pack))
    agree(make, Case(rows, dtype=torch.float16, dim=32).packed(pack), window=9)


# ---- what is made of partial attentions ---------------------------------------------------


def test_parts_by_xformers_merged_by_xformers_are_the_whole() -> None:
    case = Case([(1, 64), (1, 96), (2, 40)], kv_heads=2, group=2)
    want, oracle = case.run(ReferenceOp)
    shape = (1, -1, 2, 1, 16)
    key, value = (x.view(shape).expand(1, -1, 2, 2, 16) for x in (case.key, case.value))
    query = case.query.view(1, -1, 2, 2, 16)
    parts = []
    for half in (slice(0, 2), slice(2, None)):
        ends = (half.stop or 99) * 16
        resident = np.clip(case.resident, half.start * 16, ends) - half.start * 16
        # Causal where the last tokens are, that is in the second half of each.
        bias = PagedBias.build(
            case.starts, resident, case.table[:, half], 16, causal=half.start > 0
        )
        operator = interpreted(16)
        parts.append(fmha.memory_efficient_attention_partial(query, key, value, bias, op=operator))
    outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    out, lse = fmha.merge_attentions(outs, lses)
    torch.testing.assert_close(out.view_as(want).float(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.view_as(oracle.lse).float(), oracle.lse, atol=1e-3, rtol=1e-3)


@BOTH
def test_runs_of_turned_queries_merge_to_what_the_reference_gives(make: Make) -> None:
    case = Case([(1, 60), (3, 40), (1, 5)])
    turns = np.zeros_like(case.table)
    turns[0, :2], turns[0, 2], turns[1, 0] = 7, 3, -4
    frequencies = tuple(1 / 10 ** (i / 8) for i in range(8))

    def run(op: type[PagedOp]) -> tuple[torch.Tensor, TurnedBias]:
        bias = TurnedBias(
            case.starts,
            case.resident,
            case.table,
            16,
            Turns(turns, frequencies),
            want_block_lse=True,
        )
        return bias.attend(case.query, case.key, case.value, 0.25, op), bias

    (out, bias), (want, oracle) = run(make(16)), run(ReferenceOp)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.lse, oracle.lse, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias.block_lse, oracle.block_lse, atol=1e-3, rtol=1e-3)


# ---- launches -----------------------------------------------------------------------------


def test_few_shapes_are_launched_so_few_are_compiled() -> None:
    sizes = {rounded(count) for count in range(1, 1025)}
    assert len(sizes) <= 8 + 4 * 7
    assert all(count <= rounded(count) <= count * 1.25 for count in range(1, 1025))


def test_a_decode_step_is_one_launch_and_its_block_lse_another() -> None:
    case = Case([(1, 5), (1, 33), (1, 16)])
    _, bias = case.run(interpreted(16), want_block_lse=True)
    assert len(bias.prepared["tiles"]) == 1
    batch = bias.prepared["batch"]
    (cut,) = tiles(batch, 16)
    assert (cut.num_real, cut.queries.shape[1]) == (3, 1)
    assert pairs(batch).num_real == 1 + 3 + 1


def test_tiles_of_keys_fit_the_block() -> None:
    sizes = {size: splitk_op(size).KERNEL.BLOCK_N for size in (16, 32, 48, 64, 96, 128, 256)}
    assert sizes == {16: 16, 32: 32, 48: 16, 64: 64, 96: 32, 128: 64, 256: 64}


# ---- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "case", "reason"),
    [
        (interpreted, Case([(1, 5)], dim=24), "head_dim 24 is none of"),
        (gathered, Case([(1, 5)], dim=20), "head_dim 20 is not a multiple of 8"),
        (interpreted, Case([(1, 5)], block_size=8), "block_size 8 is not a multiple"),
        (interpreted, Case([(1, 5)], dim=32).packed(quantize), "packed rows of 9 words"),
    ],
)
def test_refusals_say_why(make: Make, case: Case, reason: str) -> None:
    op = make(16)
    with pytest.raises(ValueError, match=reason):
        case.run(op)


def test_the_real_one_is_for_cuda() -> None:
    with pytest.raises(ValueError, match="device=cpu"):
        Case([(1, 5)], dtype=torch.float16).run(splitk_op(16))


def test_a_kernel_that_does_not_compile_is_a_typed_error() -> None:
    """With the operator's name and the first line of what went wrong."""
    good = interpreted(16)
    keys = torch.zeros(2, 16, 1, 16)
    good.get_ready(keys, torch.float32, 3, 16)

    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("PTX codegen failed\nand much more")

    kernel = type("Broken", (good.KERNEL,), {"apply": broken})  # type: ignore[attr-defined]
    bad = type("BrokenOp", (good,), {"KERNEL": kernel})
    told = r"pagedkv_splitk was tried.*\(PTX codegen failed\)"
    with pytest.raises(UnsupportedBackend, match=told):
        bad.get_ready(keys, torch.float32, 3, 16)
    with pytest.raises(UnsupportedBackend, match=told):
        Case([(1, 5)]).run(bad)  # in a step, where a shape comes for the first time
