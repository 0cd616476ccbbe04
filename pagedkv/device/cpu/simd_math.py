"""Powers and logarithms to base 2, lane by lane.

Polynomials stand in place of calls to a library.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from .simd import (
    LANES,
    VEC,
    VEC_I32,
    call,
    const,
    const_int,
    intrinsic_name,
    operation,
)

__all__ = ["exp2", "log2"]

_F32, _I32 = ir.FloatType(), ir.IntType(32)

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
