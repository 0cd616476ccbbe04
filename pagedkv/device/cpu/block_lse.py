"""The log-sum-exp of each block, written by the CPU kernel as it goes.

A block's sum is taken of weights that the softmax has computed anyway, against the running maximum.
Where that sum is too faint for fp32 (a block e**-69 below the best one so far), it is taken again
against the block's own maximum, so every block that a query sees has a finite, exact entry.
"""

import math

import numpy as np

from .layout import (
    BLOCK_LSE,
    BLOCK_SIZE,
    CLEAR_HIGH,
    CLEAR_LOW,
    FAINT,
    FIRST_QUERY,
    GROUP,
    HEAD_HIGH,
    HEAD_LOW,
    KV_HEADS,
    LN2,
    NEVER,
    NUM_QUERIES,
    ROWS,
    TILE,
    WIDTH,
    pad,
)
from .several import put_fours
from .simd import (
    LANES,
    Address,
    Number,
    Vector,
    add,
    get,
    highest,
    kernel,
    load,
    maximum,
    mul,
    put,
    scalar,
    splat,
    store,
    sub,
    total,
)
from .simd_math import exp2, log2


@kernel
def write_lse(address: Address, value: Number, merge: bool) -> None:
    """Write a block's log-sum-exp, or add it to the part already there."""
    if merge:
        old = scalar(np.float32(0), address)
        high, low = max(old, value), min(old, value)
        value = high
        if low > -np.inf:
            value += np.float32(math.log1p(math.exp(low - high)))
    put(address, np.float32(value))


@kernel
def clear_block_lse(params: Address, item: Address) -> None:
    """Minus infinity for every entry this item answers for."""
    line = get(params, WIDTH)
    group = get(params, GROUP)
    heads = get(params, KV_HEADS) * group
    low, high = get(item, CLEAR_LOW), get(item, CLEAR_HIGH)
    nothing = np.float32(-np.inf)
    for i in range(get(item, NUM_QUERIES)):
        token = get(item, FIRST_QUERY) + i
        for head in range(get(item, HEAD_LOW) * group, get(item, HEAD_HIGH) * group):
            row = get(params, BLOCK_LSE) + 4 * line * (token * heads + head)
            for block in range(low, high):
                put(row + 4 * block, nothing)


@kernel
def quarters(low: int, high: int) -> tuple[int, int]:
    """Where the first quarter of a tile's keys low..high begins, and how many keys each has.

    Together they are whole fours: up to three keys more at either end.
    """
    begin = low // 4 * 4
    return begin, (high - begin + 3) // 4


@kernel
def place(j: int, quarter: int) -> int:
    """Where the j-th key's score and weight lie: the first of each quarter, then the second ones.

    So are they computed, four at a time.
    """
    return 4 * (j % quarter) + j // quarter


@kernel
def whole_blocks(size: int, low: int, high: int) -> int:
    """How many blocks fill a quarter of a tile's keys low..high; 0 if they do not."""
    _, quarter = quarters(low, high)
    whole = low == 0 and high == 4 * quarter and size % (LANES // 4) == 0 and quarter % size == 0
    return quarter // size if whole else 0


@kernel
def _whole_blocks(weights: Address, size: int, each: int, sums: Address) -> None:
    """Sum the weights of whole blocks, `each` to a quarter; four at once, one of each quarter."""
    f32 = np.float32(0)
    for i in range(each):
        first = weights + 16 * size * i
        four = load(f32, first)
        for at in range(4 * LANES, 16 * size, 4 * LANES):
            four = add(four, load(f32, first + at))
        put_fours(sums + 4 * i, 4 * each, four)


@kernel
def _in_order(weights: Address, begin: int, quarter: int, out: Address) -> None:
    """Write weights as their keys lie in the tile, up to a whole vector."""
    for q in range(4):
        to = out + 4 * (begin + q * quarter)
        for i in range(quarter):
            put(to + 4 * i, scalar(np.float32(0), weights + 16 * i + 4 * q))
    end = begin + 4 * quarter
    for j in range(end, pad(end, LANES)):
        put(out + 4 * j, np.float32(0))


@kernel
def _segment_sum(weights: Address, low: int, high: int) -> Number:
    """Sum of weights[low:high]."""
    if low % LANES == 0 and high % LANES == 0:
        sums = load(np.float32(0), weights + 4 * low)
        for j in range(low + LANES, high, LANES):
            sums = add(sums, load(np.float32(0), weights + 4 * j))
        return total(sums)
    result = np.float32(0)
    for j in range(low, high):
        result += scalar(np.float32(0), weights + 4 * j)
    return result


@kernel
def _exact_segment(scores: Address, quarter: int, low: int, high: int) -> Number:
    """log2-sum-exp2 of the scores of keys low..high, against their own maximum."""
    top = np.float32(-np.inf)
    for j in range(low, high):
        top = max(top, scalar(np.float32(0), scores + 4 * place(j, quarter)))
    if not top > -np.inf:
        return top
    result = 0.0
    for j in range(low, high):
        score = scalar(np.float32(0), scores + 4 * place(j, quarter))
        result += 2.0 ** np.float64(score - top)
    return top + np.float32(math.log2(result))


@kernel
def narrow_blocks(
    params: Address,
    out: Address,
    first: int,
    seen: tuple[int, int],
    blocks: tuple[int, int],
    each: int,
    top: Number,
    scores: Address,
    weights: Address,
    sums: Address,
) -> None:
    """Write the lse of `blocks` for a query row that sees keys first+low .. first+high of a tile.

    Scores and weights lie as `place` says. What takes divisions is handed in: `blocks`, and how
    many whole ones lie in `each` quarter (0 if blocks reach across quarters).
    """
    f32 = np.float32(0)
    size = get(params, BLOCK_SIZE)
    low, high = seen
    start, stop = blocks
    begin, quarter = quarters(low, high)
    ordered, logs = sums + 4 * TILE, sums + 8 * TILE
    if each > 0:
        _whole_blocks(weights, size, each, sums)
    else:
        _in_order(weights, begin, quarter, ordered)
        for block in range(start, stop):
            a, b = max(low, block * size - first), min(high, (block + 1) * size - first)
            # A vector of the tail may reach past `high`: weights are 0 there.
            whole = pad(b, LANES) if b == high else b
            put(sums + 4 * (block - start), _segment_sum(ordered, a, whole))
    merge = size > TILE
    for base in range(0, stop - start, LANES):
        masses = load(f32, sums + 4 * base)
        values = mul(add(log2(masses), splat(top)), splat(LN2))
        faint = highest(mul(masses, splat(np.float32(-1)))) > -FAINT
        if base + LANES <= stop - start and not faint and not merge:
            store(out + 4 * (start + base), values)
            continue
        store(logs, values)
        for i in range(base, min(stop - start, base + LANES)):
            value = scalar(f32, logs + 4 * (i - base))
            if scalar(f32, sums + 4 * i) < FAINT:
                a = max(low, (start + i) * size - first) - begin
                b = min(high, (start + i + 1) * size - first) - begin
                value = _exact_segment(scores, quarter, a, b) * np.float32(LN2)
            write_lse(out + 4 * (start + i), value, merge)


@kernel
def _column_lse(scores: Address, low: int, high: int) -> Vector:
    """log2-sum-exp2 down keys low..high of one vector of rows, against their own maximum."""
    f32 = np.float32(0)
    top = splat(np.float32(NEVER))
    for j in range(low, high):
        top = maximum(top, load(f32, scores + 4 * ROWS * j))
    sums = splat(f32)
    for j in range(low, high):
        sums = add(sums, exp2(sub(load(f32, scores + 4 * ROWS * j), top)))
    return add(top, log2(sums))


@kernel
def wide_blocks(
    params: Address,
    first: int,
    count: int,
    top: Vector,
    scores: Address,
    weights: Address,
    lines: Address,
    logs: Address,
) -> None:
    """Write the lse of the blocks under keys first .. first+count for one vector of rows."""
    f32 = np.float32(0)
    size = get(params, BLOCK_SIZE)
    for block in range(first // size, (first + count - 1) // size + 1):
        low = max(0, block * size - first)
        high = min(count, (block + 1) * size - first)
        sums = splat(f32)
        for j in range(low, high):
            sums = add(sums, load(f32, weights + 4 * ROWS * j))
        values = add(top, log2(sums))
        if highest(mul(sums, splat(np.float32(-1)))) > -FAINT:
            values = _column_lse(scores, low, high)
        store(logs, mul(values, splat(np.float32(LN2))))
        for lane in range(LANES):
            line = get(lines, lane)
            if line != 0:
                write_lse(line + 4 * block, scalar(f32, logs + 4 * lane), size > TILE)
