"""Cuts a batch into work items for the CPU kernel: numpy only, once per step.

An item is a tile of queries of one sequence, a span of its keys and a range of KV heads. How a
sequence is cut depends on nothing but its own lengths, so its result does not depend on the batch.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.device.reference import CONTIGUOUS

from . import layout as at
from .simd import LANES

__all__ = ["Shape", "Work", "cut"]

Ints = npt.NDArray[np.int64]

_WIDE_FROM = 16  # query rows per KV head from which lanes over rows pay
_WIDE_ROWS = 384  # query rows of a wide item at most: each copies its keys and values anew
# Keys of a span in decode: whole tiles, and few enough that one long row uses all cores.
_NARROW_SPAN = 3 * at.TILE
_WIDE_SPAN = 1024
_WIDE_ITEMS = 16  # a wide sequence with fewer items than this also cuts its keys


@dataclass(frozen=True)
class Shape:
    """What the cut depends on besides the lengths."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    width: int
    window: int
    causal: bool
    turned: bool = False


@dataclass(frozen=True)
class Work:
    """The items of a step and the memory they need; reused by every layer of the step.

    items: int64[n, NUM_FIELDS]. arrived: int64[tiles], zero between calls.
    scratch_bytes: for each thread. partial_bytes: for all spans together.
    """

    items: Ints
    arrived: Ints
    scratch_bytes: int
    partial_bytes: int
    any_wide: bool
    buffers: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def runs(self, threads: int) -> Ints:
        """Where runs of items begin, and where the last ends: threads take one run at a time.

        In decode, what a thread attends to next is asked for ahead of its use, as far as its run
        goes. So first runs are long, half of what is left to each thread, and later ones short:
        then a slow core costs little. No result depends on it.
        """
        left, sizes = len(self.items), []
        while left:
            size = 1 if self.any_wide else max(1, left // (2 * threads))
            count = threads if size > 1 else left
            sizes.append(np.full(count, size))
            left -= size * count
        return np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64)

    def memory(self, threads: int) -> npt.NDArray[np.uint8]:
        """Scratch for `threads` threads followed by the partial results; kept for the next call."""
        if threads not in self.buffers:
            size = threads * self.scratch_bytes + self.partial_bytes + 64
            self.buffers[threads] = np.empty(size, np.uint8)
        return self.buffers[threads]


def cut(query_start: Ints, resident: Ints, first_limit: Ints, shape: Shape) -> Work:
    """Cut a batch into items, costly ones first.

    Args:
        query_start: int64[B + 1], where each sequence's queries begin in the packed batch.
        resident: int64[B], keys of each sequence.
        first_limit: int64[B], how many keys a sequence's first query sees (may be negative).
        shape: Heads, sizes, window; `causal` means each further query sees one more key, `turned`
            that queries are turned before they meet some blocks.

    Cost: some fifty numpy calls, whatever the batch.
    """
    queries = np.diff(query_start)
    wide = queries * shape.group >= _WIDE_FROM
    tiles = np.where(wide, _up(queries, max(1, _WIDE_ROWS // shape.group)), queries > 0)
    per_tile = _up(queries, np.maximum(tiles, 1))
    row, tile = _expand(tiles)
    begin = tile * per_tile[row]
    count = np.minimum(per_tile[row], queries[row] - begin)
    limit = first_limit[row] + (begin if shape.causal else 0)
    reach = np.clip(limit + (count - 1 if shape.causal else 0), 0, resident[row])
    unit = 1 if shape.block_size == CONTIGUOUS else shape.block_size
    low = np.zeros_like(reach)
    if shape.window:
        low = np.minimum(np.maximum(limit - shape.window, 0) // unit * unit, reach)
    span, spans = _spans(reach - low, wide[row], tiles[row] * shape.kv_heads, unit)

    tile_row, head = _expand(np.where(wide[row], shape.kv_heads, 1))
    tile_id, part = _expand(spans[tile_row])
    t = tile_row[tile_id]
    items = np.empty((len(t), at.NUM_FIELDS), np.int64)
    items[:, at.ROW] = row[t]
    items[:, at.FIRST_QUERY] = query_start[row[t]] + begin[t]
    items[:, at.NUM_QUERIES] = count[t]
    items[:, at.KEY_LOW] = low[t] + part * span[t]
    items[:, at.KEY_HIGH] = np.minimum(items[:, at.KEY_LOW] + span[t], reach[t])
    items[:, at.HEAD_LOW] = head[tile_id]
    items[:, at.HEAD_HIGH] = np.where(wide[row[t]], head[tile_id] + 1, shape.kv_heads)
    items[:, at.LIMIT] = limit[t]
    items[:, at.RESIDENT] = resident[row[t]]
    items[:, at.WIDE] = wide[row[t]]
    items[:, at.TILE_ID] = tile_id
    items[:, at.SPANS] = spans[t]
    items[:, at.SPAN] = part
    last = part == spans[t] - 1
    items[:, at.CLEAR_LOW] = np.where(part == 0, 0, items[:, at.KEY_LOW] // shape.block_size)
    end = items[:, at.KEY_HIGH] // shape.block_size
    items[:, at.CLEAR_HIGH] = np.where(last, shape.width, end)
    return _sized(items, tile_id, shape)


def _up(a: Any, b: Any) -> Any:
    """a / b rounded up."""
    return -(-a // b)


def _expand(counts: Ints) -> tuple[Ints, Ints]:
    """[2, 0, 3] -> ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])."""
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return owner, np.arange(len(owner)) - (ends - counts)[owner]


def _spans(length: Ints, wide: npt.NDArray[np.bool_], items: Ints, unit: int) -> tuple[Ints, Ints]:
    """Keys of a span, a multiple of `unit`, and spans of a tile.

    In decode they are whole tiles of keys where there are several, since a short tile costs more.
    """
    fine = _up(length, _NARROW_SPAN)
    coarse = np.minimum(_up(length, _WIDE_SPAN), _up(_WIDE_ITEMS, np.maximum(items, 1)))
    wanted = np.maximum(np.where(wide, coarse, fine), 1)
    tile = max(at.TILE // unit, 1) * unit
    grain = np.where(wide | (length <= tile), unit, tile)
    span = np.maximum(_up(_up(length, wanted), grain) * grain, unit)
    return span, np.maximum(_up(length, span), 1)


def _sized(items: Ints, tile_id: Ints, shape: Shape) -> Work:
    """Place the partial results, measure the scratch, put costly items first."""
    dims = _up(shape.head_dim, LANES) * LANES
    heads = items[:, at.HEAD_HIGH] - items[:, at.HEAD_LOW]
    rows = heads * items[:, at.NUM_QUERIES] * shape.group
    sizes = np.where(items[:, at.SPANS] > 1, 4 * rows * (dims + 2), 0)
    starts = np.cumsum(sizes) - sizes
    # All spans of a tile have one size: the tile's place is its first span's.
    items[:, at.PARTIAL_AT] = starts - items[:, at.SPAN] * sizes
    padded = _up(rows, 16) * 16 + 16  # the most that `layout.apart` makes of them
    narrow = 8 * dims * rows + 8 * (rows + 16) + 8 * at.TILE * (heads * shape.group + 7)
    if shape.turned:  # for each entry of the table that a tile may reach into
        entries = at.TILE // shape.block_size if shape.block_size <= at.TILE else 2
        narrow = narrow + 4 * dims * rows * entries
    wide = 8 * dims * padded + 24 * padded + 8 * at.TILE * dims
    wide = wide + 4 * (2 * at.TILE + 2) * at.ROWS + 16 * at.TILE
    scratch = int(np.where(items[:, at.WIDE] != 0, wide, narrow).max(initial=0))
    cost = (items[:, at.KEY_HIGH] - items[:, at.KEY_LOW]) * rows
    order = np.argsort(-cost, kind="stable")
    tiles = int(tile_id.max(initial=-1)) + 1
    return Work(
        items=np.ascontiguousarray(items[order]),
        arrived=np.zeros(tiles, np.int64),
        scratch_bytes=_up(scratch + 256, 4096) * 4096,
        partial_bytes=int(sizes.sum()),
        any_wide=bool(items[:, at.WIDE].any()),
    )
