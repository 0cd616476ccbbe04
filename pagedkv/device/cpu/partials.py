"""Partial attentions, natively: queries turned for each, and the parts merged to a whole.

A (query, run of blocks) pair is one row of a partial attention. Each of these is one call here and
some ten in torch. fp32 only.
"""

import math
from ctypes import addressof, c_int64
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from pagedkv.core.arrays import Int64

from .kernel import run
from .native import compile_native, sources
from .room import room
from .rowwise import copy, rotate_head
from .simd import (
    LANES,
    Address,
    Number,
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
)

__all__ = ["Merge", "Turn", "get_ready"]

_MANY = 1 << 14  # numbers; with fewer, waking threads costs more than they save


# What `_turn` is told, as int64; strides are bytes.
TOKEN, ROW, COS, SIN, PAIRS, NUM_ROWS = range(1, 7)
QUERY, TURNED, NUM_HEADS, SIZE, QUERY_STRIDE, HEAD_STRIDE = range(7, 13)
_TURN_FIELDS = 13
# Both records begin with how many rows or queries were taken.
NEXT = 0


@kernel
def _turn(params: Address) -> None:
    """Rows off the shared counter: a pair's query, all heads; angles 0 turn nothing."""
    heads, dim, pairs = get(params, NUM_HEADS), get(params, SIZE), get(params, PAIRS)
    i = atomic_add(params + 8 * NEXT, 1)
    while i < get(params, NUM_ROWS):
        source = get(params, QUERY) + get(get(params, TOKEN), i) * get(params, QUERY_STRIDE)
        out = get(params, TURNED) + 4 * dim * heads * i
        angles = get(get(params, ROW), i)
        cos, sin = get(params, COS) + 4 * pairs * angles, get(params, SIN) + 4 * pairs * angles
        rotated = 2 * pairs if angles != 0 else 0
        for _ in range(heads):
            if rotated:
                rotate_head(source, out, cos, sin, pairs, 0)
            copy(source + 4 * rotated, out + 4 * rotated, dim - rotated)
            source += get(params, HEAD_STRIDE)
            out += 4 * dim
        i = atomic_add(params + 8 * NEXT, 1)


@kernel
def _mix(out: Address, part: Address, weight: Number, dim: int, first: bool) -> None:
    """out += weight * part, or = where it is the first."""
    f32 = np.float32(0)
    whole = dim // LANES * LANES
    weights = splat(weight)
    for at in range(0, 4 * whole, 4 * LANES):
        before = splat(f32) if first else load(f32, out + at)
        store(out + at, fma(load(f32, part + at), weights, before))
    for at in range(4 * whole, 4 * dim, 4):
        rest = f32 if first else scalar(f32, out + at)
        put(out + at, rest + scalar(f32, part + at) * weight)


@kernel
def _scale(out: Address, factor: Number, dim: int) -> None:
    f32 = np.float32(0)
    whole = dim // LANES * LANES
    factors = splat(factor)
    for at in range(0, 4 * whole, 4 * LANES):
        store(out + at, mul(load(f32, out + at), factors))
    for at in range(4 * whole, 4 * dim, 4):
        put(out + at, scalar(f32, out + at) * factor)


# What `_merge` is told, as int64: of the merge, then of each call's answer.
BEGIN, ORDER, SPLIT, FIRST, COUNT, TOKENS, HEADS, DIM, WIDTH, OUT, LSE, ENTRIES = range(1, 13)
CALLS = 13
PART_OUT, PART_LSE, PART_ENTRIES, PART_WIDTH, PART_PAIRS = range(5)
CALL_FIELDS = 5


@kernel
def _part(params: Address, pair: int) -> tuple[Address, int]:
    """The record of the call that a pair is in, and its place there."""
    split = get(params, SPLIT)
    if pair < split:
        return params + 8 * CALLS, pair
    return params + 8 * (CALLS + CALL_FIELDS), pair - split


@kernel
def _part_lse(params: Address, pair: int, head: int) -> Number:
    call, at = _part(params, pair)
    return scalar(np.float32(0), get(call, PART_LSE) + 4 * (head * get(call, PART_PAIRS) + at))


@kernel
def _merge_head(params: Address, token: int, head: int) -> None:
    """One query: its pairs in their order, weighed by what each has of the softmax."""
    heads, dim = get(params, HEADS), get(params, DIM)
    low, high = get(get(params, BEGIN), token), get(get(params, BEGIN), token + 1)
    order = get(params, ORDER)
    top = np.float32(-np.inf)
    for j in range(low, high):
        lse = _part_lse(params, get(order, j), head)
        top = lse if lse > top else top
    mass = np.float32(0)
    out = get(params, OUT) + 4 * dim * (token * heads + head)
    for j in range(low, high):
        pair = get(order, j)
        weight = np.float32(math.exp(_part_lse(params, pair, head) - top))
        mass += weight
        call, at = _part(params, pair)
        _mix(out, get(call, PART_OUT) + 4 * dim * (at * heads + head), weight, dim, j == low)
    _scale(out, np.float32(1) / mass, dim)
    lse = top + np.float32(math.log(mass))
    put(get(params, LSE) + 4 * (head * get(params, TOKENS) + token), lse)


@kernel
def _gather_entries(params: Address, token: int, head: int) -> None:
    """One query's log-sum-exps by table entry; -inf where no pair of its looks."""
    width = get(params, WIDTH)
    row = token * get(params, HEADS) + head
    out = get(params, ENTRIES) + 4 * width * row
    for entry in range(width):
        put(out + 4 * entry, np.float32(-np.inf))
    low, high = get(get(params, BEGIN), token), get(get(params, BEGIN), token + 1)
    for j in range(low, high):
        pair = get(get(params, ORDER), j)
        call, at = _part(params, pair)
        source = get(call, PART_ENTRIES)
        source += 4 * get(call, PART_WIDTH) * (at * get(params, HEADS) + head)
        first = get(get(params, FIRST), pair)
        copy(source, out + 4 * first, get(get(params, COUNT), pair))


@kernel
def _merge(params: Address) -> None:
    """Queries off the shared counter, all heads."""
    token = atomic_add(params + 8 * NEXT, 1)
    while token < get(params, TOKENS):
        for head in range(get(params, HEADS)):
            _merge_head(params, token, head)
            if get(params, ENTRIES) != 0:
                _gather_entries(params, token, head)
        token = atomic_add(params + 8 * NEXT, 1)


@cache
def _worker(name: str) -> Any:
    """One of the two, compiled; the object must outlive its address."""
    digest = sources()

    def turning(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _turn(params)

    def merging(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _merge(params)

    function = turning if name == "turn" else merging
    return compile_native(types.void(types.int64), function, name)


def get_ready() -> None:
    """Compile both, or load them from disk.

    Raises:
        UnsupportedBackend: They cannot be compiled here.

    Cost: seconds, once per machine.
    """
    for name in ("turn", "merge"):
        _worker(name)


def _share(name: str, params: Any, numbers: int) -> None:
    """Run one of the two; on several threads where the numbers are worth it."""
    run(_worker(name), addressof(params), torch.get_num_threads() if numbers >= _MANY else 1)


class Turn:
    """How the queries of pairs are turned; made once per step.

    Args:
        token: int64 [N] Whose query each pair asks with.
        row: int64 [N] Its row of the angles; row 0 turns nothing.
        cos: fp32 [U, pairs], contiguous, of elements (i, i + pairs); what lies behind stays.
        sin: The same shape.
    """

    def __init__(self, token: Int64, row: Int64, cos: Tensor, sin: Tensor) -> None:
        self._owned = token, row, cos, sin
        self._count = len(token)
        owned = token.ctypes.data, row.ctypes.data, cos.data_ptr(), sin.data_ptr()
        self._params = (c_int64 * _TURN_FIELDS)(0, *owned, cos.shape[1], len(token))

    def __call__(self, query: Tensor) -> Tensor:
        """Return the queries of the pairs, each turned by its own angles: fp32 [N, H, dim].

        Args:
            query: fp32 [T, H, dim]; any strides but the last, which is 1.
        """
        _, heads, dim = query.shape
        step, head_step, _ = query.stride()
        out = room(self._count, heads, dim)
        self._params[NEXT] = 0
        self._params[QUERY:] = [
            query.data_ptr(),
            out.data_ptr(),
            heads,
            dim,
            4 * step,
            4 * head_step,
        ]
        _share("turn", self._params, out.numel())
        return out


class Merge:
    """How the pairs of one or two calls make a whole; made once per step.

    Args:
        token: int64 [N] The query of each pair, of the first call's and then of the second's.
        first: int64 [N] The first table entry that a pair looks at.
        count: int64 [N] How many it looks at.
        split: Pairs of the first call.
        tokens: T; each has a pair at least.
        width: W, entries of a table.
    """

    def __init__(
        self, token: Int64, first: Int64, count: Int64, split: int, tokens: int, width: int
    ) -> None:
        order = np.argsort(token, kind="stable").astype(np.int64)
        begin = np.append(0, np.cumsum(np.bincount(token, minlength=tokens))).astype(np.int64)
        self._tokens, self._width = tokens, width
        self._pairs = (split, len(token) - split)
        self._owned = (begin, order, np.ascontiguousarray(first), np.ascontiguousarray(count))
        at = [array.ctypes.data for array in self._owned]
        self._params = (c_int64 * (CALLS + 2 * CALL_FIELDS))(0, *at[:2], split, *at[2:])

    def __call__(
        self, answers: list[tuple[Tensor, Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Merge what calls gave.

        Args:
            answers: Of each: out fp32 [n, H, dim], lse fp32 [H, n], and None or the lse
                of single entries, fp32 [n, H, widest].

        Returns:
            The same of the whole: [T, H, dim], [H, T], None or [T, H, W].
        """
        _, heads, dim = answers[0][0].shape
        tokens, width = self._tokens, self._width
        out = room(tokens, heads, dim)
        lse = room(heads, tokens)
        wanted = answers[0][2] is not None
        entries = room(tokens, heads, width) if wanted else None
        fields: list[c_int64 | int] = [tokens, heads, dim, width, out.data_ptr(), lse.data_ptr()]
        fields.append(0 if entries is None else entries.data_ptr())
        whole = [[None if x is None else x.contiguous() for x in answer] for answer in answers]
        for (*both, seen), pairs in zip(whole, self._pairs, strict=False):
            fields += (x.data_ptr() for x in both if x is not None)
            fields += (0, 0) if seen is None else (seen.data_ptr(), seen.shape[2])
            fields.append(pairs)
        self._params[NEXT] = 0
        self._params[TOKENS : TOKENS + len(fields)] = fields
        _share("merge", self._params, sum(self._pairs) * heads * dim)
        return out, lse, entries
