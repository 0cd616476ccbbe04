"""Attention on CUDA over blocks read in place: xformers' split-K kernel behind our contract.

The kernel wants at most 16 queries in a sequence, equally many in each, so a batch is cut into
tiles and tiles of one length run together: a decode step is one call. It knows no block lse; that
comes from a second call in which each (query, block) pair is a sequence of its own.

Without a GPU the same kernel runs under Triton's interpreter (`tests/device/test_splitk.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from .operators import PagedBias, PagedOp, common, outputs, read, result, triton_splitk
from .reference import Batch

__all__ = ["BLOCK_SIZES", "HEAD_DIMS", "SplitKPagedOp", "splitk_op"]

Ints = npt.NDArray[np.int64]

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
BLOCK_SIZES = (64, 32, 16)  # a block holds whole tiles of one of these many keys
_MOST_QUERIES = 16  # in a sequence, under a causal mask


@dataclass(frozen=True)
class _Part:
    """Sequences of equally many queries: which queries of the batch they are, and their mask."""

    queries: torch.Tensor  # int64[N * each]
    bias: Any


class SplitKPagedOp(PagedOp):
    """Paged attention by `KERNEL`; subclasses say on what device and in what tiles of keys."""

    NAME = "pagedkv_splitk"
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cuda"}
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = {torch.float16, torch.bfloat16}
    KERNEL: ClassVar[Any] = triton_splitk.FwOp

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs cannot be run; empty if they can."""
        reasons: list[str] = super().not_supported_reasons(d)
        if reasons:
            return reasons
        batch = read(d.attn_bias)
        if batch.window:
            reasons.append("the split-K kernel has no sliding window over paged keys")
        if batch.block_size % cls.KERNEL.BLOCK_N:
            reasons.append(f"block_size {batch.block_size} is not a multiple of 16")
        if d.query.shape[-1] not in HEAD_DIMS:
            reasons.append(f"head_dim {d.query.shape[-1]} is none of {HEAD_DIMS}")
        return reasons

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """Run attention; returns (out, Context(out, lse)).

        Cost: one kernel launch for each length of tile, at most 16; one more for block lse, which
        reads every block again for every query.
        """
        q, k, v = inp.get_qkv_in_bmghk()
        out, lse, block_lse = outputs(inp, q)
        batch, prepared = read(inp.attn_bias), getattr(inp.attn_bias, "prepared", {})
        if "tiles" not in prepared:
            prepared["tiles"] = list(_tiles(batch, q.device))
        for part in prepared["tiles"]:
            partial, logs = cls._run(q, k, v, part, inp.scale_float)
            out.index_copy_(1, part.queries, partial.unsqueeze(0))
            lse.index_copy_(1, part.queries, logs)
        if block_lse is not None:
            if "pairs" not in prepared:
                prepared["pairs"] = _pairs(batch, q.device)
            part, entries = prepared["pairs"]
            _, logs = cls._run(q, k, v, part, inp.scale_float)
            block_lse.fill_(-torch.inf)
            block_lse[part.queries, :, entries] = logs.t()
        return result(inp, out, lse)

    @classmethod
    def _run(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: _Part, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One launch: fp32 out [N, G, H, D] and lse [G * H, N]."""
        _, _, groups, heads, dim = q.shape
        asked = q.index_select(1, part.queries)
        inputs = common.Inputs(asked, k, v, attn_bias=part.bias, scale=scale)
        out, context = cls.KERNEL.apply(inputs, needs_gradient=True)
        shape = groups, heads, dim
        return out.reshape(-1, *shape).float(), context.lse.reshape(groups * heads, -1).float()


def splitk_op(block_size: int) -> type[SplitKPagedOp]:
    """Return the operator whose tiles of keys fit this block size.

    Args:
        block_size: A multiple of 16.
    """
    keys = next(size for size in BLOCK_SIZES if block_size % size == 0)
    kernel = type(f"SplitK{keys}", (triton_splitk.FwOp,), {"BLOCK_N": keys})
    return type(f"SplitKPagedOp{keys}", (SplitKPagedOp,), {"KERNEL": kernel})


def _mask(queries: Ints, each: int, lengths: Ints, table: Any, batch: Batch, device: Any) -> _Part:
    starts = np.arange(0, len(queries) + 1, each, dtype=np.int32)
    bias = PagedBias.build(starts, lengths, table, batch.block_size, device=device)
    return _Part(torch.from_numpy(queries).to(device), bias.plain())


def _tiles(batch: Batch, device: torch.device) -> Iterator[_Part]:
    """Cut the batch's queries into tiles, and gather those of one length."""
    counts = np.diff(batch.query_start)
    most = _MOST_QUERIES if batch.causal else 1
    tiles = -(-counts // most)
    row = np.repeat(np.arange(len(counts)), tiles)
    begin = (np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * most
    length = np.minimum(most, counts[row] - begin)
    for each in np.unique(length).tolist():
        chosen = length == each
        rows, first = row[chosen], begin[chosen]
        last = first + each - 1 if batch.causal else 0
        seen = np.clip(batch.first_limit[rows] + last, 0, batch.resident[rows])
        queries = (batch.query_start[rows] + first)[:, None] + np.arange(each)
        yield _mask(queries.ravel(), each, seen, batch.table[rows], batch, device)


def _pairs(batch: Batch, device: torch.device) -> tuple[_Part, torch.Tensor]:
    """Make a sequence of each query and block that it sees; also which table entry each is."""
    counts = np.diff(batch.query_start)
    row = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(row)) - batch.query_start[row] if batch.causal else 0
    limit = np.clip(batch.first_limit[row] + index, 0, batch.resident[row])
    entry = np.arange(batch.table.shape[1])
    inside = np.minimum(limit[:, None] - entry * batch.block_size, batch.block_size)
    query, at = np.nonzero(inside > 0)
    blocks = batch.table[row[query], at][:, None]
    part = _mask(query.astype(np.int64), 1, inside[query, at], blocks, batch, device)
    return part, torch.from_numpy(at).to(device)
