"""The inner loops of decode: four stored rows against one or three query rows.

Lanes run over the head size. Four rows at a time give the additions something to overlap with and
let their sums across lanes share shuffles (`put_totals4`). Three query rows at a time, where a KV
head has as many: each stored value is then loaded, and widened if it is stored narrow, once for
three. That is 12 sums, a stored and three query vectors: all 16 registers of AVX2, half of
AVX-512's. `dots3` and `add_rows3` are for head sizes of whole vectors.
"""

import numpy as np

from .layout import TILE
from .simd import (
    LANES,
    Address,
    Sample,
    Vector,
    fma,
    kernel,
    lead,
    load,
    load_n,
    prefetch,
    row_scale,
    scalar,
    splat,
    store,
    width,
)
from .simd_math import put_totals4

__all__ = ["add_rows", "add_rows3", "ask", "dots", "dots3"]


@kernel
def ask(row: Address, size: int) -> None:
    """Prefetch `size` bytes."""
    for i in range(0, size, 64):
        prefetch(row + i)


@kernel
def _met(queries: tuple[Address, ...], key: int) -> Address:
    return queries[key % len(queries)]


@kernel
def _three(query: Address, stride: int) -> tuple[Vector, Vector, Vector]:
    f32 = np.float32(0)
    return load(f32, query), load(f32, query + stride), load(f32, query + 2 * stride)


@kernel
def dots3(
    sample: Sample,
    rows: tuple[Address, ...],
    soon: tuple[Address, ...],
    queries: tuple[Address, ...],
    dim: int,
    scores: Address,
) -> None:
    """Write query . key for the four keys at `rows` and three query rows; dim is whole vectors.

    The four rows at `soon` are asked for on the way: spread out, requests do not queue.
    """
    f32 = np.float32(0)
    skip, step = lead(sample), width(sample)
    a, b, c, d = rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip
    stride = 4 * dim
    aq = splat(f32)
    bq, cq, dq, ar, br, cr, dr, at, bt, ct, dt = aq, aq, aq, aq, aq, aq, aq, aq, aq, aq, aq
    for i in range(0, dim, LANES):
        if i * step % 64 == 0:
            prefetch(soon[0] + i * step)
            prefetch(soon[1] + i * step)
            prefetch(soon[2] + i * step)
            prefetch(soon[3] + i * step)
        k = load(sample, a + i * step)
        q, r, t = _three(_met(queries, 0) + 4 * i, stride)
        aq, ar, at = fma(q, k, aq), fma(r, k, ar), fma(t, k, at)
        k = load(sample, b + i * step)
        q, r, t = _three(_met(queries, 1) + 4 * i, stride)
        bq, br, bt = fma(q, k, bq), fma(r, k, br), fma(t, k, bt)
        k = load(sample, c + i * step)
        q, r, t = _three(_met(queries, 2) + 4 * i, stride)
        cq, cr, ct = fma(q, k, cq), fma(r, k, cr), fma(t, k, ct)
        k = load(sample, d + i * step)
        q, r, t = _three(_met(queries, 3) + 4 * i, stride)
        dq, dr, dt = fma(q, k, dq), fma(r, k, dr), fma(t, k, dt)
    u, v = row_scale(sample, rows[0]), row_scale(sample, rows[1])
    w, x = row_scale(sample, rows[2]), row_scale(sample, rows[3])
    put_totals4(scores, aq, bq, cq, dq, u, v, w, x)
    put_totals4(scores + 4 * TILE, ar, br, cr, dr, u, v, w, x)
    put_totals4(scores + 8 * TILE, at, bt, ct, dt, u, v, w, x)


@kernel
def dots(
    sample: Sample,
    rows: tuple[Address, ...],
    queries: tuple[Address, ...],
    dim: int,
    scores: Address,
) -> None:
    """Write query . key for the four keys at `rows`."""
    skip = lead(sample)
    a, b, c, d = rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip
    whole = dim // LANES * LANES
    step = width(sample)
    f32 = np.float32(0)
    p, q = _met(queries, 0), _met(queries, 1)
    r, s = _met(queries, 2), _met(queries, 3)
    w = splat(f32)
    x, y, z = w, w, w
    for i in range(0, whole, LANES):
        w = fma(load(f32, p + 4 * i), load(sample, a + i * step), w)
        x = fma(load(f32, q + 4 * i), load(sample, b + i * step), x)
        y = fma(load(f32, r + 4 * i), load(sample, c + i * step), y)
        z = fma(load(f32, s + 4 * i), load(sample, d + i * step), z)
    if whole < dim:
        at, left = whole * step, dim - whole
        w = fma(load(f32, p + 4 * whole), load_n(sample, a + at, left), w)
        x = fma(load(f32, q + 4 * whole), load_n(sample, b + at, left), x)
        y = fma(load(f32, r + 4 * whole), load_n(sample, c + at, left), y)
        z = fma(load(f32, s + 4 * whole), load_n(sample, d + at, left), z)
    put_totals4(
        scores,
        w,
        x,
        y,
        z,
        row_scale(sample, rows[0]),
        row_scale(sample, rows[1]),
        row_scale(sample, rows[2]),
        row_scale(sample, rows[3]),
    )


@kernel
def add_rows3(
    sample: Sample,
    rows: tuple[Address, ...],
    soon: tuple[Address, ...],
    weights: Address,
    dim: int,
    acc: Address,
) -> None:
    """acc[0:3] += weights of three query rows . the four value rows; the rest as for `dots3`."""
    f32 = np.float32(0)
    step, skip = width(sample), lead(sample)
    a, b, c, d = rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip
    u, v = row_scale(sample, rows[0]), row_scale(sample, rows[1])
    w, x = row_scale(sample, rows[2]), row_scale(sample, rows[3])
    other, third = weights + 4 * TILE, weights + 8 * TILE
    aq, bq = splat(scalar(f32, weights) * u), splat(scalar(f32, weights + 4) * v)
    ar, br = splat(scalar(f32, other) * u), splat(scalar(f32, other + 4) * v)
    at, bt = splat(scalar(f32, third) * u), splat(scalar(f32, third + 4) * v)
    cq, dq = splat(scalar(f32, weights + 8) * w), splat(scalar(f32, weights + 12) * x)
    cr, dr = splat(scalar(f32, other + 8) * w), splat(scalar(f32, other + 12) * x)
    ct, dt = splat(scalar(f32, third + 8) * w), splat(scalar(f32, third + 12) * x)
    stride = 4 * dim
    for i in range(0, dim, LANES):
        if i * step % 64 == 0:
            prefetch(soon[0] + i * step)
            prefetch(soon[1] + i * step)
            prefetch(soon[2] + i * step)
            prefetch(soon[3] + i * step)
        to = acc + 4 * i
        q, r, t = load(f32, to), load(f32, to + stride), load(f32, to + 2 * stride)
        value = load(sample, a + i * step)
        q, r, t = fma(aq, value, q), fma(ar, value, r), fma(at, value, t)
        value = load(sample, b + i * step)
        q, r, t = fma(bq, value, q), fma(br, value, r), fma(bt, value, t)
        value = load(sample, c + i * step)
        q, r, t = fma(cq, value, q), fma(cr, value, r), fma(ct, value, t)
        value = load(sample, d + i * step)
        store(to, fma(dq, value, q))
        store(to + stride, fma(dr, value, r))
        store(to + 2 * stride, fma(dt, value, t))


@kernel
def add_rows(
    sample: Sample,
    rows: tuple[Address, ...],
    weights: Address,
    dim: int,
    acc: Address,
) -> None:
    """acc += weights . the four value rows."""
    f32 = np.float32(0)
    step, skip = width(sample), lead(sample)
    p = splat(scalar(f32, weights) * row_scale(sample, rows[0]))
    q = splat(scalar(f32, weights + 4) * row_scale(sample, rows[1]))
    r = splat(scalar(f32, weights + 8) * row_scale(sample, rows[2]))
    s = splat(scalar(f32, weights + 12) * row_scale(sample, rows[3]))
    a, b, c, d = rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip
    i = 0
    while i + LANES <= dim:
        at = i * step
        x = fma(p, load(sample, a + at), load(f32, acc + 4 * i))
        x = fma(q, load(sample, b + at), x)
        x = fma(r, load(sample, c + at), x)
        store(acc + 4 * i, fma(s, load(sample, d + at), x))
        i += LANES
    if i < dim:
        at = i * step
        x = fma(p, load_n(sample, a + at, dim - i), load(f32, acc + 4 * i))
        x = fma(q, load_n(sample, b + at, dim - i), x)
        x = fma(r, load_n(sample, c + at, dim - i), x)
        store(acc + 4 * i, fma(s, load_n(sample, d + at, dim - i), x))
