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

from .simd import LANES, VEC, broadcast, call, const, halves, intrinsic_name, pointer_to

__all__ = ["HEIGHT", "THREE", "dots", "product", "product_onto"]

HEIGHT = 8 if LANES == 16 else 4
THREE = 3  # vectors
_VECTORS = range(THREE)
_F32, _I64 = ir.FloatType(), ir.IntType(64)
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
) -> Any:
    """to[k, j] = sum_i a[k, i] * b[j, i] for HEIGHT k, three j and `count` vectors of i; fp32.

    Args:
        a: a[k, :] lies at a + k * across, addresses and bytes.
        b: b[j, :] lies at b + j * apart.
        to: to[k, :] lies at to + k * stride.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        a, across, b, apart, count, to, stride = args
        vector = _I64(4 * LANES)
        places = [(k, j) for k in range(HEIGHT) for j in _VECTORS]
        sums = {place: cgutils.alloca_once(builder, VEC) for place in places}
        for place in places:
            builder.store(const(0.0), sums[place])
        with cgutils.for_range(builder, count) as loop:
            columns = [
                builder.load(
                    _at(builder, b, [(_I64(j), apart), (loop.index, vector)], VEC), align=4
                )
                for j in _VECTORS
            ]
            for k in range(HEIGHT):
                at = _at(builder, a, [(_I64(k), across), (loop.index, vector)], VEC)
                row = builder.load(at, align=4)
                for j in _VECTORS:
                    terms = [row, columns[j], builder.load(sums[k, j])]
                    builder.store(call(builder, intrinsic_name("fma"), VEC, terms), sums[k, j])
        for k, j in places:
            total = builder.load(sums[k, j])
            while total.type.count > 1:
                total = builder.fadd(*halves(builder, total))
            total = builder.extract_element(total, ir.IntType(32)(0))
            at = _at(builder, to, [(_I64(k), stride), (_I64(j), _I64(4))], _F32)
            builder.store(total, at)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7), codegen
