"""Cutting a batch into launches of xformers' kernels: equally many queries in every sequence.

Triton compiles a kernel anew for every number of sequences and width of a table, so both are
rounded up to one of four sizes per power of two; what is added is computed and thrown away.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pagedkv.core.arrays import Int32, Int64
from pagedkv.device.reference import Batch

__all__ = ["Tiles", "pairs", "rounded", "tiles"]


@dataclass(frozen=True)
class Tiles:
    """N sequences of equally many queries each, over their own rows of a block table.

    Attributes:
        queries: [N, each] Which queries of the batch they are.
        first: [N] Where the keys that the last of them sees begin.
        end: [N] Where they end; a causal mask hides one more from each query before it.
        table: [N, W]
        num_real: Of the N; the rest only round it up.
        entry: [N] Where each tile is a single block: which entry of its sequence's table.
    """

    queries: Int64
    first: Int32
    end: Int32
    table: Int32
    num_real: int
    entry: Int64 | None = None


def rounded(count: int) -> int:
    """Return the next of the sizes that are made use of: 1 .. 8, 10, 12, 14, 16, 20 ..."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def tiles(batch: Batch, most: int) -> Iterator[Tiles]:
    """Cut a batch into tiles of at most `most` queries, and gather those of one length.

    A mask can only be causal or begin late: under a sliding window, and without a causal mask,
    every query is a tile.
    """
    counts = np.diff(batch.query_start)
    most = most if batch.causal and not batch.window else 1
    parts = -(-counts // most)
    row = np.repeat(np.arange(len(counts)), parts)
    begin = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)) * most
    length = np.minimum(most, counts[row] - begin)
    for each in np.unique(length).tolist():
        chosen = length == each
        rows, start = row[chosen], begin[chosen]
        end = _limit(batch, rows, start + each - 1)
        first = np.maximum(end - batch.window, 0) if batch.window else np.zeros_like(end)
        queries = (batch.query_start[rows] + start)[:, None] + np.arange(each)
        yield _padded(Tiles(queries, first, end, batch.table[rows], len(rows)))


def pairs(batch: Batch) -> Tiles:
    """Make a tile of each query and block that it sees."""
    counts = np.diff(batch.query_start)
    row = np.repeat(np.arange(len(counts)), counts)
    end = _limit(batch, row, np.arange(len(row)) - batch.query_start[row])[:, None]
    begin = np.maximum(end - batch.window, 0) if batch.window else np.zeros_like(end)
    slots = np.arange(batch.table.shape[1], dtype=np.int32) * np.int32(batch.block_size)
    first, last = (np.clip(x - slots, 0, batch.block_size) for x in (begin, end))
    query, entry = np.nonzero(first < last)
    blocks = batch.table[row[query], entry][:, None]
    at = query, entry
    return _padded(Tiles(query[:, None], first[at], last[at], blocks, len(query), entry))


def _limit(batch: Batch, rows: Int64, index: Int64) -> Int32:
    """How many keys, from a sequence's first, its query of this index sees; window aside."""
    seen = batch.first_limit[rows] + (index if batch.causal else 0)
    return np.clip(seen, 0, batch.resident[rows]).astype(np.int32)


def _padded(cut: Tiles) -> Tiles:
    """Round N and W up. What is added are tiles that see the first slot of block 0."""
    more = rounded(len(cut.end)) - len(cut.end)
    # Entries past a sequence's blocks hold anything; a gather would read them.
    used = cut.table.shape[1]
    table = np.zeros((len(cut.end) + more, rounded(used)), np.int32)
    table[: len(cut.end), :used] = cut.table
    return replace(
        cut,
        queries=np.pad(cut.queries, ((0, more), (0, 0))),
        first=np.pad(cut.first, (0, more)).astype(np.int32),
        end=np.pad(cut.end, (0, more), constant_values=1).astype(np.int32),
        table=table,
    )
