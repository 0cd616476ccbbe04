"""A decoder layer around its attention, as two native calls: all that comes before, all after.

In a decode step a product takes a hundred microseconds or less, and the calls from Python around it
a good part of that again. Here native code goes from one product to the next by itself; between
them run the norms, rotations and gates of `rowwise.py`. The same functions work on the same numbers
in the same order as when each is called from Python: the result is the same, bit for bit.
"""

from ctypes import addressof, c_int64
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from torch import Tensor

from .kernel import parallel_address
from .linear import (
    ALONE,
    COLUMNS,
    FP32,
    HOW,
    INPUTS,
    NEXT,
    NUM_BLOCKS,
    OUT,
    OUT_STRIDE,
    ROWS,
    describe,
    take_panels,
    worker,
)
from .native import compile_native, sources
from .product import HEIGHT
from .room import room
from .rowwise import copy, gate_rows, norm_rows, rotate_heads
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

__all__ = ["Layer", "Norm", "Shape", "Step", "Weight", "get_ready"]

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
# A step: who works (threads, OpenMP's entry, the product's worker); its tokens and their angles;
# where numbers lie between products, and how far behind its queries a layer's keys and values do.
THREADS, PARALLEL, WORKER = range(3)
TOKENS, COS, SIN, PAIRS, NORMED, GATES, UPS, KEYS_BEHIND, VALUES_BEHIND = range(3, 12)
_STEP = VALUES_BEHIND + 1

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
def _multiply(layer: Address, which: int, step: Address, rows: Address, out: Address) -> None:
    """Multiply rows [tokens, inputs] by a weight, to out [tokens, outputs], and add its bias.

    Both have room for whole blocks of HEIGHT rows, and `out` for whole panels.
    """
    weight = _weight(layer, which)
    call, how, height, tokens = _call(), get(weight, HOW), HEIGHT, get(step, TOKENS)
    for field in range(HOW):
        put(call + 8 * field, get(weight, field))
    if how != FP32 and tokens == 1:
        how, height = how + ALONE, 1
    blocks = -(-tokens // height)
    inputs, outputs, stride = get(weight, INPUTS), get(weight, OUTPUTS), get(weight, OUT_STRIDE)
    for at in range(4 * inputs * tokens, 4 * inputs * height * blocks, 4):
        put(rows + at, np.float32(0))
    put(call + 8 * NEXT, 0)
    put(call + 8 * ROWS, rows)
    put(call + 8 * OUT, out)
    put(call + 8 * NUM_BLOCKS, blocks)
    put(call + 8 * HOW, how)
    if get(step, PARALLEL) != 0:
        call_parallel(get(step, PARALLEL), get(step, WORKER), call, get(step, THREADS))
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
def _before(layer: Address, step: Address, hidden: Address, q: Address) -> None:
    dim, tokens, normed = get(layer, DIM), get(step, TOKENS), get(step, NORMED)
    k, v = q + get(step, KEYS_BEHIND), q + get(step, VALUES_BEHIND)
    _norm(layer, BEFORE, hidden, normed, tokens * get(_weight(layer, QUERY), INPUTS))
    _multiply(layer, QUERY, step, normed, q)
    _multiply(layer, KEY, step, normed, k)
    _multiply(layer, VALUE, step, normed, v)
    cos, sin, pairs = get(step, COS), get(step, SIN), get(step, PAIRS)
    for which, norm, rows in ((QUERY, OF_Q, q), (KEY, OF_K, k)):
        heads = get(_weight(layer, which), OUTPUTS) // dim
        _norm(layer, norm, rows, rows, tokens * heads * dim)
        rotate_heads(rows, rows, cos, sin, tokens, heads, dim, pairs, 4 * heads * dim, 4 * dim)


@kernel
def _after(layer: Address, step: Address, hidden: Address, attended: Address, out: Address) -> None:
    tokens, normed = get(step, TOKENS), get(step, NORMED)
    gates, ups = get(step, GATES), get(step, UPS)
    size = tokens * get(_weight(layer, QUERY), INPUTS)
    copy(attended, gates, tokens * get(_weight(layer, OUTPUT), INPUTS))
    _multiply(layer, OUTPUT, step, gates, ups)
    _add(hidden, ups, out, size)
    _norm(layer, AFTER, out, normed, size)
    _multiply(layer, GATE, step, normed, gates)
    _multiply(layer, UP, step, normed, ups)
    gate_rows(gates, ups, gates, tokens, get(_weight(layer, GATE), OUTPUTS))
    _multiply(layer, DOWN, step, gates, ups)
    _add(out, ups, out, size)


@cache
def _compiled(name: str) -> Any:
    """One of the two, as ctypes calls it."""
    digest = sources()

    def before(layer, step, hidden, q):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _before(layer, step, hidden, q)

    def after(layer, step, hidden, attended, out):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _after(layer, step, hidden, attended, out)

    if name == "before":
        return compile_native(types.void(*[types.int64] * 4), before, name).ctypes
    return compile_native(types.void(*[types.int64] * 5), after, name).ctypes


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


class Shape(NamedTuple):
    """Sizes of a layer: layers that agree in them take the same `Step`.

    Attributes:
        hidden: Numbers of a token's hidden state.
        dim: Of a head.
        heads: Of queries, keys and values.
        width: The most numbers of a token that come between the layer's products.
    """

    hidden: int
    dim: int
    heads: tuple[int, int, int]
    width: int


class Step:
    """What the layers of one shape share in a step: its angles, and room between their products.

    Layers use it one after the other.

    Args:
        shape: Theirs.
        cos: fp32 [1, T, 2 * pairs], contiguous.
        sin: The same shape.
    """

    def __init__(self, shape: Shape, cos: Tensor, sin: Tensor) -> None:
        tokens, dim = cos.shape[1], shape.dim
        rows = -(-tokens // HEIGHT) * HEIGHT
        normed, wide = rows * shape.hidden, rows * shape.width
        sizes = [rows * _whole(heads * dim) for heads in shape.heads]
        begins = 0, sizes[0], sizes[0] + sizes[1]
        made = normed + 2 * wide
        space = room(made + sum(sizes))
        at = space.data_ptr()
        angles = cos.data_ptr(), sin.data_ptr(), cos.shape[2] // 2
        between = at, at + 4 * normed, at + 4 * (normed + wide)
        behind = 4 * begins[1], 4 * begins[2]
        self._owned = cos, sin, space
        self._record = (c_int64 * _STEP)(*_team(), tokens, *angles, *between, *behind)
        self.address = addressof(self._record)
        self.made = at + 4 * made
        # The same for every layer: three fewer calls of torch in each.
        self.views = [
            space.as_strided((tokens, heads, dim), (heads * dim, dim, 1), made + begin)
            for heads, begin in zip(shape.heads, begins, strict=True)
        ]


class Layer:
    """What two native calls make of a layer's hidden states around its attention.

    Args:
        norms: Of hidden states before attention and after it, and of heads of queries and of keys,
            None if these are not normed.
        weights: Of queries, keys, values, outputs, gates, ups and downs.
        head_dim: Of all heads.

    Attributes:
        shape: Its sizes.

    The tensors must stay where they are.
    """

    def __init__(self, norms: list[Norm | None], weights: list[Weight], head_dim: int) -> None:
        get_ready()
        self._owned = norms, weights
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
        self._before, self._after = _compiled("before"), _compiled("after")
        q, k, v = (each.outputs // head_dim for each in weights[:OUTPUT])
        # What was attended comes there, and each of the products that follow.
        width = max(*(_whole(each.outputs) for each in weights[OUTPUT:]), q * head_dim)
        self.shape = Shape(weights[DOWN].outputs, head_dim, (q, k, v), width)

    def before(self, step: Step, hidden: Tensor) -> list[Tensor]:
        """Return queries, keys and values: [T, heads, dim] each, until a next layer makes its own.

        Args:
            step: For layers of this shape.
            hidden: fp32 [1, T, size], contiguous.
        """
        self._before(self._address, step.address, hidden.data_ptr(), step.made)
        return step.views

    def after(self, step: Step, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the hidden states that the layer ends with: fp32 [1, T, size].

        Args:
            step: For layers of this shape.
            hidden: Those that `before` was given.
            attended: fp32 [T, heads, dim], contiguous.
        """
        out = room(*hidden.shape)
        self._after(
            self._address,
            step.address,
            hidden.data_ptr(),
            attended.data_ptr(),
            out.data_ptr(),
        )
        return out


def _whole(outputs: int) -> int:
    """The width of whole panels."""
    return -(-outputs // COLUMNS) * COLUMNS


def _team() -> tuple[int, int, int]:
    threads = torch.get_num_threads()
    # Without OpenMP one thread does it all.
    return threads, parallel_address() if threads > 1 else 0, worker().address
