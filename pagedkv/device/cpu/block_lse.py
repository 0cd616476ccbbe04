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
def _exact_segment(scores: Address, low: int, high: int) -> Number:
    """log2-sum-exp2 of scores[low:high] against their own maximum."""
    top = np.float32(-np.inf)
    for j in range(low, high):
        top = max(top, scalar(np.float32(0), scores + 4 * j))
    if not top > -np.inf:
        return top
    result = 0.0
    for j in range(low, high):
        result += 2.0 ** np.float64(scalar(np.float32(0), scores + 4 * j) - top)
    return top + np.float32(math.log2(result))


@kernel
def narrow_blocks(
    params: Address,
    out: Address,
    first: int,
    seen: tuple[int, int],
    blocks: tuple[int, int],
    top: Number,
    scores: Address,
    weights: Address,
    sums: Address,
) -> None:
    """Write the lse of `blocks` for a query row that sees keys first+low .. first+high of a tile.

    `blocks` is handed in because a division costs as much as the rest for a block.
    """
    size = get(params, BLOCK_SIZE)
    low, high = seen
    start, stop = blocks
    for block in range(start, stop):
        a, b = max(low, block * size - first), min(high, (block + 1) * size - first)
        # A vector of the tail may reach past `high`: weights are 0 there.
        whole = pad(b, LANES) if b == high else b
        put(sums + 4 * (block - start), _segment_sum(weights, a, whole))
    merge = size > TILE
    for base in range(0, stop - start, LANES):
        values = mul(add(log2(load(np.float32(0), sums + 4 * base)), splat(top)), splat(LN2))
        logs = sums + 4 * 2 * TILE
        store(logs, values)
        for i in range(base, min(stop - start, base + LANES)):
            value = scalar(np.float32(0), logs + 4 * (i - base))
            if scalar(np.float32(0), sums + 4 * i) < FAINT:
                a = max(low, (start + i) * size - first)
                b = min(high, (start + i + 1) * size - first)
                value = _exact_segment(scores, a, b) * np.float32(LN2)
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
