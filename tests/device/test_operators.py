"""The CPU operator against the reference operator, and the reference against torch itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xformers.ops as xops
from hypothesis import given, settings
from hypothesis import strategies as st
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias

from pagedkv.device.operators import (
    CpuPagedOp,
    PagedBias,
    ReferenceOp,
    paged_attention,
)
from pagedkv.device.quantize import quantize

MIXED = ((1, 5), (1, 300), (17, 40), (64, 64), (3, 130), (1, 1), (70, 700))  # (queries, resident)


@dataclass
class Case:
    """A batch over a shuffled pool whose every slot that is not in use holds NaN."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    starts: np.ndarray
    resident: np.ndarray
    table: np.ndarray
    block_size: int

    def bias(self, **options: Any) -> PagedBias:
        return PagedBias.build(self.starts, self.resident, self.table, self.block_size, **options)

    def run(self, op: Any, bias: PagedBias, scale: float | None = None) -> torch.Tensor:
        return paged_attention(self.query, self.key, self.value, bias, scale, op)

    def sequence(self, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [q, Hq, D], k and v [resident, Hkv, D] of one sequence, contiguous."""
        n = int(self.resident[b])
        blocks = torch.from_numpy(self.table[b, : -(-n // self.block_size)].astype(np.int64))
        k, v = (x[blocks].flatten(0, 1)[:n] for x in (self.key, self.value))
        return self.query[self.starts[b] : self.starts[b + 1]], k, v


def make(
    rows: Sequence[tuple[int, int]] = MIXED,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    garbage: int = 2**31 - 1,
    seed: int = 0,
) -> Case:
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    queries, resident = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    blocks = -(-resident // block_size)
    table = np.full((len(rows), blocks.max() + 2), garbage, np.int32)
    free = iter(rng.permutation(blocks.sum() + 3))
    cache = torch.full((2, blocks.sum() + 3, block_size, kv_heads, dim), math.nan, dtype=dtype)
    for b, n in enumerate(resident):
        for i in range(blocks[b]):
            table[b, i] = next(free)
            used = min(block_size, n - i * block_size)
            fresh = torch.randn(2, used, kv_heads, dim, generator=torch_rng)
            cache[:, table[b, i], :used] = fresh.to(dtype)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    query = torch.randn(int(starts[-1]), heads, dim, generator=torch_rng).to(dtype)
    return Case(query, cache[0], cache[1], starts, resident, table, block_size)


def agree(
    case: Case, *, tolerance: float = 1e-5, scale: float | None = None, **options: Any
) -> None:
    """Both operators give the same output, lse and block lse; their block lse adds up."""
    ours, theirs = (case.bias(want_block_lse=True, **options) for _ in range(2))
    got, want = case.run(CpuPagedOp, ours, scale), case.run(ReferenceOp, theirs, scale)
    assert got.dtype == want.dtype == case.query.dtype
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    for bias in (ours, theirs):
        assert bias.lse is not None
        assert bias.block_lse is not None
    torch.testing.assert_close(ours.lse, theirs.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.block_lse, theirs.block_lse, atol=2e-5, rtol=1e-5)
    total = ours.block_lse.logsumexp(-1).T
    torch.testing.assert_close(total, ours.lse, atol=1e-5, rtol=1e-5)


# ---- the oracle itself --------------------------------------------------------------------


def test_reference_is_a_softmax_under_the_materialised_mask() -> None:
    case = make(dim=8, garbage=0)
    for window in (0, 20):
        bias = case.bias(window=window)
        out = case.run(ReferenceOp, bias)
        blocks, size, _, dim = case.key.shape
        width = case.table.shape[1]
        clean = case.bias(window=window)
        tokens = len(case.query)
        # xformers writes a row's entries in order: unused ones must not repeat a used block.
        used = np.arange(width) * size < case.resident[:, None]
        clean.block_tables = torch.from_numpy(np.where(used, case.table, blocks))
        mask = clean.materialize((tokens, len(case.resident) * width * size))[:, : blocks * size]
        k, v = (
            x.flatten(0, 1).nan_to_num().repeat_interleave(2, 1) for x in (case.key, case.value)
        )
        scores = torch.einsum("qhd,khd->hqk", case.query, k) * dim**-0.5 + mask
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_reference_is_torch_attention_on_each_sequence() -> None:
    case = make()
    out = case.run(ReferenceOp, case.bias())
    for b in range(len(case.resident)):
        q, k, v = case.sequence(b)
        n = len(k)
        mask = torch.ones(len(q), n, dtype=torch.bool).tril(n - len(q))
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
        )
        rows = slice(case.starts[b], case.starts[b + 1])
        torch.testing.assert_close(out[rows], want.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_window_is_mistrals() -> None:
    """Key k is visible to query q only if q - k < window, as in transformers' sliding mask."""
    case = make([(6, 9)], dim=8)
    out = case.run(ReferenceOp, case.bias(window=3))
    q, k, v = case.sequence(0)
    position = torch.arange(3, 9)[:, None]
    key = torch.arange(9)
    mask = (key <= position) & (position - key < 3)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out, want.transpose(0, 1), atol=1e-5, rtol=1e-5)


# ---- the kernel against the oracle --------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 32, 100, 256])
def test_block_sizes(block_size: int) -> None:
    agree(make(block_size=block_size))
    agree(make(block_size=block_size), window=37)


@pytest.mark.parametrize("dim", [3, 8, 16, 20, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (9, 3), (5, 1), (14, 2), (8, 1), (40, 2)])
def test_head_sizes_and_groups(dim: int, heads: int, kv_heads: int) -> None:
    agree(make(MIXED[:5], dim=dim, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=["fp16", "bf16"]
)
@pytest.mark.parametrize("dim", [20, 64])
def test_narrow_storage(dtype: torch.dtype, tolerance: float, dim: int) -> None:
    agree(make(dtype=dtype, dim=dim), tolerance=tolerance)
    agree(make(dtype=dtype, dim=dim), tolerance=tolerance, window=50)


@pytest.mark.parametrize("dim", [4, 20, 64, 128])
def test_packed_in_8_bits(dim: int) -> None:
    case = make(dim=dim)
    case.key, case.value = quantize(case.key), quantize(case.value)
    agree(case)
    agree(case, window=50)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_storage_under_exact_queries(dtype: torch.dtype) -> None:
    """Only the rounding of the query tells it from the same numbers stored in fp32."""
    narrow, exact = make(), make()
    narrow.key, narrow.value = narrow.key.to(dtype), narrow.value.to(dtype)
    exact.query = narrow.query.to(dtype).float()
    exact.key, exact.value = narrow.key.float(), narrow.value.float()
    out = narrow.run(CpuPagedOp, narrow.bias())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact.run(CpuPagedOp, exact.bias()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 64, 299, 5000])
def test_windows(window: int) -> None:
    agree(make(), window=window)


def test_custom_scale() -> None:
    agree(make(), scale=0.7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*(make().run(CpuPagedOp, make().bias(), s) for s in (0.7, 0.1)))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 600)), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 5, 16, 64, 130]),
    groups=st.sampled_from([(1, 1), (6, 2), (16, 1)]),
    window=st.sampled_from([0, 0, 1, 33, 200]),
    seed=st.integers(0, 9),
)
def test_any_batch(
    rows: list[tuple[int, int]],
    block_size: int,
    groups: tuple[int, int],
    window: int,
    seed: int,
) -> None:
    """Zero-scheduled rows, empty sequences and queries before the first key included."""
    heads, kv_heads = groups
    case = make(rows, block_size=block_size, heads=heads, kv_heads=kv_heads, dim=16, seed=seed)
    agree(case, window=window)


def test_faint_blocks_keep_their_lse() -> None:
    """A block whose mass is far below fp32's smallest number still has a finite, right lse."""
    for rows in ([(1, 64)], [(1, 70)], [(1, 128)], [(40, 64)]):
        case = make(rows, heads=1, kv_heads=1, block_size=16)
        case.query[:] = 0
        case.query[..., 0] = 1
        for block, level in zip(case.table[0], (0.0, 900.0, -900.0, 30.0), strict=False):
            case.key[block, :, 0, 0] = level
        agree(case, scale=1.0)
        bias = case.bias(want_block_lse=True)
        case.run(CpuPagedOp, bias, 1.0)
        assert bias.block_lse is not None
        last = bias.block_lse[-1, 0, :4]
        want = torch.tensor([0.0, 900.0, -900.0, 30.0]) + math.log(16)
        torch.testing.assert_close(last, want)


@pytest.mark.parametrize("heads", [1, 5])
def test_tiles_of_every_number_of_vectors(heads: int) -> None:
    """What is left over after three vectors of query rows at a time, and lines of 1 KiB."""
    for queries in (17, 33, 49, 65, 101, 128, 256):
        agree(make([(queries, 300)], heads=heads, kv_heads=1, dim=20), window=90)
    agree(make([(64, 200)], heads=4, kv_heads=1, dim=256))


# ---- what the engine relies on ------------------------------------------------------------


def test_a_sequence_does_not_feel_its_batch() -> None:
    """Bit for bit: alone, in the batch, and with one thread."""
    rows = [*MIXED, (1, 2500), (2, 900), (130, 1500)]
    case = make(rows, heads=6, kv_heads=2, dim=32)
    bias = case.bias(want_block_lse=True)
    together = case.run(CpuPagedOp, bias)
    assert bias.block_lse is not None
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(case.run(CpuPagedOp, case.bias()), together)
    finally:
        torch.set_num_threads(threads)
    for b in range(len(rows)):
        part = slice(case.starts[b], case.starts[b + 1])
        one = PagedBias.build(
            np.array([0, rows[b][0]]),
            case.resident[b : b + 1],
            case.table[b : b + 1],
            case.block_size,
            want_block_lse=True,
        )
        alone = paged_attention(case.query[part], case.key, case.value, one)
        assert torch.equal(alone, together[part])
        assert one.block_lse is not None
        assert torch.equal(one.block_lse, bias.block_lse[part])


def test_asking_for_block_lse_leaves_the_output_alone() -> None:
    case = make()
    with_lse = case.run(CpuPagedOp, case.bias(want_block_lse=True))
    assert torch.equal(with_lse, case.run(CpuPagedOp, case.bias()))


def test_a_bias_serves_every_layer() -> None:
    """Second call on one bias: same cut, other tensors, nothing left over from the first."""
    first, second = make(seed=1), make(seed=2)
    second.table[:], second.key, second.value = first.table, first.key * 2, first.value - 1
    bias = first.bias(want_block_lse=True)
    first.run(CpuPagedOp, bias)
    kept = bias.block_lse
    assert kept is not None
    was = kept.clone()
    again = second.run(CpuPagedOp, bias)
    assert torch.equal(kept, was)  # observers keep it
    assert bias.block_lse is not kept
    fresh = first.bias(want_block_lse=True)
    assert torch.equal(second.run(CpuPagedOp, fresh), again)
    assert fresh.block_lse is not None
    assert bias.block_lse is not None
    assert torch.equal(fresh.block_lse, bias.block_lse)


def test_block_lse_gives_the_mass_of_each_block() -> None:
    case = make([(1, 100)], heads=2, kv_heads=1)
    bias = case.bias(want_block_lse=True)
    out = case.run(CpuPagedOp, bias)
    assert bias.block_lse is not None
    assert bias.lse is not None
    mass = (bias.block_lse[0] - bias.lse[:, :1]).exp()
    q, k, _ = case.sequence(0)
    weights = (torch.einsum("qhd,kgd->hk", q, k) * 16**-0.5).softmax(-1)
    want = torch.nn.functional.pad(weights, (0, 12)).view(2, 7, 16).sum(-1)
    torch.testing.assert_close(mass[:, :7], want)
    assert (mass[:, 7:] == 0).all()
    assert out.shape == (1, 2, 16)


def test_nothing_to_do() -> None:
    case = make([(0, 20), (0, 0)])
    assert case.run(CpuPagedOp, case.bias(want_block_lse=True)).shape == (0, 4, 16)


def test_strided_caches() -> None:
    """Keys and values that are slices of one fused tensor are read where they lie."""
    case = make(dim=32)
    want = case.run(CpuPagedOp, case.bias())
    fused = torch.stack([case.key, case.value], dim=-2).contiguous()  # [.., heads, 2, D]
    k, v = (fused[..., i, :].view(1, -1, 2, 1, 32).expand(-1, -1, 2, 2, 32) for i in (0, 1))
    q = case.query.view(1, -1, 2, 2, 32)
    got = xops.memory_efficient_attention_forward(q, k, v, case.bias(), op=CpuPagedOp)
    assert torch.equal(got.view_as(want), want)


# ---- xformers' contract -------------------------------------------------------------------


@pytest.mark.parametrize("op", [CpuPagedOp, ReferenceOp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial(op: Any, dtype: torch.dtype) -> None:
    """Halves of the keys, merged by lse, are the whole; shapes are xformers'."""
    case = make([(1, 64), (1, 96)], dtype=dtype)
    shape = (1, -1, 2, 1, 16)
    k, v = (x.view(shape).expand(1, -1, 2, 2, 16) for x in (case.key, case.value))
    q = case.query.view(1, 2, 2, 2, 16)
    outs, lses = [], []
    for half in (slice(0, 2), slice(2, 6)):
        resident = np.clip(case.resident - half.start * 16, 0, (half.stop - half.start) * 16)
        bias = PagedBias.build(case.starts, resident, case.table[:, half], 16)
        out, lse = fmha.memory_efficient_attention_partial(q, k, v, bias, op=op)
        assert out.dtype == lse.dtype == torch.float32
        assert lse.shape == (1, 2, 2, 2)  # [1, groups, heads, queries]
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0)
    merged = (torch.stack(outs) * weights.movedim(-1, 2)[..., None]).sum(0)
    whole = xops.memory_efficient_attention_forward(
        q, k, v, case.bias(), op=op, output_dtype=torch.float32
    )
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)


def test_bmhk_without_groups() -> None:
    case = make(heads=3, kv_heads=3)
    q, k, v = case.query[None], case.key.flatten(0, 1)[None], case.value.flatten(0, 1)[None]
    got = xops.memory_efficient_attention_forward(q, k, v, case.bias(), op=CpuPagedOp)
    torch.testing.assert_close(got[0], case.run(ReferenceOp, case.bias()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_stock_paged_masks(causal: bool) -> None:
    case = make()
    queries = np.diff(case.starts).tolist()
    kind = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    if not causal:
        kind = attn_bias.PagedBlockDiagonalPaddedKeysMask
    bias = kind.from_seqlens(
        queries, case.resident.tolist(), torch.from_numpy(case.table), case.block_size
    )
    got, want = case.run(CpuPagedOp, bias), case.run(ReferenceOp, bias)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    ours = case.run(CpuPagedOp, case.bias())
    assert torch.equal(got, ours) == causal


@pytest.mark.parametrize(
    "kind",
    [
        attn_bias.BlockDiagonalMask,
        attn_bias.BlockDiagonalCausalMask,
        attn_bias.BlockDiagonalCausalFromBottomRightMask,
        attn_bias.BlockDiagonalPaddedKeysMask,
        attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    ],
    ids=lambda kind: kind.__name__,
)
def test_masks_over_contiguous_keys(kind: Any) -> None:
    queries, keys = [3, 40, 1], [20, 50, 400]
    if "Padded" in kind.__name__:
        bias = kind.from_seqlens(q_seqlen=queries, kv_padding=400, kv_seqlen=keys)
        total = 1200
    else:
        bias, total = kind.from_seqlens(queries, keys), sum(keys)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 4, 24, generator=generator) for n in (44, total, total))
    mask = bias.materialize((44, total))
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0]) * 24**-0.5 + mask
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[0])
    for op in (CpuPagedOp, ReferenceOp):
        got = xops.memory_efficient_attention_forward(q, k, v, bias, op=op)
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


def test_refusals_name_the_reason() -> None:
    case = make()
    k = case.key.view(1, -1, 2, 1, 16).expand(1, -1, 2, 2, 16)
    q = case.query.view(1, -1, 2, 2, 16)

    def refused(bias: Any, query: torch.Tensor = q) -> str:
        with pytest.raises(ValueError, match="is not supported because") as caught:
            xops.memory_efficient_attention_forward(query, k, k, bias, op=CpuPagedOp)
        return str(caught.value)

    assert "attn_bias type is <class 'xformers" in refused(xops.LowerTriangularMask())
    assert "the bias is for 157 queries, not 1" in refused(case.bias(), q[:, :1])
    case.table[1, 0] = 10_000
    assert "leads outside" in refused(case.bias())
    case.table[1, 0] = -1
    assert "leads outside" in refused(case.bias())
    case.table[1, 0] = 0
    case.resident[1] = 100_000
    assert "more tokens than its row" in refused(case.bias())


def test_gradients_are_refused() -> None:
    case = make()
    case.query.requires_grad_()
    with pytest.raises(ValueError, match="no backward pass"):
        case.run(CpuPagedOp, case.bias())
    with torch.no_grad():
        assert case.run(CpuPagedOp, case.bias()).isfinite().all()


@pytest.mark.parametrize("change", ["wider", "more", "strided"])
def test_caches_that_are_not_alike_or_not_whole_are_refused(change):
    keys = torch.zeros(2, 4, 2, 32)
    values = {
        "wider": torch.zeros(2, 4, 2, 64),
        "more": torch.zeros(3, 4, 2, 32),
        "strided": torch.zeros(2, 4, 2, 64)[..., ::2],
    }[change]
    bias = PagedBias.build(
        np.array([0, 1], np.int32), np.ones(1, np.int32), np.zeros((1, 1), np.int32), 4
    )
    with pytest.raises(ValueError, match="cache"):
        paged_attention(torch.zeros(1, 2, 32), keys, values, bias)
