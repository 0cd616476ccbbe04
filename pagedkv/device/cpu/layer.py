"""A decoder layer around its attention, as two native calls: all that comes before, all after.

In a decode step a product takes a hundred microseconds or less, and the calls from Python around it
a good part of that again. Here native code goes from one product to the next by itself; between
them run the norms, rotations and gates of `rowwise.py`. The same functions work on the same numbers
in the same order as when each is called from Python: the result is the same, bit for bit.
"""

from ctypes import addressof, c_int64
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from .kernel import parallel_address
from .linear import (
    BYTES,
    COLUMNS,
    HOW,
    INPUTS,
    NEXT,
    NUM_BLOCKS,
    ONE_ROW_OF_BYTES,
    OUT,
    OUT_STRIDE,
    ROWS,
    describe,
    take_panels,
    worker,
)
from .native import compile_native, sources
from .product import HEIGHT
from .rowwise import copy, gate_all, norm_rows, rotate_heads
from .simd import (
    LANES,
    Address,
    add,
    call_parallel,
    get,
    kernel,
    load,
    put,
    scalar,
    stack,
    store,
)

__all__ = ["Layer", "Norm", "Weight", "get_ready"]

# A weight, as int64: what `linear.describe` gives, and
BIAS, OUTPUTS = HOW + 1, HOW + 2
_WEIGHT = OUTPUTS + 1
# A norm: addresses of its weight, over how many numbers, and its epsilon's fp32 bits.
_NORM = 3
# A layer: norms of the hidden state before attention and after it, of heads of queries and of keys
# (weight 0: none); the weights; the size of a head.
BEFORE, AFTER, OF_Q, OF_K = range(4)
QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(7)
NORMS, WEIGHTS = 0, 4 * _NORM
DIM, _LAYER = WEIGHTS + 7 * _WEIGHT, WEIGHTS + 7 * _WEIGHT + 1
# Who works: threads, OpenMP's entry, the product's worker.
THREADS, PARALLEL, WORKER = range(3)

_call = stack(8 * (HOW + 1))


@kernel
def _add(a: Address, b: Address, out: Address, count: int) -> None:
    f32 = np.float32(0)
    whole = count // LANES * LANES
    for at in range(0, 4 * whole, 4 * LANES):
        store(out + at, add(load(f32, a + at), load(f32, b + at)))
    for at in range(4 * whole, 4 * count, 4):
        put(out + at, scalar(f32, a + at) + scalar(f32, b + at))


@kernel
def _weight(layer: Address, which: int) -> Address:
    return layer + 8 * (WEIGHTS + which * _WEIGHT)


@kernel
def _multiply(
    layer: Address, which: int, team: Address, tokens: int, rows: Address, out: Address
) -> None:
    """Multiply rows [tokens, inputs] by a weight, to out [tokens, outputs], and add its bias.

    Both have room for whole blocks of HEIGHT rows, and `out` for whole panels.
    """
    weight = _weight(layer, which)
    call, how, height = _call(), get(weight, HOW), HEIGHT
    for field in range(HOW):
        put(call + 8 * field, get(weight, field))
    if how == BYTES and tokens == 1:
        how, height = ONE_ROW_OF_BYTES, 1
    blocks = -(-tokens // height)
    inputs, outputs, stride = get(weight, INPUTS), get(weight, OUTPUTS), get(weight, OUT_STRIDE)
    for at in range(4 * inputs * tokens, 4 * inputs * height * blocks, 4):
        put(rows + at, np.float32(0))
    put(call + 8 * NEXT, 0)
    put(call + 8 * ROWS, rows)
    put(call + 8 * OUT, out)
    put(call + 8 * NUM_BLOCKS, blocks)
    put(call + 8 * HOW, how)
    if get(team, PARALLEL) != 0:
        call_parallel(get(team, PARALLEL), get(team, WORKER), call, get(team, THREADS))
    else:
        take_panels(call)
    if stride != 4 * outputs:
        for token in range(1, tokens):
            copy(out + stride * token, out + 4 * outputs * token, outputs)
    if get(weight, BIAS) != 0:
        for token in range(tokens):
            row = out + 4 * outputs * token
            _add(row, get(weight, BIAS), row, outputs)


@kernel
def _norm(layer: Address, which: int, source: Address, out: Address, count: int) -> None:
    """Norm `count` numbers in rows of the norm's size; in place if both are the same."""
    norm = layer + 8 * (NORMS + which * _NORM)
    weight, size = get(norm, 0), get(norm, 1)
    if weight != 0:
        norm_rows(source, weight, out, count // size, size, scalar(np.float32(0), norm + 16))


@kernel
def _before(
    layer: Address,
    team: Address,
    tokens: int,
    hidden: Address,
    normed: Address,
    q: Address,
    k: Address,
    v: Address,
    cos: Address,
    sin: Address,
    pairs: int,
) -> None:
    dim = get(layer, DIM)
    _norm(layer, BEFORE, hidden, normed, tokens * get(_weight(layer, QUERY), INPUTS))
    _multiply(layer, QUERY, team, tokens, normed, q)
    _multiply(layer, KEY, team, tokens, normed, k)
    _multiply(layer, VALUE, team, tokens, normed, v)
    for which, norm, rows in ((QUERY, OF_Q, q), (KEY, OF_K, k)):
        heads = get(_weight(layer, which), OUTPUTS) // dim
        _norm(layer, norm, rows, rows, tokens * heads * dim)
        rotate_heads(rows, rows, cos, sin, tokens, heads, dim, pairs, 4 * heads * dim, 4 * dim)


@kernel
def _after(
    layer: Address,
    team: Address,
    tokens: int,
    hidden: Address,
    attended: Address,
    out: Address,
    normed: Address,
    gates: Address,
    ups: Address,
) -> None:
    """`gates` and `ups` have room for what was attended and for a product of the hidden size."""
    size = tokens * get(_weight(layer, QUERY), INPUTS)
    copy(attended, gates, tokens * get(_weight(layer, OUTPUT), INPUTS))
    _multiply(layer, OUTPUT, team, tokens, gates, ups)
    _add(hidden, ups, out, size)
    _norm(layer, AFTER, out, normed, size)
    _multiply(layer, GATE, team, tokens, normed, gates)
    _multiply(layer, UP, team, tokens, normed, ups)
    gate_all(gates, ups, gates, tokens * get(_weight(layer, GATE), OUTPUTS))
    _multiply(layer, DOWN, team, tokens, gates, ups)
    _add(out, ups, out, size)


@cache
def _compiled(name: str) -> Any:
    """One of the two, as ctypes calls it."""
    digest = sources()

    def before(layer, team, tokens, hidden, normed, q, k, v, cos, sin, pairs):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _before(layer, team, tokens, hidden, normed, q, k, v, cos, sin, pairs)

    def after(layer, team, tokens, hidden, attended, out, normed, gates, ups):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _after(layer, team, tokens, hidden, attended, out, normed, gates, ups)

    if name == "before":
        return compile_native(types.void(*[types.int64] * 11), before, name).ctypes
    return compile_native(types.void(*[types.int64] * 9), after, name).ctypes


def get_ready() -> None:
    """Compile both, or load them from disk.

    Raises:
        UnsupportedBackend: They cannot be compiled here.

    Cost: seconds, once per machine.
    """
    for name in ("before", "after"):
        _compiled(name)


@dataclass(frozen=True)
class Norm:
    """An RMS norm over the last `len(weight)` numbers: fp32 [size], and its epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Weight:
    """A linear layer: its weight as `linear.multiply` takes it, and fp32 [outputs] or None."""

    panels: Tensor
    outputs: int
    bias: Tensor | None


class Layer:
    """What two native calls make of a layer's hidden states around its attention.

    Args:
        norms: Of hidden states before attention and after it, and of heads of queries and of keys,
            None if these are not normed.
        weights: Of queries, keys, values, outputs, gates, ups and downs.
        head_dim: Of all heads.

    Attributes:
        width: The most numbers of a token that come between its products.

    The tensors must stay where they are.
    """

    def __init__(self, norms: list[Norm | None], weights: list[Weight], head_dim: int) -> None:
        get_ready()
        self._owned = norms, weights
        self._dim = head_dim
        fields: list[int] = []
        for norm in norms:
            bits = int(np.float32(0 if norm is None else norm.epsilon).view(np.int32))
            of = (0, 1) if norm is None else (norm.weight.data_ptr(), len(norm.weight))
            fields += (*of, bits)
        for weight in weights:
            bias = 0 if weight.bias is None else weight.bias.data_ptr()
            fields += (*describe(weight.panels, torch.get_num_threads()), bias, weight.outputs)
        self._record = (c_int64 * _LAYER)(*fields, head_dim)
        self._address = addressof(self._record)
        widths = [-(-each.outputs // COLUMNS) * COLUMNS for each in weights]
        self._heads = [
            (width, each.outputs // head_dim)
            for width, each in zip(widths[:OUTPUT], weights[:OUTPUT], strict=True)
        ]
        self._hidden = weights[DOWN].outputs
        # What was attended comes there, and each of the products that follow.
        self.width = max(*widths[OUTPUT:], weights[QUERY].outputs)

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values: [1, heads, T, dim] each, token after token in memory.

        Args:
            hidden: fp32 [1, T, size], contiguous.
            cos: fp32 [1, T, 2 * pairs], contiguous.
            sin: The same shape.
        """
        tokens, dim = hidden.shape[1], self._dim
        rows = -(-tokens // HEIGHT) * HEIGHT
        normed = torch.empty(rows * self._hidden, dtype=torch.float32)
        made = [torch.empty(rows * width, dtype=torch.float32) for width, _ in self._heads]
        _compiled("before")(
            self._address,
            addressof(_team()),
            tokens,
            hidden.data_ptr(),
            normed.data_ptr(),
            *[each.data_ptr() for each in made],
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[2] // 2,
        )
        return tuple(
            each.as_strided((1, heads, tokens, dim), (0, dim, heads * dim, 1))
            for each, (_, heads) in zip(made, self._heads, strict=True)
        )

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the hidden states that the layer ends with: fp32 [1, T, size].

        Args:
            hidden: Those that `before` was given.
            attended: fp32 [1, T, heads, dim], contiguous.
        """
        tokens = hidden.shape[1]
        rows = -(-tokens // HEIGHT) * HEIGHT
        out = torch.empty_like(hidden)
        scratch = torch.empty(rows * (self._hidden + 2 * self.width), dtype=torch.float32)
        start = scratch.data_ptr()
        gates = start + 4 * rows * self._hidden
        _compiled("after")(
            self._address,
            addressof(_team()),
            tokens,
            hidden.data_ptr(),
            attended.data_ptr(),
            out.data_ptr(),
            start,
            gates,
            gates + 4 * rows * self.width,
        )
        return out


@cache
def _team_of(threads: int) -> Any:
    # Without OpenMP one thread does it all.
    entry = parallel_address() if threads > 1 else 0
    return (c_int64 * (WORKER + 1))(threads, entry, worker().address)


def _team() -> Any:
    return _team_of(torch.get_num_threads())
