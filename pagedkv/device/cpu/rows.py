"""The inner loops of decode: four stored rows against several query rows.

Lanes run over the head size. Four rows at a time give the additions something to overlap with and
let their sums across lanes share shuffles (`put_totals`). Several query rows at a time, where a KV
head has as many: each stored value is then loaded, and widened if it is stored narrow, once for
all of them. Three of them make 12 sums, a stored and three query vectors in `dots`, all 16
registers of AVX2. AVX-512 has 32, and takes four.
"""

from .layout import TILE
from .several import asks, fmas, loads, put_totals, splats, stores, zeros
from .simd import (
    LANES,
    Address,
    Number,
    Sample,
    get,
    inlined,
    kernel,
    lead,
    load,
    load_n,
    row_scale,
    width,
)

__all__ = ["add_rows", "dots", "moved", "rows_at", "split"]

SEVERAL = 4 if LANES == 16 else 3  # query rows at once, at most


@kernel
def rows_at(
    base: Address, places: Address, j: int, quarter: int
) -> tuple[Address, Address, Address, Address]:
    """Where the j-th key or value of each quarter lies."""
    first, second = get(places, j), get(places, j + quarter)
    third, fourth = get(places, j + 2 * quarter), get(places, j + 3 * quarter)
    return base + first, base + second, base + third, base + fourth


@kernel
def moved(rows: tuple[Address, ...], by: int) -> tuple[Address, ...]:
    """Four addresses, so many bytes on."""
    return rows[0] + by, rows[1] + by, rows[2] + by, rows[3] + by


@kernel
def split(group: int) -> tuple[int, int]:
    """How many fours and threes of query rows to take at once; the rest come one by one.

    Threes make up what fours leave: 7 are 4 + 3, 9 are 3 + 3 + 3. With both, only of 1, 2 and 5 is
    any left.
    """
    if SEVERAL < 4:
        return 0, group // 3
    threes = -group % 4
    if 3 * threes > group:
        threes = 0
    return (group - 3 * threes) // 4, threes


@inlined
def _scales(sample: Sample, rows: tuple[Address, ...]) -> tuple[Number, ...]:
    first, second = row_scale(sample, rows[0]), row_scale(sample, rows[1])
    return first, second, row_scale(sample, rows[2]), row_scale(sample, rows[3])


@inlined
def _dots(
    sample: Sample,
    rows: tuple[Address, ...],
    soon: tuple[Address, ...],
    queries: tuple[Address, ...],
    turned: tuple[int, int, int, int],
    dim: int,
    scores: Address,
) -> None:
    """What `dots` does."""
    step, skip = width(sample), lead(sample)
    k, m, n, o = rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip
    p, q, r, s = turned
    whole = dim // LANES * LANES
    a = zeros(queries)
    b, c, d = a, a, a
    for i in range(0, whole, LANES):
        at = i * step
        if at % 64 == 0:
            asks(soon, at)
        a = fmas(load(sample, k + at), loads(queries, p + 4 * i), a)
        b = fmas(load(sample, m + at), loads(queries, q + 4 * i), b)
        c = fmas(load(sample, n + at), loads(queries, r + 4 * i), c)
        d = fmas(load(sample, o + at), loads(queries, s + 4 * i), d)
    if whole < dim:
        at, left = whole * step, dim - whole
        a = fmas(load_n(sample, k + at, left), loads(queries, p + 4 * whole), a)
        b = fmas(load_n(sample, m + at, left), loads(queries, q + 4 * whole), b)
        c = fmas(load_n(sample, n + at, left), loads(queries, r + 4 * whole), c)
        d = fmas(load_n(sample, o + at, left), loads(queries, s + 4 * whole), d)
    put_totals(scores, 4 * TILE, a, b, c, d, _scales(sample, rows))


@inlined
def dots(
    sample: Sample,
    rows: tuple[Address, ...],
    soon: tuple[Address, ...],
    queries: tuple[Address, ...],
    turned: tuple[int, int, int, int],
    dim: int,
    scores: Address,
) -> None:
    """Write query . key for the four keys at `rows` and each query row, a line of a tile apart.

    Compiled apart for keys that all meet the same: there a query is loaded once.

    `soon`: Rows that are asked for on the way: spread out, requests do not queue.
    `turned`: How far behind `queries` lie those that each key meets.
    """
    first, second, third, fourth = turned
    if first == second and second == third and third == fourth:
        _dots(sample, rows, soon, queries, (first, first, first, first), dim, scores)
    else:
        _dots(sample, rows, soon, queries, turned, dim, scores)


@inlined
def add_rows(
    sample: Sample,
    rows: tuple[Address, ...],
    soon: tuple[Address, ...],
    weights: tuple[Address, ...],
    accs: tuple[Address, ...],
    dim: int,
) -> None:
    """Each acc += its weights . the four value rows.

    `weights`: Of each query row, where the four lie side by side.
    `soon`: As for `dots`.
    """
    step, skip = width(sample), lead(sample)
    k, m, n, o = rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip
    scales = _scales(sample, rows)
    a, b = splats(weights, 0, scales[0]), splats(weights, 4, scales[1])
    c, d = splats(weights, 8, scales[2]), splats(weights, 12, scales[3])
    whole = dim // LANES * LANES
    for i in range(0, whole, LANES):
        at = i * step
        if at % 64 == 0:
            asks(soon, at)
        sums = fmas(load(sample, k + at), a, loads(accs, 4 * i))
        sums = fmas(load(sample, m + at), b, sums)
        sums = fmas(load(sample, n + at), c, sums)
        stores(accs, 4 * i, fmas(load(sample, o + at), d, sums))
    if whole < dim:
        at, left = whole * step, dim - whole
        sums = fmas(load_n(sample, k + at, left), a, loads(accs, 4 * whole))
        sums = fmas(load_n(sample, m + at, left), b, sums)
        sums = fmas(load_n(sample, n + at, left), c, sums)
        stores(accs, 4 * whole, fmas(load_n(sample, o + at, left), d, sums))
