"""Turning vectors by angles: rotary embeddings, and queries that meet old keys at new distances.

Eviction closes gaps, and keys stay as they were written (`device/turns.py`): a query is turned
before it meets a block. In decode there are few queries, so they are turned, once for each run of
blocks that want it alike. In prefill a tile of keys is copied anyway and meets many queries: there
the keys are turned, the other way round.
"""

import numpy as np

from .layout import (
    BACK,
    BLOCK_SIZE,
    COS,
    HEAD_DIM,
    INTERLEAVED,
    PAIRS,
    ROW,
    SIN,
    TILE,
    TURN,
    WIDTH,
    pad,
)
from .simd import LANES, Address, add, get, kernel, load, mul, put, scalar, store, sub, word32

__all__ = ["rotate_head", "turn_keys", "turn_queries"]


@kernel
def rotate_head(
    source: Address, out: Address, cos: Address, sin: Address, pairs: int, apart: int
) -> None:
    """Turn elements (i, i + pairs); rounded as torch's products and sums are, without fma.

    The second one's cosine and sine lie `apart` bytes behind the first one's.
    """
    f32 = np.float32(0)
    far = 4 * pairs
    whole = pairs // LANES * LANES
    for at in range(0, 4 * whole, 4 * LANES):
        a, b = load(f32, source + at), load(f32, source + far + at)
        c, s = load(f32, cos + at), load(f32, sin + at)
        store(out + at, sub(mul(a, c), mul(b, s)))
        c, s = load(f32, cos + apart + at), load(f32, sin + apart + at)
        store(out + far + at, add(mul(b, c), mul(a, s)))
    for at in range(4 * whole, far, 4):
        x, y = scalar(f32, source + at), scalar(f32, source + far + at)
        put(out + at, x * scalar(f32, cos + at) - y * scalar(f32, sin + at))
        put(out + far + at, y * scalar(f32, cos + apart + at) + x * scalar(f32, sin + apart + at))


@kernel
def _rotate_neighbours(
    source: Address, out: Address, cos: Address, sin: Address, pairs: int
) -> None:
    """Turn elements (2i, 2i + 1)."""
    f32 = np.float32(0)
    for at in range(0, 4 * pairs, 4):
        x, y = scalar(f32, source + 2 * at), scalar(f32, source + 2 * at + 4)
        c, s = scalar(f32, cos + at), scalar(f32, sin + at)
        put(out + 2 * at, x * c - y * s)
        put(out + 2 * at + 4, y * c + x * s)


@kernel
def _turn(params: Address, source: Address, out: Address, row: int, sines: int) -> None:
    """Turn a vector by a row of the angles, to another or to itself; the rest is not written."""
    pairs = get(params, PAIRS)
    cos, sin = get(params, COS) + 4 * pairs * row, get(params, sines) + 4 * pairs * row
    if get(params, INTERLEAVED) != 0:
        _rotate_neighbours(source, out, cos, sin, pairs)
    else:
        rotate_head(source, out, cos, sin, pairs, 0)


@kernel
def _turn_of(params: Address, item: Address, entry: int) -> int:
    """By which row of the angles queries are turned before they meet a table's entry."""
    return int(word32(get(params, TURN) + 4 * (get(item, ROW) * get(params, WIDTH) + entry)))


@kernel
def turn_queries(
    params: Address,
    item: Address,
    first: int,
    count: int,
    query: Address,
    rows: int,
    turned: Address,
    query_at: Address,
) -> None:
    """Turn the query rows for `count` keys from index `first`, once for each run of entries.

    Writes for each key of a tile how many bytes behind `query` the rows lie that it meets: 0 are
    those that are not turned.
    """
    f32 = np.float32(0)
    size, dim = get(params, BLOCK_SIZE), get(params, HEAD_DIM)
    dims = pad(dim, LANES)
    entry = first // size
    end = (entry + 1) * size - first
    runs, before, behind = 0, -1, 0
    j = 0
    while j < count:
        row = _turn_of(params, item, entry)
        if row != before:
            behind = turned + 4 * dims * rows * runs - query if row != 0 else 0
            for i in range(rows if row != 0 else 0):
                source = query + 4 * dims * i
                for d in range(0, 4 * dims, 4 * LANES):
                    store(source + behind + d, load(f32, source + d))
                _turn(params, source, source + behind, row, SIN)
            before, runs = row, runs + 1
        while j < min(end, count):
            put(query_at + 8 * j, behind)
            j += 1
        entry, end = entry + 1, end + size
    for j in range(count, TILE):
        put(query_at + 8 * j, behind)


@kernel
def turn_keys(params: Address, item: Address, first: int, count: int, keys: Address) -> None:
    """Turn `count` fp32 keys from index `first` back by what queries lack before their blocks."""
    size, stride = get(params, BLOCK_SIZE), 4 * pad(get(params, HEAD_DIM), LANES)
    for j in range(count):
        row = _turn_of(params, item, (first + j) // size)
        if row != 0:
            _turn(params, keys + stride * j, keys + stride * j, row, BACK)
