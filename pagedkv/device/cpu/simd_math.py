"""Powers and logarithms to base 2, lane by lane, and sums across the lanes of four vectors.

Polynomials stand in place of calls to a library.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from .simd import (
    LANES,
    VEC,
    VEC_I32,
    VECTOR,
    call,
    const,
    const_int,
    halves,
    intrinsic_name,
    operation,
    pointer_to,
)

__all__ = ["exp2", "log2", "put_fours", "put_totals4"]

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_lowered: Callable[[Callable[..., Any]], Any] = intrinsic

# A minimax fit of 2**f on [-0.5, 0.5], lowest degree first; relative error below 2e-9.
_EXP2 = (1.0, 0.69314718, 0.24022646, 0.055503286, 0.009618489, 0.0013399932, 0.00015345799)


def _emit_exp2(builder: Any, x: Any) -> Any:
    # Below -126 the result would be subnormal: it becomes an exact 0. NaN fails the test and stays.
    tiny = builder.fcmp_ordered("<", x, const(-126.0))
    x = builder.select(tiny, const(-126.0), x)
    whole = call(builder, intrinsic_name("rint"), VEC, [x])
    fraction = builder.fsub(x, whole)
    value = const(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        value = call(builder, intrinsic_name("fma"), VEC, [value, fraction, const(coefficient)])
    exponent = builder.shl(builder.fptosi(whole, VEC_I32), const_int([23] * LANES))
    scaled = builder.bitcast(builder.add(builder.bitcast(value, VEC_I32), exponent), VEC)
    return builder.select(tiny, const(0.0), scaled)


def _emit_log2(builder: Any, x: Any) -> Any:
    # x = m * 2**e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m - 1) / (m + 1)).
    bits = builder.bitcast(x, VEC_I32)
    moved = builder.sub(bits, const_int([0x3F3504F3] * LANES))
    exponent = builder.ashr(moved, const_int([23] * LANES))
    m = builder.sub(bits, builder.shl(exponent, const_int([23] * LANES)))
    m = builder.bitcast(m, VEC)
    t = builder.fdiv(builder.fsub(m, const(1.0)), builder.fadd(m, const(1.0)))
    square = builder.fmul(t, t)
    series = const(2.885390082 / 9)
    for odd in (7, 5, 3, 1):
        series = call(
            builder, intrinsic_name("fma"), VEC, [series, square, const(2.885390082 / odd)]
        )
    whole = builder.sitofp(exponent, VEC)
    value = call(builder, intrinsic_name("fma"), VEC, [series, t, whole])
    positive = builder.fcmp_unordered(">", x, const(0.0))
    return builder.select(positive, value, const(float("-inf")))


exp2 = operation(1, _emit_exp2)
log2 = operation(1, _emit_log2)


@_lowered
def put_totals4(
    _typing: Any,
    address: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any,
    p: Any,
    q: Any,
    r: Any,
    s: Any,
) -> Any:
    """Write the lane sums of a, b, c, d, times p, q, r, s: four fp32 numbers in a row."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums = _folded4(builder, _transpose_add(builder, args[1:5]))
        factors = ir.Constant(sums.type, ir.Undefined)
        for i, factor in enumerate(args[5:]):
            factors = builder.insert_element(factors, factor, _I32(i))
        pointer = pointer_to(builder, args[0], sums.type)
        builder.store(builder.fmul(sums, factors), pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, *(VECTOR,) * 4, *(types.float32,) * 4), codegen


@_lowered
def put_fours(_typing: Any, address: Any, step: Any, a: Any) -> Any:
    """Write the sums of every fourth lane of a, from the first four on, `step` bytes apart."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums, address = _folded4(builder, args[2]), args[0]
        for i in range(4):
            one = builder.extract_element(sums, _I32(i))
            builder.store(one, pointer_to(builder, address, _F32))
            address = builder.add(address, args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, VECTOR), codegen


def _folded4(builder: Any, value: Any) -> Any:
    """The sums of every fourth lane."""
    while value.type.count > 4:
        value = builder.fadd(*halves(builder, value))
    return value


def _transpose_add(builder: Any, rows: list[Any]) -> Any:
    """Four vectors -> one, each four lanes of which sum four lanes of a, b, c, d in turn.

    Shuffles within 128 bits are the cheap ones, and folding comes once for all four. These are no
    horizontal additions, each of which takes a processor as long as four of its instructions.
    """

    def pair(x: Any, y: Any, *orders: tuple[int, ...]) -> Any:
        """The sum of two shuffles of x and y; an order is of four lanes, y's counted from 4."""
        lanes = [
            [i + o % 4 + o // 4 * LANES for i in range(0, LANES, 4) for o in order]
            for order in orders
        ]
        masks = (ir.Constant(VEC_I32, [_I32(lane) for lane in each]) for each in lanes)
        return builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))

    a, b, c, d = rows
    one, other = (pair(x, y, (0, 4, 1, 5), (2, 6, 3, 7)) for x, y in ((a, b), (c, d)))
    return pair(one, other, (0, 1, 4, 5), (2, 3, 6, 7))
