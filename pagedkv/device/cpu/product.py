"""The inner loops of matrix products, whose sums stay in registers.

One call makes HEIGHT rows of THREE vectors, or of fewer where no more are left. With AVX-512 that
is 8 x 3 sums, three vectors of b and one number of a in all lanes: 28 of 32 registers, 24
multiply-adds for 11 loads. With 16 registers, 4 x 3. Numba keeps no array in registers, so the
loop is written out here.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import LANES, VEC, ask, broadcast, call, const, intrinsic_name, pointer_to

__all__ = ["HEIGHT", "SIX", "THREE", "dots", "dots_of_one", "product", "product_onto"]

HEIGHT = 8 if LANES == 16 else 4
THREE = 3  # vectors, or features
SIX = 6  # features, for a row alone
_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_lowered: Callable[[Callable[..., Any]], Any] = intrinsic


def _at(builder: Any, address: Any, steps: list[tuple[Any, Any]], kind: Any) -> Any:
    """Pointer to address + the sum of count * bytes."""
    for count, size in steps:
        address = builder.add(address, builder.mul(count, size))
    return pointer_to(builder, address, kind)


def _emit(builder: Any, args: list[Any], vectors: int, alphas: Any = None) -> None:
    a, across, along, b, step, count, to, stride = args
    vector = _I64(4 * LANES)
    places = [(k, v) for k in range(HEIGHT) for v in range(vectors)]
    targets = {
        (k, v): _at(builder, to, [(_I64(k), stride), (_I64(v), vector)], VEC) for k, v in places
    }
    sums = {place: cgutils.alloca_once(builder, VEC) for place in places}
    for k, v in places:
        value = const(0.0)
        if alphas is not None:
            alpha = builder.load(_at(builder, alphas, [(_I64(v), vector)], VEC), align=4)
            value = builder.fmul(builder.load(targets[k, v], align=4), alpha)
        builder.store(value, sums[k, v])
    with cgutils.for_range(builder, count) as loop:
        columns = [
            builder.load(_at(builder, b, [(loop.index, step), (_I64(v), vector)], VEC), align=4)
            for v in range(vectors)
        ]
        for k in range(HEIGHT):
            number = builder.load(_at(builder, a, [(_I64(k), across), (loop.index, along)], _F32))
            row = broadcast(builder, number, VEC)
            for v in range(vectors):
                terms = [row, columns[v], builder.load(sums[k, v])]
                builder.store(call(builder, intrinsic_name("fma"), VEC, terms), sums[k, v])
    for place in places:
        builder.store(builder.load(sums[place]), targets[place], align=4)


def _emit_each(builder: Any, args: list[Any], vectors: Any, alphas: Any = None) -> None:
    """Code for each number of vectors; where it is a constant, the compiler leaves one."""
    for many in range(1, THREE + 1):
        with builder.if_then(builder.icmp_signed("==", vectors, _I64(many))):
            _emit(builder, args, many, alphas)


@_lowered
def product(
    _typing: Any,
    a: Any,
    across: Any,
    along: Any,
    b: Any,
    step: Any,
    count: Any,
    to: Any,
    stride: Any,
    vectors: Any,
) -> Any:
    """to[k, :] = sum_i a[k, i] * b[i, :] for HEIGHT k and `count` i; all fp32, addresses, bytes.

    Args:
        a: a[k, i] lies at a + k * across + i * along.
        b: b[i, :] lies at b + i * step.
        to: to[k, :] lies at to + k * stride.
        vectors: How long b[i, :] and to[k, :] are: 1 to THREE.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _emit_each(builder, list(args[:8]), args[8])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 9), codegen


@_lowered
def product_onto(
    _typing: Any,
    a: Any,
    across: Any,
    along: Any,
    b: Any,
    step: Any,
    count: Any,
    to: Any,
    stride: Any,
    vectors: Any,
    alphas: Any,
) -> Any:
    """The product added to to[k, :] * alphas[:]."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _emit_each(builder, list(args[:8]), args[8], args[9])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 10), codegen


def _totals(builder: Any, vectors: list[Any]) -> list[Any]:
    """Return the sum across the lanes of each vector.

    Two vectors fold into one that holds halves of both, these into one of quarters, and so on: they
    share shuffles. Numbers are added in the order in which a vector alone would be halved.
    """
    together = min(1 << (len(vectors).bit_length() - 1), LANES // 2)
    if together < len(vectors):
        return _totals(builder, vectors[:together]) + _totals(builder, vectors[together:])
    part = LANES
    while len(vectors) > 1:
        part //= 2
        low = [at + i for at in range(0, 2 * LANES, 2 * part) for i in range(part)]
        vectors = [
            _add_lanes(builder, a, b, low, part)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    whole, each = vectors[0], part
    while part > 1:
        part //= 2
        low = [i - part if i % (2 * part) >= part else i for i in range(LANES)]
        whole = _add_lanes(builder, whole, whole, low, part)
    return [builder.extract_element(whole, _I32(i * each)) for i in range(together)]


def _add_lanes(builder: Any, a: Any, b: Any, low: list[int], part: int) -> Any:
    """Lanes of two vectors, a's counted first, added to those `part` lanes behind them."""
    kind = ir.VectorType(_I32, len(low))
    masks = [ir.Constant(kind, [_I32(i + behind) for i in low]) for behind in (0, part)]
    return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))


def _emit_dots(
    builder: Any, args: list[Any], rows: int, features: int, *, asks: bool = False
) -> None:
    a, across, b, apart, count, to, stride = args
    vector = _I64(4 * LANES)
    places = [(k, j) for k in range(rows) for j in range(features)]
    sums = {place: cgutils.alloca_once(builder, VEC) for place in places}
    for place in places:
        builder.store(const(0.0), sums[place])
    with cgutils.for_range(builder, count) as loop:
        columns = [
            builder.load(_at(builder, b, [(_I64(j), apart), (loop.index, vector)], VEC), align=4)
            for j in range(features)
        ]
        for j in range(features if asks else 0):
            ask(builder, _at(builder, b, [(_I64(j + features), apart), (loop.index, vector)], _I8))
        for k in range(rows):
            at = _at(builder, a, [(_I64(k), across), (loop.index, vector)], VEC)
            row = builder.load(at, align=4)
            for j in range(features):
                terms = [row, columns[j], builder.load(sums[k, j])]
                builder.store(call(builder, intrinsic_name("fma"), VEC, terms), sums[k, j])
    totals = _totals(builder, [builder.load(sums[place]) for place in places])
    for (k, j), total in zip(places, totals, strict=True):
        at = _at(builder, to, [(_I64(k), stride), (_I64(j), _I64(4))], _F32)
        builder.store(total, at)


@_lowered
def dots(
    _typing: Any,
    a: Any,
    across: Any,
    b: Any,
    apart: Any,
    count: Any,
    to: Any,
    stride: Any,
    asks: Any,
) -> Any:
    """to[k, j] = sum_i a[k, i] * b[j, i] for HEIGHT k, THREE j and `count` vectors of i; fp32.

    Args:
        a: a[k, :] lies at a + k * across, addresses and bytes.
        b: b[j, :] lies at b + j * apart.
        to: to[k, :] lies at to + k * stride.
        asks: Not 0: the next three b[j, :] are asked for, line by line between the sums.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        with builder.if_else(builder.icmp_signed("!=", args[7], _I64(0))) as (then, otherwise):
            with then:
                _emit_dots(builder, list(args[:7]), HEIGHT, THREE, asks=True)
            with otherwise:
                _emit_dots(builder, list(args[:7]), HEIGHT, THREE)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 8), codegen


@_lowered
def dots_of_one(_typing: Any, a: Any, b: Any, apart: Any, count: Any, to: Any) -> Any:
    """The same for one k and SIX j, to the same bits; the next six are asked for."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        a, b, apart, count, to = args
        args = [a, _I64(0), b, apart, count, to, _I64(0)]
        _emit_dots(builder, args, 1, SIX, asks=True)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), codegen
