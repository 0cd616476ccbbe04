"""Products with a matrix of weights that lies in the order it is read in: fp32, few rows or many.

The matrix is cut into panels of COLUMNS output features, each [inputs, COLUMNS] in one piece. A
panel comes from memory once and then serves all rows from the second-level cache, HEIGHT rows at
a time with their sums in registers (`product.py`). So a decode step of a few users is bound by
reading the weights. Threads share the panels; a row's sums do not depend on other rows.

Weights that can be had from a byte each (`codes.py`) lie in bytes and are expanded where they are
multiplied, to the same fp32 numbers, which are summed in the same order: the same result, bit for
bit, for a third of the reading.

A weight as torch has it, row by row, can be multiplied with as well, its sums over vectors of
inputs. While they are added up, the next features are asked for line by line: in one go they would
keep the loads of those sums waiting.
"""

from ctypes import addressof, c_int64
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from .codes import GROUP, GROUP_BYTES, decode, encode
from .kernel import run
from .native import compile_native, sources
from .product import HEIGHT, SIX, THREE, dots, dots_of_one, product, product_onto
from .room import room
from .simd import (
    LANES,
    Address,
    atomic_add,
    fma,
    get,
    kernel,
    load,
    prefetch,
    scalar,
    splat,
    stack,
    store,
)

__all__ = [
    "MOST_PLAIN_ROWS",
    "describe",
    "get_ready",
    "multiplies_plain",
    "multiply",
    "pack",
    "take_panels",
    "unpack",
    "worker",
]

COLUMNS = 3 * LANES
# Numbers of the rows that are done with one panel after another: 256 KiB stay in the second-level
# cache beside a panel.
_ROWS_AT_ONCE = 1 << 16

# Rows up to which a plain weight is multiplied with here: for a whole model torch takes longer with
# so few, and less with more.
MOST_PLAIN_ROWS = 128 if LANES == 8 else 64

# Inputs whose weights are expanded at once: they stay in the first-level cache.
_PIECE = 3 * GROUP
_ones_and_piece = stack(4 * COLUMNS * (1 + _PIECE))

# What the worker is told, as int64; strides in bytes, rows in blocks of HEIGHT.
NEXT, ROWS, PANELS, OUT, NUM_BLOCKS, INPUTS, NUM_PANELS, OUT_STRIDE, AT_ONCE, RUN, HOW = range(11)
FP32, BYTES, PLAIN = range(3)
ALONE = 3  # added to BYTES or PLAIN where there is one row, and no block of HEIGHT
_Params = c_int64 * (HOW + 1)


@kernel
def _some_panels(params: Address, chunk: int, low: int, high: int) -> None:
    """Panels low..high of a chunk's rows, weights in fp32."""
    inputs, stride = get(params, INPUTS), get(params, OUT_STRIDE)
    first = chunk * get(params, AT_ONCE)
    last = min(first + get(params, AT_ONCE), get(params, NUM_BLOCKS))
    for panel in range(low, high):
        weights = get(params, PANELS) + 4 * COLUMNS * inputs * panel
        for block in range(first, last):
            rows = get(params, ROWS) + 4 * inputs * HEIGHT * block
            out = get(params, OUT) + stride * HEIGHT * block + 4 * COLUMNS * panel
            product(rows, 4 * inputs, 4, weights, 4 * COLUMNS, inputs, out, stride, THREE)


@kernel
def _expand(group: Address, end: Address, to: Address) -> None:
    """Write the weights of some groups of inputs: fp32 [GROUP, COLUMNS] each."""
    f32, i8 = np.float32(0), np.int8(0)
    while group < end:
        d0, d1, d2 = load(f32, group), load(f32, group + 4 * LANES), load(f32, group + 8 * LANES)
        m = group + 4 * COLUMNS
        m0, m1, m2 = load(f32, m), load(f32, m + 4 * LANES), load(f32, m + 8 * LANES)
        group += GROUP_BYTES * COLUMNS
        for q in range(m + 4 * COLUMNS, group, COLUMNS):
            store(to, fma(load(i8, q), d0, m0))
            store(to + 4 * LANES, fma(load(i8, q + LANES), d1, m1))
            store(to + 8 * LANES, fma(load(i8, q + 2 * LANES), d2, m2))
            to += 4 * COLUMNS


@kernel
def _some_panels_of_bytes(params: Address, chunk: int, low: int, high: int) -> None:
    """The same, weights in bytes: a piece is expanded, then multiplied with all of the rows."""
    inputs, stride = get(params, INPUTS), get(params, OUT_STRIDE)
    first = chunk * get(params, AT_ONCE)
    last = min(first + get(params, AT_ONCE), get(params, NUM_BLOCKS))
    ones = _ones_and_piece()
    weights = ones + 4 * COLUMNS
    for v in range(3):
        store(ones + 4 * LANES * v, splat(np.float32(1)))
    each = GROUP_BYTES * COLUMNS
    group = get(params, PANELS) + each * (inputs // GROUP) * low
    for panel in range(low, high):
        for begin in range(0, inputs, _PIECE):
            count = min(_PIECE, inputs - begin)
            end = group + each * (count // GROUP)
            _expand(group, end, weights)
            group = end
            for line in range(0, each * (_PIECE // GROUP), 64):
                prefetch(end + line)  # memory would be idle during the products
            for block in range(first, last):
                rows = get(params, ROWS) + 4 * inputs * HEIGHT * block + 4 * begin
                out = get(params, OUT) + stride * HEIGHT * block + 4 * COLUMNS * panel
                step = 4 * COLUMNS
                if begin == 0:
                    product(rows, 4 * inputs, 4, weights, step, count, out, stride, THREE)
                else:
                    product_onto(
                        rows, 4 * inputs, 4, weights, step, count, out, stride, THREE, ones
                    )


@kernel
def _one_row_of_bytes(params: Address, low: int, high: int) -> None:
    """The same for a row alone, with nothing written but its sums."""
    f32, i8 = np.float32(0), np.int8(0)
    inputs = get(params, INPUTS)
    group = get(params, PANELS) + GROUP_BYTES * COLUMNS * (inputs // GROUP) * low
    for panel in range(low, high):
        s0 = s1 = s2 = splat(f32)
        row = get(params, ROWS)
        for _ in range(inputs // GROUP):
            m = group + 4 * COLUMNS
            d0, d1, d2 = (
                load(f32, group),
                load(f32, group + 4 * LANES),
                load(f32, group + 8 * LANES),
            )
            m0, m1, m2 = load(f32, m), load(f32, m + 4 * LANES), load(f32, m + 8 * LANES)
            group += GROUP_BYTES * COLUMNS
            for q in range(m + 4 * COLUMNS, group, COLUMNS):
                number = splat(scalar(f32, row))
                s0 = fma(number, fma(load(i8, q), d0, m0), s0)
                s1 = fma(number, fma(load(i8, q + LANES), d1, m1), s1)
                s2 = fma(number, fma(load(i8, q + 2 * LANES), d2, m2), s2)
                row += 4
        out = get(params, OUT) + 4 * COLUMNS * panel
        store(out, s0)
        store(out + 4 * LANES, s1)
        store(out + 8 * LANES, s2)


@kernel
def _some_plain_rows(params: Address, chunk: int, low: int, high: int) -> None:
    """The same for a weight as torch has it: three features at once, the last ones maybe again."""
    inputs, stride = get(params, INPUTS), get(params, OUT_STRIDE)
    first = chunk * get(params, AT_ONCE)
    last = min(first + get(params, AT_ONCE), get(params, NUM_BLOCKS))
    end = stride // 4 if high == get(params, NUM_PANELS) else COLUMNS * high
    feature = COLUMNS * low
    while feature < end:
        at = min(feature, end - THREE)
        weight = get(params, PANELS) + 4 * inputs * at
        for block in range(first, last):
            rows = get(params, ROWS) + 4 * inputs * HEIGHT * block
            out = get(params, OUT) + stride * HEIGHT * block + 4 * at
            # The next features: memory would be idle between the sums.
            asks = 1 if block == first else 0
            dots(rows, 4 * inputs, weight, 4 * inputs, inputs // LANES, out, stride, asks)
        feature += THREE


@kernel
def _one_plain_row(params: Address, low: int, high: int) -> None:
    """The same for a row alone, with six features at once."""
    inputs = get(params, INPUTS)
    end = get(params, OUT_STRIDE) // 4 if high == get(params, NUM_PANELS) else COLUMNS * high
    for feature in range(COLUMNS * low, end, SIX):
        at = min(feature, end - SIX)
        weight, out = get(params, PANELS) + 4 * inputs * at, get(params, OUT) + 4 * at
        dots_of_one(get(params, ROWS), weight, 4 * inputs, inputs // LANES, out)


@kernel
def take_panels(params: Address) -> None:
    """Take runs of panels off the shared counter until none is left."""
    panels, run = get(params, NUM_PANELS), get(params, RUN)
    runs = -(-panels // run)
    chunks = -(-get(params, NUM_BLOCKS) // get(params, AT_ONCE))
    item = atomic_add(params + 8 * NEXT, 1)
    while item < chunks * runs:
        low = item % runs * run
        high = min(low + run, panels)
        if get(params, HOW) == FP32:
            _some_panels(params, item // runs, low, high)
        elif get(params, HOW) == BYTES:
            _some_panels_of_bytes(params, item // runs, low, high)
        elif get(params, HOW) == PLAIN:
            _some_plain_rows(params, item // runs, low, high)
        elif get(params, HOW) == BYTES + ALONE:
            _one_row_of_bytes(params, low, high)
        else:
            _one_plain_row(params, low, high)
        item = atomic_add(params + 8 * NEXT, 1)


@cache
def worker() -> Any:
    """The compiled worker; the object must outlive its address."""
    digest = sources()

    def some(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        take_panels(params)

    return compile_native(types.void(types.int64), some, "the product")


def get_ready() -> None:
    """Compile it, or load it from disk.

    Raises:
        UnsupportedBackend: It cannot be compiled here.

    Cost: a second, once per machine.
    """
    worker()


def pack(weight: Tensor) -> Tensor:
    """Return a weight fp32 [outputs, inputs] as panels of COLUMNS features, zeros at the end.

    They are in bytes, as `encode` returns them, if that is all of the weight; else fp32
    [P, inputs, COLUMNS].
    """
    outputs, inputs = weight.shape
    whole = room(-(-outputs // COLUMNS) * COLUMNS, inputs).zero_()
    whole[:outputs] = weight
    coded = encode(whole, COLUMNS)
    if coded is not None:
        return coded
    return whole.view(-1, COLUMNS, inputs).transpose(1, 2).contiguous()


def unpack(panels: Tensor, outputs: int) -> Tensor:
    """Return what `pack` was given, bit for bit."""
    in_bytes = panels.dtype == torch.int8
    whole = decode(panels) if in_bytes else panels.transpose(1, 2).flatten(0, 1)
    return whole[:outputs].contiguous()


def describe(panels: Tensor, threads: int) -> tuple[int, ...]:
    """Return what the worker is told about a weight: HOW + 1 fields, 0 where the rows decide.

    Args:
        panels: As `multiply` takes it; the fields hold its address.
        threads: How many share the work.
    """
    if panels.dim() == 2:
        # The last panel takes all that is left over.
        num_panels, how, stride = max(panels.shape[0] // COLUMNS, 1), PLAIN, 4 * panels.shape[0]
    else:
        num_panels, how = panels.shape[0], FP32 if panels.dtype == torch.float32 else BYTES
        stride = 4 * COLUMNS * num_panels
    inputs = panels.shape[1] * (GROUP if how == BYTES else 1)
    at_once = max(_ROWS_AT_ONCE // inputs // HEIGHT, 1)
    run_length = min(max(num_panels // (4 * threads), 1), 8)
    return 0, 0, panels.data_ptr(), 0, 0, inputs, num_panels, stride, at_once, run_length, how


def multiplies_plain(weight: Tensor) -> bool:
    """Return whether `multiply` takes a weight as it is: fp32 [outputs, inputs]."""
    outputs, inputs = weight.shape
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and inputs % LANES == 0
        and outputs >= SIX
    )


def multiply(rows: Tensor, panels: Tensor, outputs: int) -> Tensor:
    """Return ``rows @ weight.T``: fp32 [T, inputs] to [T, outputs], contiguous.

    Args:
        rows: Any strides.
        panels: What `pack` made of the weight; or the weight, if `multiplies_plain` says so.
    """
    tokens, inputs = rows.shape
    threads = torch.get_num_threads()
    # Not numpy: a decode step makes hundreds of these, and the address of an array takes it long.
    params = _Params(*describe(panels, threads))
    height = HEIGHT
    if params[HOW] != FP32 and tokens == 1:
        params[HOW], height = params[HOW] + ALONE, 1
    blocks = -(-tokens // height)
    whole = blocks * height
    if whole != tokens:
        padded = room(whole, inputs).zero_()
        padded[:tokens] = rows
        rows = padded
    rows = rows.contiguous()
    width = params[OUT_STRIDE] // 4
    out = room(whole, width)
    params[ROWS], params[OUT], params[NUM_BLOCKS] = rows.data_ptr(), out.data_ptr(), blocks
    if blocks:
        run(worker(), addressof(params), threads)
    if whole == tokens and width == outputs:
        return out
    return out[:tokens, :outputs].contiguous()
