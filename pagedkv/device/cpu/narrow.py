"""The narrow form of the CPU kernel, for decode: few query rows, keys walked once.

Lanes run over the head size for scores and values, and over keys for the softmax. All KV heads of
a block are read together, so memory is walked once and in order; a group's query rows find the
key row in cache.

Decode is bound by memory, and most of what is on its way there was asked for by the processor's own
prefetchers, which need to see addresses go up line by line within a page. So a tile is walked as
four runs of memory, a quarter of its keys each: each step takes a row of each quarter, and what it
makes lies side by side (`place`). Rows are also asked for by the kernel, AHEAD bytes before they
are used, across the ends of blocks, tiles and items: the addresses of two tiles are at hand.
They are asked into the second-level cache; a processor drops such a request when its first level
already waits for as many lines as it can.
"""

import numpy as np

from .block_lse import narrow_blocks, place, quarters, whole_blocks
from .layout import (
    BLOCK_LSE,
    BLOCK_SIZE,
    FIRST_QUERY,
    GROUP,
    HEAD_DIM,
    HEAD_HIGH,
    HEAD_LOW,
    KEY,
    KEY_HIGH,
    KEY_LOW,
    KEY_OFFSET,
    KV_HEADS,
    NEVER,
    NUM_QUERIES,
    QUERY,
    QUERY_OFFSET,
    QUERY_STRIDE,
    SCALE,
    TILE,
    TURN,
    VALUE,
    VALUE_OFFSET,
    WIDTH,
    WINDOW,
    addresses,
    pad,
    visible,
)
from .rotation import turn_queries
from .rows import add_rows, dots, moved, rows_at, split
from .simd import (
    LANES,
    Address,
    Number,
    Sample,
    add,
    get,
    highest,
    kernel,
    lane0,
    lead,
    load,
    load_n,
    maximum,
    mul,
    put,
    scalar,
    splat,
    store,
    sub,
    total,
    width,
)
from .simd_math import exp2

AHEAD = 32 << 10  # of the four runs together


@kernel
def _far(size: int, heads: tuple[int, int]) -> int:
    """How many steps are AHEAD bytes, if a row of one head is of this size; at least one."""
    return max(1, AHEAD // (4 * size * (heads[1] - heads[0])))


@kernel
def _ahead(begin: int, quarter: int, j: int, far: int) -> int:
    """The key `far` steps after the j-th, in the first quarter of this tile or of the next; of a
    shorter tile, its own place in the next.
    """
    soon = j + min(far, quarter)
    return soon if soon < begin + quarter else TILE + soon - begin - quarter


@kernel
def _narrow_scores(
    sample: Sample,
    params: Address,
    key_at: Address,
    low: int,
    high: int,
    heads: tuple[int, int],
    query: Address,
    query_at: Address,
    scores: Address,
) -> None:
    """Write query . key of keys low <= j < high, quarter by quarter (`place`); whole fours.

    `query_at`: How far behind `query` lies what each key meets; 0 if it is the same for all.
    """
    dim = get(params, HEAD_DIM)
    dims = 4 * pad(dim, LANES)
    group = get(params, GROUP)
    fours, threes = split(group)
    key = get(params, KEY)
    offsets = get(params, KEY_OFFSET)
    size = lead(sample) + dim * width(sample)
    begin, quarter = quarters(low, high)
    far = _far(size, heads)
    for j in range(begin, begin + quarter):
        here = rows_at(key, key_at, j, quarter)
        there = rows_at(key, key_at, _ahead(begin, quarter, j, far), quarter)
        turned = rows_at(0, query_at, j, quarter) if query_at != 0 else (0, 0, 0, 0)
        q = query
        to = scores + 16 * (j - begin)
        for head in range(heads[0], heads[1]):
            rows, soon = moved(here, get(offsets, head)), moved(there, get(offsets, head))
            for _ in range(fours):
                queries = (q, q + dims, q + 2 * dims, q + 3 * dims)
                dots(sample, rows, soon, queries, turned, dim, to)
                q += 4 * dims
                to += 16 * TILE
                soon = rows  # those to come are asked for; these are at hand, so asking is cheap
            for _ in range(threes):
                dots(sample, rows, soon, (q, q + dims, q + 2 * dims), turned, dim, to)
                q += 3 * dims
                to += 12 * TILE
                soon = rows
            for _ in range(group - 4 * fours - 3 * threes):
                dots(sample, rows, soon, (q,), turned, dim, to)
                q += dims
                to += 4 * TILE
                soon = rows


@kernel
def _narrow_values(
    sample: Sample,
    params: Address,
    value_at: Address,
    low: int,
    high: int,
    heads: tuple[int, int],
    weights: Address,
    acc: Address,
) -> None:
    """acc[row] += sum_j weights[row, place of j] * value[j]."""
    dim = get(params, HEAD_DIM)
    dims = 4 * pad(dim, LANES)
    group = get(params, GROUP)
    fours, threes = split(group)
    value = get(params, VALUE)
    offsets = get(params, VALUE_OFFSET)
    size = lead(sample) + dim * width(sample)
    begin, quarter = quarters(low, high)
    far = _far(size, heads)
    line = 4 * TILE
    for j in range(begin, begin + quarter):
        here = rows_at(value, value_at, j, quarter)
        there = rows_at(value, value_at, _ahead(begin, quarter, j, far), quarter)
        at = weights + 16 * (j - begin)
        to = acc
        for head in range(heads[0], heads[1]):
            rows, soon = moved(here, get(offsets, head)), moved(there, get(offsets, head))
            for _ in range(fours):
                four = (at, at + line, at + 2 * line, at + 3 * line)
                accs = (to, to + dims, to + 2 * dims, to + 3 * dims)
                add_rows(sample, rows, soon, four, accs, dim)
                at += 4 * line
                to += 4 * dims
                soon = rows
            for _ in range(threes):
                three = (at, at + line, at + 2 * line)
                add_rows(sample, rows, soon, three, (to, to + dims, to + 2 * dims), dim)
                at += 3 * line
                to += 3 * dims
                soon = rows
            for _ in range(group - 4 * fours - 3 * threes):
                add_rows(sample, rows, soon, (at,), (to,), dim)
                at += line
                to += dims
                soon = rows


@kernel
def _narrow_softmax(
    scores: Address,
    weights: Address,
    low: int,
    high: int,
    state: Address,
    rows: int,
    acc: Address,
    dims: int,
) -> Number:
    """Scores -> weights against the new running maximum, which is returned; rescales acc."""
    f32 = np.float32(0)
    begin, quarter = quarters(low, high)
    for j in range(begin, low):
        put(scores + 4 * place(j - begin, quarter), np.float32(-np.inf))
    for j in range(high, begin + 4 * quarter):
        put(scores + 4 * place(j - begin, quarter), np.float32(-np.inf))
    for i in range(4 * quarter, pad(4 * quarter, LANES)):
        put(scores + 4 * i, np.float32(-np.inf))
    tops = load(f32, scores)
    for i in range(LANES, 4 * quarter, LANES):
        tops = maximum(tops, load(f32, scores + 4 * i))
    old = scalar(f32, state)
    top = max(old, highest(tops))
    shift = splat(top)
    sums = splat(f32)
    for i in range(0, 4 * quarter, LANES):
        p = exp2(sub(load(f32, scores + 4 * i), shift))
        store(weights + 4 * i, p)
        sums = add(sums, p)
    mass = state + 4 * rows
    before = scalar(f32, mass)
    if top > old:
        decay = exp2(splat(old - top))
        before *= lane0(decay)
        for i in range(0, dims, LANES):
            store(acc + 4 * i, mul(load(f32, acc + 4 * i), decay))
        put(state, np.float32(top))
    put(mass, np.float32(before + total(sums)))
    return top


@kernel
def _load_queries(
    asked: Sample, params: Address, item: Address, query: Address, dims: Address
) -> None:
    """Scaled fp32 query rows, ordered (query, KV head, head in group)."""
    dim = get(params, HEAD_DIM)
    group = get(params, GROUP)
    whole = dim // LANES * LANES
    scale = splat(scalar(np.float32(0), params + 8 * SCALE))
    row = query
    for i in range(get(item, NUM_QUERIES)):
        token = get(params, QUERY) + (get(item, FIRST_QUERY) + i) * get(params, QUERY_STRIDE)
        for head in range(get(item, HEAD_LOW), get(item, HEAD_HIGH)):
            for g in range(group):
                at = token + get(get(params, QUERY_OFFSET), head * group + g)
                for d in range(0, whole, LANES):
                    store(row + 4 * d, mul(load(asked, at + d * width(asked)), scale))
                if whole < dim:
                    rest = load_n(asked, at + whole * width(asked), dim - whole)
                    store(row + 4 * whole, mul(rest, scale))
                row += 4 * dims


@kernel
def _narrow_tile(
    sample: Sample,
    params: Address,
    item: Address,
    first: int,
    count: int,
    rows: int,
    places: tuple[Address, ...],
) -> None:
    """One tile of keys against every query row."""
    query, acc, state, scores, weights, sums, key_at, value_at, query_at, turned = places
    dims = pad(get(params, HEAD_DIM), LANES)
    window = get(params, WINDOW)
    queries = get(item, NUM_QUERIES)
    heads = (get(item, HEAD_LOW), get(item, HEAD_HIGH))
    each = rows // queries  # rows are ordered (query, KV head, head in group)
    entries = get(params, BLOCK_LSE)
    met = query_at if get(params, TURN) != 0 else 0
    if met != 0:
        turn_queries(params, item, first, count, query, rows, turned, query_at)
    for i in range(queries):
        limit = visible(params, item, i)
        high = min(count, limit - first)
        low = max(0, limit - window - first) if window > 0 else 0
        if low < high:
            row = i * each
            q = query + 4 * dims * row
            _narrow_scores(sample, params, key_at, low, high, heads, q, met, scores)
            line = (get(item, FIRST_QUERY) + i) * get(params, KV_HEADS) * get(params, GROUP)
            line += heads[0] * get(params, GROUP)
            size = get(params, BLOCK_SIZE)
            blocks = ((first + low) // size, (first + high - 1) // size + 1)
            whole = whole_blocks(size, low, high)
            for r in range(each):
                s, w = scores + 4 * TILE * r, weights + 4 * TILE * r
                at = acc + 4 * dims * (row + r)
                top = _narrow_softmax(s, w, low, high, state + 4 * (row + r), rows, at, dims)
                if entries != 0:
                    out = entries + 4 * get(params, WIDTH) * (line + r)
                    narrow_blocks(params, out, first, (low, high), blocks, whole, top, s, w, sums)
            at = acc + 4 * dims * row
            _narrow_values(sample, params, value_at, low, high, heads, weights, at)


@kernel
def run_narrow(
    asked: Sample,
    sample: Sample,
    params: Address,
    item: Address,
    scratch: Address,
    following: Address,
) -> tuple[Address, Address, Address]:
    """Run an item; returns the addresses of its accumulator rows, maxima and sums.

    `following`: The item that comes next, whose first tile is asked for too; 0 for none.
    """
    f32 = np.float32(0)
    dims = pad(get(params, HEAD_DIM), LANES)
    heads = get(item, HEAD_HIGH) - get(item, HEAD_LOW)
    rows = heads * get(item, NUM_QUERIES) * get(params, GROUP)
    each = heads * get(params, GROUP)
    query = scratch
    acc = query + 4 * dims * rows
    state = acc + 4 * dims * rows
    scores = state + 8 * pad(rows, 16)
    weights = scores + 4 * TILE * each
    sums = weights + 4 * TILE * each
    key_at = sums + 4 * TILE * 4
    value_at = key_at + 16 * TILE
    query_at = value_at + 16 * TILE
    turned = query_at + 8 * TILE
    _load_queries(asked, params, item, query, dims)
    for j in range(0, dims * rows, LANES):
        store(acc + 4 * j, splat(f32))
    for row in range(rows):
        put(state + 4 * row, np.float32(NEVER))
        put(state + 4 * (rows + row), np.float32(0))
    size = get(params, BLOCK_SIZE)
    tile = TILE // size * size if size <= TILE else TILE
    places = (query, acc, state, scores, weights, sums, key_at, value_at, query_at, turned)
    low, high = get(item, KEY_LOW), get(item, KEY_HIGH)
    tail = 8 * TILE  # bytes from this tile's addresses to the next tile's
    soon = min(tile, high - low)
    if soon > 0:
        addresses(params, item, low, soon, key_at + tail, value_at + tail)
    for first in range(low, high, tile):
        count = min(tile, high - first)
        for j in range(0, tail, 4 * LANES):
            store(key_at + j, load(f32, key_at + tail + j))
            store(value_at + j, load(f32, value_at + tail + j))
        of, then = item, first + tile
        if then >= high and following != 0:
            of, then = following, get(following, KEY_LOW)
        soon = min(tile, get(of, KEY_HIGH) - then)
        if soon > 0:
            addresses(params, of, then, soon, key_at + tail, value_at + tail)
        _narrow_tile(sample, params, item, first, count, rows, places)
    return acc, state, state + 4 * rows
