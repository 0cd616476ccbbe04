"""Rotations and norms, row by row: what a model asks of every token between its products.

Each is one call here and half a dozen in torch. Where a step has few tokens, calls are what they
cost. fp32 only; threads and compiled code are as in `kernel.py`.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from pagedkv.errors import UnsupportedBackend

from .kernel import openmp, sources
from .simd import (
    LANES,
    Address,
    Number,
    add,
    atomic_add,
    fma,
    get,
    kernel,
    load,
    mul,
    put,
    scalar,
    splat,
    store,
    sub,
    total,
)

__all__ = ["get_ready", "rms_norm", "rotate"]

# Fields of a call's parameters, all 8 bytes. Strides are bytes.
NEXT, ROWS, RUN, IN, OUT = range(5)
COS, SIN, HEADS, DIM, PAIRS, TOKEN_STRIDE, HEAD_STRIDE, ANGLE_STRIDE = range(5, 13)
WEIGHT, SIZE, EPSILON = range(5, 8)
_NUM_PARAMS = 13
# Numbers that are worth a second thread: below, waking it takes as long as the work.
_SHARE = 1 << 17


@kernel
def _rotate_head(source: Address, out: Address, cos: Address, sin: Address, pairs: int) -> None:
    """Turn elements (i, i + pairs); rounded as torch's products and sums are, without fma."""
    f32 = np.float32(0)
    far = 4 * pairs
    whole = pairs // LANES * LANES
    for at in range(0, 4 * whole, 4 * LANES):
        a, b = load(f32, source + at), load(f32, source + far + at)
        c, s = load(f32, cos + at), load(f32, sin + at)
        store(out + at, sub(mul(a, c), mul(b, s)))
        c, s = load(f32, cos + far + at), load(f32, sin + far + at)
        store(out + far + at, add(mul(b, c), mul(a, s)))
    for at in range(4 * whole, far, 4):
        x, y = scalar(f32, source + at), scalar(f32, source + far + at)
        put(out + at, x * scalar(f32, cos + at) - y * scalar(f32, sin + at))
        put(out + far + at, y * scalar(f32, cos + far + at) + x * scalar(f32, sin + far + at))


@kernel
def _rotate_token(params: Address, token: int) -> None:
    """All heads of a token; what lies behind the pairs is copied."""
    f32 = np.float32(0)
    heads, dim, pairs = get(params, HEADS), get(params, DIM), get(params, PAIRS)
    angle = token * get(params, ANGLE_STRIDE)
    cos, sin = get(params, COS) + angle, get(params, SIN) + angle
    for head in range(heads):
        source = get(params, IN) + token * get(params, TOKEN_STRIDE)
        source += head * get(params, HEAD_STRIDE)
        out = get(params, OUT) + 4 * dim * (token * heads + head)
        _rotate_head(source, out, cos, sin, pairs)
        for at in range(8 * pairs, 4 * dim, 4):
            put(out + at, scalar(f32, source + at))


@kernel
def _norm_row(params: Address, row: int) -> None:
    """weight * (x / sqrt(mean(x^2) + epsilon))"""
    f32 = np.float32(0)
    size, weight = get(params, SIZE), get(params, WEIGHT)
    source, out = get(params, IN) + 4 * size * row, get(params, OUT) + 4 * size * row
    whole = size // LANES * LANES
    squares = splat(f32)
    for at in range(0, 4 * whole, 4 * LANES):
        x = load(f32, source + at)
        squares = fma(x, x, squares)
    mass = total(squares)
    for at in range(4 * whole, 4 * size, 4):
        mass += scalar(f32, source + at) * scalar(f32, source + at)
    scale: Number = np.float32(1) / np.sqrt(
        mass / np.float32(size) + scalar(f32, params + 8 * EPSILON)
    )
    scales = splat(scale)
    for at in range(0, 4 * whole, 4 * LANES):
        store(out + at, mul(load(f32, weight + at), mul(load(f32, source + at), scales)))
    for at in range(4 * whole, 4 * size, 4):
        put(out + at, scalar(f32, weight + at) * (scalar(f32, source + at) * scale))


_ROWS = {"rotate": _rotate_token, "rms_norm": _norm_row}


@cache
def _worker(name: str) -> Any:
    """What each thread runs: it takes runs of rows until none is left."""
    # numba's disk cache looks at this file only; the digest stands for what it imports.
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in sources())).hexdigest()
    row = _ROWS[name]

    def worker(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        rows, run = get(params, ROWS), get(params, RUN)
        i = atomic_add(params + 8 * NEXT, run)
        while i < rows:
            for j in range(i, min(i + run, rows)):
                row(params, j)
            i = atomic_add(params + 8 * NEXT, run)

    try:
        return cfunc(types.void(types.int64), cache=True, error_model="numpy")(worker)
    except Exception as error:  # numba raises many unrelated kinds; all mean the same here
        raise UnsupportedBackend(
            f"{name} did not compile ({type(error).__name__}: {error})",
            where="device.cpu",
            remedy="install a numba that supports this Python",
        ) from error


def get_ready() -> None:
    """Compile both, or load them from disk.

    Raises:
        UnsupportedBackend: They cannot be compiled here.

    Cost: a second, once per machine.
    """
    for name in _ROWS:
        _worker(name)


def _run(name: str, params: "np.ndarray[Any, np.dtype[np.int64]]", numbers: int) -> None:
    """Let one thread, or all, work through the rows."""
    worker: Any = _worker(name)
    threads = min(torch.get_num_threads(), int(params[ROWS]), 1 + numbers // _SHARE)
    parallel: Callable[[int, int, int, int], None] | None = openmp()
    params[RUN] = max(1, int(params[ROWS]) // (4 * threads))
    address = params.ctypes.data
    if threads > 1 and parallel is not None:
        parallel(worker.address, address, threads, 0)
    else:
        worker.ctypes(address)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn elements (i, i + pairs) of each head by its token's angles.

    Args:
        vectors: fp32 [1, heads, T, dim], heads in memory one after another or in any strides.
        cos: fp32 [1, T, 2 * pairs], 2 * pairs <= dim; what lies behind stays.
        sin: The same shape.

    Returns:
        [1, heads, T, dim], token after token in memory: bit for bit what products and a sum give.
    """
    _, heads, tokens, dim = vectors.shape
    if vectors.stride(3) != 1:
        vectors = vectors.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty((1, tokens, heads, dim))
    params = np.zeros(_NUM_PARAMS, np.int64)
    params[ROWS], params[IN], params[OUT] = tokens, vectors.data_ptr(), out.data_ptr()
    params[COS:] = (
        cos.data_ptr(),
        sin.data_ptr(),
        heads,
        dim,
        cos.shape[2] // 2,
        4 * vectors.stride(2),
        4 * vectors.stride(1),
        4 * cos.shape[2],
    )
    _run("rotate", params, out.numel())
    return out.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension; fp32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    params = np.zeros(_NUM_PARAMS, np.int64)
    params[ROWS], params[IN], params[OUT] = x.numel() // size, x.data_ptr(), out.data_ptr()
    params[WEIGHT], params[SIZE] = weight.data_ptr(), size
    params.view(np.float32)[2 * EPSILON] = epsilon
    _run("rms_norm", params, out.numel())
    return out
