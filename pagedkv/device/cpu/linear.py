"""Products with a matrix of weights that lies in the order it is read in: fp32, few rows or many.

The matrix is cut into panels of COLUMNS output features, each [inputs, COLUMNS] in one piece. A
panel comes from memory once and then serves all rows from the second-level cache, HEIGHT rows at
a time with their sums in registers (`product.py`). So a decode step of a few users is bound by
reading the weights. Threads share the panels; a row's sums do not depend on other rows.
"""

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from .kernel import run, sources
from .native import compile_native
from .product import HEIGHT, product
from .simd import LANES, Address, atomic_add, get, kernel

__all__ = ["get_ready", "multiply", "pack", "unpack"]

COLUMNS = 3 * LANES
# Numbers of the rows that are done with one panel after another: 256 KiB stay in the second-level
# cache beside a panel.
_ROWS_AT_ONCE = 1 << 16

# What the worker is told, as int64; strides in bytes, rows in blocks of HEIGHT.
NEXT, ROWS, PANELS, OUT, NUM_BLOCKS, INPUTS, NUM_PANELS, OUT_STRIDE, AT_ONCE, RUN = range(10)


@kernel
def _some_panels(params: Address, chunk: int, low: int, high: int) -> None:
    """Panels low..high of a chunk's rows."""
    inputs, stride = get(params, INPUTS), get(params, OUT_STRIDE)
    first = chunk * get(params, AT_ONCE)
    last = min(first + get(params, AT_ONCE), get(params, NUM_BLOCKS))
    for panel in range(low, high):
        weights = get(params, PANELS) + 4 * COLUMNS * inputs * panel
        for block in range(first, last):
            rows = get(params, ROWS) + 4 * inputs * HEIGHT * block
            out = get(params, OUT) + stride * HEIGHT * block + 4 * COLUMNS * panel
            product(rows, 4 * inputs, 4, weights, 4 * COLUMNS, inputs, out, stride)


@kernel
def _multiply(params: Address) -> None:
    """Take runs of panels off the shared counter until none is left."""
    panels, run = get(params, NUM_PANELS), get(params, RUN)
    runs = -(-panels // run)
    chunks = -(-get(params, NUM_BLOCKS) // get(params, AT_ONCE))
    item = atomic_add(params + 8 * NEXT, 1)
    while item < chunks * runs:
        low = item % runs * run
        _some_panels(params, item // runs, low, min(low + run, panels))
        item = atomic_add(params + 8 * NEXT, 1)


@cache
def _worker() -> Any:
    """The compiled worker; the object must outlive its address."""
    # numba's disk cache looks at this file only; the digest stands for what it imports.
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in sources())).hexdigest()

    def worker(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _multiply(params)

    return compile_native(types.void(types.int64), worker, "the product with packed weights")


def get_ready() -> None:
    """Compile it, or load it from disk.

    Raises:
        UnsupportedBackend: It cannot be compiled here.

    Cost: a second, once per machine.
    """
    _worker()


def pack(weight: Tensor) -> Tensor:
    """Return a weight fp32 [outputs, inputs] as panels [P, inputs, COLUMNS], zeros at the end."""
    outputs, inputs = weight.shape
    whole = torch.zeros(-(-outputs // COLUMNS) * COLUMNS, inputs, dtype=torch.float32)
    whole[:outputs] = weight
    return whole.view(-1, COLUMNS, inputs).transpose(1, 2).contiguous()


def unpack(panels: Tensor, outputs: int) -> Tensor:
    """Return what `pack` was given, bit for bit."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:outputs].contiguous()


def multiply(rows: Tensor, panels: Tensor, outputs: int) -> Tensor:
    """Return ``rows @ weight.T``: fp32 [T, inputs] to [T, outputs], contiguous.

    Args:
        rows: Any strides.
        panels: What `pack` made of the weight.
    """
    tokens, inputs = rows.shape
    num_panels, blocks = len(panels), -(-tokens // HEIGHT)
    if tokens % HEIGHT:
        whole = torch.zeros(blocks * HEIGHT, inputs, dtype=torch.float32)
        whole[:tokens] = rows
        rows = whole
    rows = rows.contiguous()
    out = torch.empty(blocks * HEIGHT, num_panels * COLUMNS, dtype=torch.float32)
    threads = torch.get_num_threads()
    params = np.zeros(RUN + 1, np.int64)
    params[ROWS:] = (
        rows.data_ptr(),
        panels.data_ptr(),
        out.data_ptr(),
        blocks,
        inputs,
        num_panels,
        4 * COLUMNS * num_panels,
        max(_ROWS_AT_ONCE // inputs // HEIGHT, 1),
        min(max(num_panels // (4 * threads), 1), 8),
    )
    if blocks:
        run(_worker(), params, threads)
    return out[:tokens, :outputs].contiguous()
