"""A vector of fp32 lanes for numba kernels, and the few operations that attention needs.

numba has no vector type, and its auto-vectoriser neither keeps accumulators in registers over a
loop of unknown length nor knows fp16 or bf16. These intrinsics write LLVM vector instructions;
LLVM splits a vector wider than the machine's registers, so they run on any processor.

An address is a plain integer (bytes). `sample` is a dummy scalar whose *type* says what lies in
memory: float32 as is, uint16 for fp16 bits, int16 for bf16 bits, int8 for rows of bytes behind
their fp32 scale (see `quantize.py`). All arithmetic is fp32.
Importing this module registers one type with numba and compiles nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_FEATURES = dict(llvm.get_host_cpu_features())
_TRIPLE = llvm.get_process_triple()
# 16 lanes fill one AVX-512 register; elsewhere 8 leave registers for the accumulators.
LANES = 16 if _FEATURES.get("avx512f") else 8
# Without the instruction LLVM calls a library routine that a JIT process may not have.
HAS_HALF = bool(_FEATURES.get("f16c")) or _TRIPLE.startswith(("aarch64", "arm64"))

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VEC = ir.VectorType(_F32, LANES)
VEC_I32 = ir.VectorType(_I32, LANES)
# Pointers lost their element type, and intrinsics' names the suffix for it, in LLVM 17.
_TYPED_POINTERS = llvm.llvm_version_info[0] < 17

F = TypeVar("F", bound=Callable[..., Any])
# Compiled code has no Python callers but the worker: leave out the wrappers and the checks.
kernel: Callable[[F], F] = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
# For loops so short that a call, with its many addresses, would be no small part of them.
inlined: Callable[[F], F] = njit(
    no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", forceinline=True
)
_lowered: Callable[[Callable[..., Any]], Any] = intrinsic

# What mypy may know of a compiled function's arguments.
Address = int  # bytes
Sample = Any  # a dummy scalar, see above
Number = Any  # fp32
Vector = Any  # LANES fp32 numbers


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


VECTOR = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VEC)


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [a.type for a in args])
    known = builder.module.globals.get(name)
    return builder.call(known or ir.Function(builder.module, kind, name), args)


def intrinsic_name(name: str) -> str:
    """What LLVM calls an operation on vectors."""
    return f"llvm.{name}.v{LANES}f32"


def _suffix(kind: Any) -> str:
    """How an intrinsic's name ends for a pointer to a vector of `kind`."""
    if not _TYPED_POINTERS:
        return "p0"
    return f"p0{_named(kind)}"


def _named(kind: Any) -> str:
    """How a vector type is called in intrinsics' names."""
    return f"v{LANES}{'f32' if kind.element is _F32 else f'i{kind.element.width}'}"


def const(value: float) -> Any:
    """The same fp32 number in every lane."""
    return ir.Constant(VEC, [ir.Constant(_F32, value)] * LANES)


def const_int(values: list[int]) -> Any:
    """One int32 for each lane."""
    return ir.Constant(VEC_I32, [_I32(v) for v in values])


def broadcast(builder: Any, scalar: Any, kind: Any) -> Any:
    """The same number in every lane of a vector of `kind`."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, kind.count), [_I32(0)] * kind.count)
    return builder.shuffle_vector(one, one, zeros)


def _first(builder: Any, count: Any) -> Any:
    """The mask of the first `count` (i64) lanes."""
    limit = broadcast(builder, builder.trunc(count, _I32), VEC_I32)
    return builder.icmp_signed("<", const_int(list(range(LANES))), limit)


def pointer_to(builder: Any, address: Any, element: Any) -> Any:
    """An address as LLVM wants it."""
    return builder.inttoptr(address, element.as_pointer())


def _element(sample: Any) -> Any:
    return _F32 if sample == types.float32 else ir.IntType(sample.bitwidth)


def _widen(builder: Any, sample: Any, raw: Any, lanes: int) -> Any:
    """Stored bits -> fp32; `lanes` 0 means a scalar."""

    def shape(kind: Any) -> Any:
        return ir.VectorType(kind, lanes) if lanes else kind

    if sample == types.float32:
        return raw
    if sample == types.int8:
        return builder.sitofp(raw, shape(_F32))
    if sample == types.uint16:
        return builder.fpext(builder.bitcast(raw, shape(ir.HalfType())), shape(_F32))
    high = builder.zext(raw, shape(_I32))
    sixteen = ir.Constant(shape(_I32), [_I32(16)] * lanes if lanes else 16)
    return builder.bitcast(builder.shl(high, sixteen), shape(_F32))


def operation(count: int, emit: Callable[..., Any], result: Any = VECTOR) -> Any:
    """An intrinsic that takes `count` vectors."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    vectors = (VECTOR,) * count
    if count == 1:
        return _lowered(lambda _typing, a: (result(*vectors), codegen))
    if count == 2:
        return _lowered(lambda _typing, a, b: (result(*vectors), codegen))
    return _lowered(lambda _typing, a, b, c: (result(*vectors), codegen))


@_lowered
def load(_typing: Any, sample: Any, address: Any) -> Any:
    """LANES stored values at `address`, as fp32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        element = _element(sample)
        pointer = pointer_to(builder, args[1], ir.VectorType(element, LANES))
        raw = builder.load(pointer, align=sample.bitwidth // 8)
        return _widen(builder, sample, raw, LANES)

    return VECTOR(sample, types.int64), codegen


@_lowered
def load_n(_typing: Any, sample: Any, address: Any, count: Any) -> Any:
    """The first `count` of LANES stored values, the rest 0 and not read."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        element = _element(sample)
        kind = ir.VectorType(element, LANES)
        align = _I32(min(2, sample.bitwidth // 8))
        args_ = [pointer_to(builder, args[1], kind), align, _first(builder, args[2])]
        name = f"llvm.masked.load.{_named(kind)}."
        raw = call(builder, name + _suffix(kind), kind, [*args_, ir.Constant(kind, None)])
        return _widen(builder, sample, raw, LANES)

    return VECTOR(sample, types.int64, types.int64), codegen


@_lowered
def scalar(_typing: Any, sample: Any, address: Any) -> Any:
    """One stored value at `address`, as fp32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        raw = builder.load(pointer_to(builder, args[1], _element(sample)))
        return _widen(builder, sample, raw, 0)

    return types.float32(sample, types.int64), codegen


@_lowered
def width(_typing: Any, sample: Any) -> Any:
    """Bytes that one stored value takes."""
    size = sample.bitwidth // 8
    return types.int64(sample), lambda _context, _builder, _signature, _args: _I64(size)


@_lowered
def lead(_typing: Any, sample: Any) -> Any:
    """Bytes of a stored row before its values: those of the scale, if it has one."""
    size = 4 if sample == types.int8 else 0
    return types.int64(sample), lambda _context, _builder, _signature, _args: _I64(size)


@_lowered
def row_scale(_typing: Any, sample: Any, address: Any) -> Any:
    """What the values of the stored row at `address` are to be multiplied by."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if sample != types.int8:
            return ir.Constant(_F32, 1.0)  # and the product is left out by the compiler
        return builder.load(pointer_to(builder, args[1], _F32))

    return types.float32(sample, types.int64), codegen


@_lowered
def get(_typing: Any, record: Any, field: Any) -> Any:
    """The `field`-th int64 of a record. An intrinsic: a function would be compiled per field."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.int64)
        return builder.load(builder.gep(pointer_to(builder, args[0], _I64), [index]))

    return types.int64(types.int64, field), codegen


@_lowered
def word32(_typing: Any, address: Any) -> Any:
    """One int32 at `address`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.sext(builder.load(pointer_to(builder, args[0], _I32)), _I64)

    return types.int64(types.int64), codegen


@_lowered
def put(_typing: Any, address: Any, value: Any) -> Any:
    """Write one float32 or int64, by the type of `value`."""
    kind = _F32 if value == types.float32 else _I64

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer_to(builder, args[0], kind))
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@_lowered
def store(_typing: Any, address: Any, value: Any) -> Any:
    """Write LANES fp32 values at `address`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer_to(builder, args[0], VEC), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), codegen


def ask(builder: Any, pointer: Any) -> None:
    """What `prefetch` does."""
    name = "llvm.prefetch.p0" + "i8" * _TYPED_POINTERS
    call(builder, name, ir.VoidType(), [pointer, _I32(0), _I32(2), _I32(1)])


@_lowered
def prefetch(_typing: Any, address: Any) -> Any:
    """Ask for a line into the second-level cache; an address that is not mapped does no harm."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        ask(builder, pointer_to(builder, args[0], ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@_lowered
def atomic_add(_typing: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 that other threads add to; returns what it was (acquire-release)."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer_to(builder, args[0], _I64), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@_lowered
def call_parallel(_typing: Any, parallel: Any, worker: Any, argument: Any, threads: Any) -> Any:
    """Have `threads` threads call worker(argument), through OpenMP's entry at `parallel`."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, byte, _I32, _I32])

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        entry = builder.inttoptr(args[0], kind.as_pointer())
        pointers = [builder.inttoptr(each, byte) for each in args[1:3]]
        builder.call(entry, [*pointers, builder.trunc(args[3], _I32), _I32(0)])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


def stack(size: int) -> Any:
    """An intrinsic that gives the address of `size` bytes, the calling function's until it ends."""

    def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        place = cgutils.alloca_once(builder, ir.ArrayType(VEC, -(-size // (4 * LANES))))
        return builder.ptrtoint(place, _I64)

    return _lowered(lambda _typing: (types.int64(), codegen))


@_lowered
def splat(_typing: Any, value: Any) -> Any:
    """The same number in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.cast(builder, args[0], signature.args[0], types.float32)
        return broadcast(builder, number, VEC)

    return VECTOR(value), codegen


add = operation(2, lambda b, x, y: b.fadd(x, y))
sub = operation(2, lambda b, x, y: b.fsub(x, y))
mul = operation(2, lambda b, x, y: b.fmul(x, y))
div = operation(2, lambda b, x, y: b.fdiv(x, y))
fma = operation(3, lambda b, x, y, z: call(b, intrinsic_name("fma"), VEC, [x, y, z]))
maximum = operation(2, lambda b, x, y: _larger(b, x, y))


@_lowered
def select_less(_typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Lane by lane: `yes` where a < b, else `no`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return VECTOR(VECTOR, VECTOR, VECTOR, VECTOR), codegen


@_lowered
def total(_typing: Any, a: Any) -> Any:
    """The sum over lanes."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda x, y: builder.fadd(x, y))

    return types.float32(VECTOR), codegen


@_lowered
def lane0(_typing: Any, a: Any) -> Any:
    """The first lane."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], _I32(0))

    return types.float32(VECTOR), codegen


@_lowered
def highest(_typing: Any, a: Any) -> Any:
    """The largest lane; NaN if a lane is NaN."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda x, y: _larger(builder, x, y))

    return types.float32(VECTOR), codegen


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_unordered(">", x, y), x, y)


def halves(builder: Any, value: Any) -> tuple[Any, Any]:
    """A vector's lower and upper lanes."""
    n = value.type.count // 2
    masks = [ir.Constant(ir.VectorType(_I32, n), [_I32(i + s) for i in range(n)]) for s in (0, n)]
    low, high = (builder.shuffle_vector(value, value, m) for m in masks)
    return low, high


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    while value.type.count > 1:
        value = combine(*halves(builder, value))
    return builder.extract_element(value, _I32(0))
