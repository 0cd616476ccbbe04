"""The wide form of the CPU kernel, for prefill: lanes run over query rows.

A tile of keys and values is widened to fp32 scratch once and serves every query row of the item.
Scores are kept as [key, row], accumulators as [head size, row]: the softmax runs down columns and
never sums across lanes, and both products broadcast one number against vectors of rows.
"""

import numpy as np

from .block_lse import wide_blocks
from .layout import (
    BLOCK_LSE,
    BLOCK_SIZE,
    FIRST_QUERY,
    GROUP,
    HEAD_DIM,
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
    ROWS,
    SCALE,
    TILE,
    TURN,
    VALUE,
    VALUE_OFFSET,
    WIDTH,
    WINDOW,
    addresses,
    apart,
    pad,
    visible,
)
from .product import HEIGHT, product, product_onto
from .rotation import turn_keys
from .simd import (
    LANES,
    Address,
    Sample,
    Vector,
    add,
    get,
    kernel,
    lead,
    load,
    load_n,
    maximum,
    mul,
    put,
    row_scale,
    scalar,
    select_less,
    splat,
    store,
    sub,
    width,
)
from .simd_math import exp2


@kernel
def _load_rows(
    asked: Sample,
    params: Address,
    item: Address,
    rows: int,
    query: Address,
    state: Address,
    see: Address,
) -> None:
    """Queries transposed to [head size, row], empty states, and the range of keys each row sees.

    Rows that only fill up a vector see every key with a query of zero, so that nothing they hold
    is ever infinite; their results are not read.
    """
    dim = get(params, HEAD_DIM)
    group = get(params, GROUP)
    head = get(item, HEAD_LOW)
    count = get(item, NUM_QUERIES) * group
    window = get(params, WINDOW)
    scale = scalar(np.float32(0), params + 8 * SCALE)
    for row in range(rows):
        put(state + 4 * row, np.float32(NEVER))
        put(state + 4 * (rows + row), np.float32(0))
        put(see + 4 * row, np.float32(-1))
        put(see + 4 * (rows + row), np.float32(-NEVER))
        i = row // group
        if row < count:
            limit = visible(params, item, i)
            put(see + 4 * row, np.float32(limit - window if window > 0 else 0))
            put(see + 4 * (rows + row), np.float32(limit))
        at = get(params, QUERY) + (get(item, FIRST_QUERY) + i) * get(params, QUERY_STRIDE)
        at += get(get(params, QUERY_OFFSET), head * group + row % group)
        for d in range(dim):
            x = scalar(asked, at + d * width(asked)) * scale if row < count else np.float32(0)
            put(query + 4 * (d * rows + row), np.float32(x))


@kernel
def _widen(
    sample: Sample,
    source: Address,
    places: Address,
    count: int,
    dim: int,
    target: Address,
) -> None:
    """Copy `count` rows to fp32 rows of padded length; zero rows up to the next HEIGHT."""
    dims = pad(dim, LANES)
    for j in range(count):
        scale = splat(row_scale(sample, source + get(places, j)))
        at = source + get(places, j) + lead(sample)
        to = target + 4 * dims * j
        for i in range(0, dim, LANES):
            if i + LANES <= dim:
                store(to + 4 * i, mul(load(sample, at + i * width(sample)), scale))
            else:
                store(to + 4 * i, mul(load_n(sample, at + i * width(sample), dim - i), scale))
    for i in range(count * dims, pad(count, HEIGHT) * dims, LANES):
        store(target + 4 * i, splat(np.float32(0)))


@kernel
def _wide_scores(
    keys: Address, count: int, dim: int, query: Address, rows: int, vectors: int, scores: Address
) -> None:
    """scores[j, :] = keys[j] . query[:, :] of so many vectors of rows."""
    stride = 4 * pad(dim, LANES)
    for j in range(0, count, HEIGHT):
        to = scores + 4 * ROWS * j
        product(keys + stride * j, stride, 4, query, 4 * rows, dim, to, 4 * ROWS, vectors)


@kernel
def _wide_values(
    values: Address,
    count: int,
    dim: int,
    weights: Address,
    alphas: Address,
    acc: Address,
    rows: int,
    vectors: int,
) -> None:
    """acc[d, :] = acc[d, :] * alpha + sum_j values[j, d] * weights[j, :]."""
    stride = 4 * pad(dim, LANES)
    for i in range(0, dim, HEIGHT):
        to = acc + 4 * rows * i
        product_onto(
            values + 4 * i, 4, stride, weights, 4 * ROWS, count, to, 4 * rows, vectors, alphas
        )


@kernel
def _mask(scores: Address, first: int, count: int, see: Address, rows: int, vectors: int) -> None:
    """Set the scores of keys that a row may not see to minus infinity."""
    f32 = np.float32(0)
    never = splat(np.float32(-np.inf))
    for half in range(0, vectors * LANES, LANES):
        low = load(f32, see + 4 * half)
        high = load(f32, see + 4 * (rows + half))
        for j in range(count):
            at = scores + 4 * (ROWS * j + half)
            key = splat(np.float32(first + j))
            s = select_less(key, high, load(f32, at), never)
            store(at, select_less(key, low, never, s))


@kernel
def _wide_softmax(
    scores: Address, count: int, weights: Address, state: Address, rows: int
) -> tuple[Vector, Vector]:
    """Scores -> weights of one vector of rows; returns (alpha, maximum), both vectors."""
    f32 = np.float32(0)
    top = load(f32, scores)
    for j in range(1, count):
        top = maximum(top, load(f32, scores + 4 * ROWS * j))
    old = load(f32, state)
    top = maximum(old, top)
    alpha = exp2(sub(old, top))
    sums = mul(load(f32, state + 4 * rows), alpha)
    for j in range(count):
        p = exp2(sub(load(f32, scores + 4 * ROWS * j), top))
        store(weights + 4 * ROWS * j, p)
        sums = add(sums, p)
    store(state, top)
    store(state + 4 * rows, sums)
    return alpha, top


@kernel
def _load_lines(params: Address, item: Address, rows: int, lines: Address) -> None:
    """Where each row's block lse begins; 0 for rows that only fill up a vector."""
    group = get(params, GROUP)
    heads = get(params, KV_HEADS) * group
    for row in range(rows):
        token = get(item, FIRST_QUERY) + row // group
        line = token * heads + get(item, HEAD_LOW) * group + row % group
        at = get(params, BLOCK_LSE) + 4 * get(params, WIDTH) * line
        put(lines + 8 * row, at if row < get(item, NUM_QUERIES) * group else 0)


@kernel
def _wide_tile(
    params: Address, item: Address, first: int, count: int, rows: int, places: tuple[Address, ...]
) -> None:
    """One widened tile of keys and values against every query row."""
    query, acc, state, see, keys, values, scores, lines = places
    dim = get(params, HEAD_DIM)
    weights = scores + 4 * TILE * ROWS
    alphas = weights + 4 * TILE * ROWS
    logs = alphas + 4 * ROWS
    last = get(item, NUM_QUERIES) - 1
    masked = get(params, WINDOW) > 0 or first + count > visible(params, item, 0)
    # Rows are in query order: the vectors before `begin` see nothing of this tile.
    begin, end = 0, pad((last + 1) * get(params, GROUP), LANES)
    if first >= visible(params, item, 0):
        while begin < end and scalar(np.float32(0), see + 4 * (rows + begin + LANES - 1)) <= first:
            begin += LANES
    if first >= visible(params, item, last):
        begin = end
    for row in range(begin, end, ROWS):
        vectors = min(ROWS, end - row) // LANES
        _wide_scores(keys, count, dim, query + 4 * row, rows, vectors, scores)
        if masked:
            _mask(scores, first, count, see + 4 * row, rows, vectors)
        for part in range(0, 4 * LANES * vectors, 4 * LANES):
            s, w = scores + part, weights + part
            alpha, top = _wide_softmax(s, count, w, state + 4 * row + part, rows)
            store(alphas + part, alpha)
            if get(params, BLOCK_LSE) != 0:
                wide_blocks(params, first, count, top, s, w, lines + 8 * row + 2 * part, logs)
        _wide_values(values, count, dim, weights, alphas, acc + 4 * row, rows, vectors)


@kernel
def _gather_rows(acc: Address, rows: int, dim: int, count: int, target: Address) -> None:
    """Accumulators [head size, row] -> [row, padded head size]."""
    dims = pad(dim, LANES)
    for row in range(count):
        for d in range(dim):
            put(target + 4 * (row * dims + d), scalar(np.float32(0), acc + 4 * (d * rows + row)))


@kernel
def run_wide(
    asked: Sample, sample: Sample, params: Address, item: Address, scratch: Address
) -> tuple[Address, Address, Address]:
    """Run an item; returns the addresses of its accumulator rows, maxima and sums."""
    dim = get(params, HEAD_DIM)
    deep = pad(dim, LANES)
    count = get(item, NUM_QUERIES) * get(params, GROUP)
    rows = apart(count)  # places for them, from line to line of what lies by row
    query = scratch
    acc = query + 4 * deep * rows
    state = acc + 4 * deep * rows
    see = state + 8 * rows
    keys = see + 8 * rows
    values = keys + 4 * TILE * deep
    scores = values + 4 * TILE * deep
    lines = scores + 4 * (2 * TILE + 2) * ROWS
    key_at = lines + 8 * rows
    value_at = key_at + 8 * TILE
    _load_rows(asked, params, item, rows, query, state, see)
    if get(params, BLOCK_LSE) != 0:
        _load_lines(params, item, rows, lines)
    for j in range(0, deep * rows, LANES):
        store(acc + 4 * j, splat(np.float32(0)))
    head = get(item, HEAD_LOW)
    key = get(params, KEY) + get(get(params, KEY_OFFSET), head)
    value = get(params, VALUE) + get(get(params, VALUE_OFFSET), head)
    size = get(params, BLOCK_SIZE)
    tile = TILE // size * size if size <= TILE else TILE
    places = (query, acc, state, see, keys, values, scores, lines)
    for first in range(get(item, KEY_LOW), get(item, KEY_HIGH), tile):
        n = min(tile, get(item, KEY_HIGH) - first)
        addresses(params, item, first, n, key_at, value_at)
        _widen(sample, key, key_at, n, dim, keys)
        if get(params, TURN) != 0:
            turn_keys(params, item, first, n, keys)
        _widen(sample, value, value_at, n, dim, values)
        _wide_tile(params, item, first, n, rows, places)
    _gather_rows(acc, rows, dim, count, query)
    return query, state, state + 4 * rows
