"""One operation done for several query rows: vectors in tuples, which LLVM keeps in registers.

How many rows there are is how many addresses a tuple has: a kernel compiles to one form for each.
Sums across lanes are taken for four vectors, or four lanes of one, at a time.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import (
    LANES,
    VEC,
    VEC_I32,
    VECTOR,
    ask,
    broadcast,
    call,
    const,
    halves,
    intrinsic_name,
    pointer_to,
)

__all__ = ["asks", "fmas", "loads", "put_fours", "put_totals", "splats", "stores", "zeros"]

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_lowered: Callable[[Callable[..., Any]], Any] = intrinsic


def _each(builder: Any, values: Any) -> list[Any]:
    return [builder.extract_value(values, i) for i in range(values.type.count)]


def _places(builder: Any, addresses: Any, at: Any, kind: Any) -> list[Any]:
    """Pointers `at` bytes behind each address."""
    return [pointer_to(builder, builder.add(a, at), kind) for a in _each(builder, addresses)]


def _vectors(like: Any) -> Any:
    """The type of as many vectors as `like` has members."""
    return types.UniTuple(VECTOR, len(like))


@_lowered
def asks(_typing: Any, addresses: Any, at: Any) -> Any:
    """Prefetch the line `at` bytes behind each address."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for place in _places(builder, args[0], args[1], ir.IntType(8)):
            ask(builder, place)
        return context.get_dummy_value()

    return types.void(addresses, types.int64), codegen


@_lowered
def zeros(_typing: Any, like: Any) -> Any:
    """A vector of zeros for each address."""

    def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        return cgutils.pack_array(builder, [const(0.0)] * len(like))

    return _vectors(like)(like), codegen


@_lowered
def loads(_typing: Any, addresses: Any, at: Any) -> Any:
    """The LANES fp32 numbers `at` bytes behind each address."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        places = _places(builder, args[0], args[1], VEC)
        return cgutils.pack_array(builder, [builder.load(place, align=4) for place in places])

    return _vectors(addresses)(addresses, types.int64), codegen


@_lowered
def stores(_typing: Any, addresses: Any, at: Any, values: Any) -> Any:
    """Write a vector `at` bytes behind each address."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        places = _places(builder, args[0], args[1], VEC)
        for place, value in zip(places, _each(builder, args[2]), strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    return types.void(addresses, types.int64, _vectors(addresses)), codegen


@_lowered
def splats(_typing: Any, addresses: Any, at: Any, factor: Any) -> Any:
    """The fp32 number `at` bytes behind each address, times the factor, in every lane."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        numbers = [builder.load(place) for place in _places(builder, args[0], args[1], _F32)]
        scaled = [builder.fmul(number, args[2]) for number in numbers]
        return cgutils.pack_array(builder, [broadcast(builder, x, VEC) for x in scaled])

    return _vectors(addresses)(addresses, types.int64, types.float32), codegen


@_lowered
def fmas(_typing: Any, x: Any, ys: Any, sums: Any) -> Any:
    """x * y + sum, for each y and its sum."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        name, x = intrinsic_name("fma"), args[0]
        pairs = zip(*(_each(builder, each) for each in args[1:]), strict=True)
        return cgutils.pack_array(builder, [call(builder, name, VEC, [x, *pair]) for pair in pairs])

    return _vectors(ys)(VECTOR, ys, sums), codegen


@_lowered
def put_totals(
    _typing: Any, address: Any, step: Any, a: Any, b: Any, c: Any, d: Any, factors: Any
) -> Any:
    """Write the lane sums of each row's a, b, c, d times the four factors, `step` bytes apart."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        address, step = args[:2]
        scale = ir.Constant(ir.VectorType(_F32, 4), ir.Undefined)
        for i, factor in enumerate(_each(builder, args[6])):
            scale = builder.insert_element(scale, factor, _I32(i))
        for four in zip(*(_each(builder, key) for key in args[2:6]), strict=True):
            sums = _folded4(builder, _transpose_add(builder, four))
            builder.store(builder.fmul(sums, scale), pointer_to(builder, address, sums.type), 4)
            address = builder.add(address, step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, a, b, c, d, factors), codegen


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


def _transpose_add(builder: Any, rows: tuple[Any, ...]) -> Any:
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
