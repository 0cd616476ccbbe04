"""Rotations, norms and gates, row by row: what a model asks of every token between its products.

Each is one call here and a dozen in torch. Where a step has few tokens, calls are what they cost:
what Python does around one is kept to the least. Where it has many, threads share the rows, and
what torch would write to memory and read again between its calls stays in registers. fp32 only.
"""

import math
from array import array
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from .kernel import run
from .native import compile_native, sources
from .room import room
from .rotation import rotate_head
from .simd import (
    LANES,
    Address,
    Number,
    add,
    atomic_add,
    div,
    fma,
    get,
    kernel,
    load,
    maximum,
    mul,
    put,
    scalar,
    splat,
    store,
    total,
)
from .simd_math import exp2

__all__ = [
    "copy",
    "gate_rows",
    "get_ready",
    "norm_rows",
    "put_rows",
    "rms_norm",
    "rotate",
    "rotate_heads",
    "silu_gate",
]

# Fields of a call that threads share: who takes the next rows, how many there are, how many one
# takes at a time; then its operands.
NEXT, ROWS, EACH, FIRST = range(4)
_SHARE = 1 << 16  # numbers that a thread takes at a time
_FAR = -80.0  # below it the logistic function is 0 beside anything; keeps exp2 in range
_LOG2_E = 1.0 / math.log(2.0)


@kernel
def _next_share(params: Address) -> tuple[int, int]:
    """The first of the rows that a thread takes next, and how many."""
    begin = atomic_add(params + 8 * NEXT, 1) * get(params, EACH)
    return begin, min(get(params, EACH), get(params, ROWS) - begin)


@kernel
def copy(source: Address, out: Address, count: int) -> None:
    """Copy fp32 numbers, first to last: `out` may lie before the source and reach into it."""
    f32 = np.float32(0)
    whole = count // LANES * LANES
    for at in range(0, 4 * whole, 4 * LANES):
        store(out + at, load(f32, source + at))
    for at in range(4 * whole, 4 * count, 4):
        put(out + at, scalar(f32, source + at))


@kernel
def rotate_heads(
    source: Address,
    out: Address,
    cos: Address,
    sin: Address,
    tokens: int,
    heads: int,
    dim: int,
    pairs: int,
    token_stride: int,
    head_stride: int,
) -> None:
    """All heads of all tokens; what lies behind the pairs is copied. Strides are bytes."""
    f32 = np.float32(0)
    for token in range(tokens):
        angle = 8 * pairs * token
        for head in range(heads):
            at = source + token * token_stride + head * head_stride
            to = out + 4 * dim * (token * heads + head)
            rotate_head(at, to, cos + angle, sin + angle, pairs, 4 * pairs)
            for i in range(8 * pairs, 4 * dim, 4):
                put(to + i, scalar(f32, at + i))


@kernel
def _rotate_share(params: Address, of: int, begin: int, count: int) -> None:
    """Turn some tokens' queries, or keys: fields from `of` on say where those lie."""
    dim, pairs = get(params, FIRST + 12), get(params, FIRST + 13)
    heads, token_stride, head_stride = get(params, of + 2), get(params, of + 3), get(params, of + 4)
    source = get(params, of) + token_stride * begin
    out = get(params, of + 1) + 4 * dim * heads * begin
    cos = get(params, FIRST + 10) + 8 * pairs * begin
    sin = get(params, FIRST + 11) + 8 * pairs * begin
    rotate_heads(source, out, cos, sin, count, heads, dim, pairs, token_stride, head_stride)


@kernel
def norm_rows(
    source: Address, weight: Address, out: Address, rows: int, size: int, epsilon: Number
) -> None:
    """weight * (x / sqrt(mean(x^2) + epsilon)), row by row."""
    f32 = np.float32(0)
    whole = size // LANES * LANES
    for _ in range(rows):
        squares = splat(f32)
        for at in range(0, 4 * whole, 4 * LANES):
            x = load(f32, source + at)
            squares = fma(x, x, squares)
        mass = total(squares)
        for at in range(4 * whole, 4 * size, 4):
            mass += scalar(f32, source + at) * scalar(f32, source + at)
        scale = np.float32(1) / np.sqrt(mass / np.float32(size) + epsilon)
        scales = splat(scale)
        for at in range(0, 4 * whole, 4 * LANES):
            store(out + at, mul(load(f32, weight + at), mul(load(f32, source + at), scales)))
        for at in range(4 * whole, 4 * size, 4):
            put(out + at, scalar(f32, weight + at) * (scalar(f32, source + at) * scale))
        source += 4 * size
        out += 4 * size


@kernel
def gate_all(gate: Address, up: Address, out: Address, count: int) -> None:
    """up * gate / (1 + exp(-gate)), number by number."""
    f32 = np.float32(0)
    whole = count // LANES * LANES
    one, far, base = splat(np.float32(1)), splat(np.float32(_FAR)), splat(np.float32(-_LOG2_E))
    for at in range(0, 4 * whole, 4 * LANES):
        x = load(f32, gate + at)
        below = add(one, exp2(mul(maximum(x, far), base)))
        store(out + at, mul(div(x, below), load(f32, up + at)))
    for at in range(4 * whole, 4 * count, 4):
        rest = scalar(f32, gate + at)
        least = np.float32(_FAR) if rest < np.float32(_FAR) else rest
        below_one = np.float32(1) + np.float32(math.exp(-least))
        put(out + at, rest / below_one * scalar(f32, up + at))


@kernel
def gate_rows(gate: Address, up: Address, out: Address, rows: int, size: int) -> None:
    """The same row by row, so that no row's last numbers depend on how many rows there are."""
    if size % LANES == 0:
        rows, size = 1, rows * size
    for at in range(0, 4 * size * rows, 4 * size):
        gate_all(gate + at, up + at, out + at, size)


@kernel
def _put_rows(
    source: Address,
    token_stride: int,
    head_stride: int,
    to: Address,
    slots: Address,
    shape: tuple[int, int, int],
) -> None:
    """Copy every token's heads to its slot. Strides are bytes."""
    tokens, heads, dim = shape
    for token in range(tokens):
        for head in range(heads):
            at = source + token * token_stride + head * head_stride
            copy(at, to + 4 * dim * (get(slots, token) * heads + head), dim)


@kernel
def _take_rotations(params: Address) -> None:
    begin, count = _next_share(params)
    while count > 0:
        _rotate_share(params, FIRST, begin, count)
        _rotate_share(params, FIRST + 5, begin, count)
        begin, count = _next_share(params)


@kernel
def _take_norms(params: Address) -> None:
    source, weight = get(params, FIRST), get(params, FIRST + 1)
    out, size = get(params, FIRST + 2), get(params, FIRST + 3)
    epsilon = scalar(np.float32(0), params + 8 * (FIRST + 4))
    begin, count = _next_share(params)
    while count > 0:
        at = 4 * size * begin
        norm_rows(source + at, weight, out + at, count, size, epsilon)
        begin, count = _next_share(params)


@kernel
def _take_gates(params: Address) -> None:
    gate, up, out = get(params, FIRST), get(params, FIRST + 1), get(params, FIRST + 2)
    size = get(params, FIRST + 3)
    begin, count = _next_share(params)
    while count > 0:
        at = 4 * size * begin
        gate_rows(gate + at, up + at, out + at, count, size)
        begin, count = _next_share(params)


@cache
def _compiled(name: str) -> Any:
    """One of the four: what `_spread` has threads call, or put_rows as ctypes calls it."""
    digest = sources()

    def rotation(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _take_rotations(params)

    def norm(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _take_norms(params)

    def gating(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _take_gates(params)

    def putting(k, kt, kh, v, vt, vh, to_k, to_v, slots, tokens, heads, dim, num_slots):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        for token in range(tokens):
            if not 0 <= get(slots, token) < num_slots:
                return 0
        _put_rows(k, kt, kh, to_k, slots, (tokens, heads, dim))
        _put_rows(v, vt, vh, to_v, slots, (tokens, heads, dim))
        return 1

    if name == "put_rows":
        return compile_native(types.int64(*[types.int64] * 13), putting, name).ctypes
    shared = {"rotate": rotation, "rms_norm": norm, "silu_gate": gating}[name]
    return compile_native(types.void(types.int64), shared, name)


@cache
def _bits(number: float) -> int:
    """A number in fp32, as the integer that lies in memory alike."""
    return int(np.float32(number).view(np.int32))


def _spread(name: str, rows: int, size: int, *operands: int) -> None:
    """Have one of the three work on all rows, `size` numbers each; on threads where they are many.

    Each row is one thread's, and worked on alike whatever others there are.
    """
    each = max(1, _SHARE // size)
    params = array("q", (0, rows, each, *operands))
    threads = min(torch.get_num_threads(), -(-rows // each))
    run(_compiled(name), params.buffer_info()[0], threads)


def get_ready() -> None:
    """Compile all four, or load them from disk.

    Raises:
        UnsupportedBackend: They cannot be compiled here.

    Cost: a second, once per machine.
    """
    for name in ("rotate", "rms_norm", "silu_gate", "put_rows"):
        _compiled(name)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn elements (i, i + pairs) of each head by its token's angles.

    Args:
        q: fp32 [1, heads, T, dim]; any strides but the last, which is 1.
        k: Like `q`, with its own number of heads.
        cos: fp32 [1, T, 2 * pairs], contiguous, 2 * pairs <= dim; what lies behind stays.
        sin: The same shape.

    Returns:
        Both, token after token in memory: bit for bit what products and a sum give.
    """
    _, heads, tokens, dim = q.shape
    kv_heads, pairs = k.shape[1], cos.shape[2] // 2
    _, q_head, q_token, _ = q.stride()
    _, k_head, k_token, _ = k.stride()
    turned_q = room(1, tokens, heads, dim)
    turned_k = room(1, tokens, kv_heads, dim)
    _spread(
        "rotate",
        tokens,
        (heads + kv_heads) * dim,
        *(q.data_ptr(), turned_q.data_ptr(), heads, 4 * q_token, 4 * q_head),
        *(k.data_ptr(), turned_k.data_ptr(), kv_heads, 4 * k_token, 4 * k_head),
        *(cos.data_ptr(), sin.data_ptr(), dim, pairs),
    )
    return turned_q.transpose(1, 2), turned_k.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension; fp32."""
    out = room(*x.shape)
    size = x.shape[-1]
    places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    _spread("rms_norm", x.numel() // size, size, *places, size, _bits(epsilon))
    return out


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``; fp32, contiguous and of one shape."""
    out = room(*gate.shape)
    size = gate.shape[-1]
    places = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    _spread("silu_gate", gate.numel() // size, size, *places, size)
    return out


def put_rows(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Copy the vectors of T tokens to their slots.

    Args:
        key: fp32 [T, heads, dim]; any strides but the last, which is 1.
        value: The same shape.
        keys: fp32 [S, heads * dim], contiguous.
        values: The same shape.
        slots: int64 [T], contiguous.

    Raises:
        IndexError: A slot is not one of the S; nothing is written.
    """
    tokens, heads, dim = key.shape
    (kt, kh, _), (vt, vh, _) = key.stride(), value.stride()
    done = _compiled("put_rows")(
        key.data_ptr(),
        4 * kt,
        4 * kh,
        value.data_ptr(),
        4 * vt,
        4 * vh,
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        tokens,
        heads,
        dim,
        len(keys),
    )
    if not done:
        raise IndexError(f"slots of {tokens} tokens lead outside the pool of {len(keys)}")
