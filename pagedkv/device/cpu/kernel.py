"""Attention over blocks read where they lie: the native CPU kernel's threads, and how to run it.

The work is a list of items (`work.py` makes it): one tile of queries of one sequence against
one span of its keys, for a range of KV heads. Threads take items off a shared counter, so one slow
core costs little. An item is computed the same way whichever thread takes it and whatever else is
in the batch, and the last of a tile's spans to finish merges them in span order: a sequence's
output is bit-identical in any batch and on any number of threads.

Decode runs the narrow form, prefill the wide one. Both keep a running maximum (online softmax) in
base 2: queries are scaled by scale * log2(e). Compiled code takes addresses, allocates nothing and
raises nothing.

Threads are those of the OpenMP runtime that torch has loaded: a second pool (numba's own layers)
would fight torch's, whose idle threads spin. Without such a runtime, plain threads do the work.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]
from numba import types

from pagedkv.errors import UnsupportedBackend

from .block_lse import clear_block_lse
from .layout import (
    ARRIVED,
    BLOCK_LSE,
    FIRST_QUERY,
    GROUP,
    HEAD_DIM,
    HEAD_HIGH,
    HEAD_LOW,
    ITEMS,
    KV_HEADS,
    LN2,
    LSE,
    NEXT,
    NUM_FIELDS,
    NUM_QUERIES,
    NUM_RUNS,
    OUT,
    PARTIAL,
    PARTIAL_AT,
    RUNS,
    SCRATCH,
    SCRATCH_BYTES,
    SPAN,
    SPANS,
    THREAD,
    TILE_ID,
    TOKENS,
    WIDE,
    pad,
)
from .narrow import run_narrow
from .native import compile_native, on_disk
from .simd import (
    HAS_HALF,
    LANES,
    Address,
    Number,
    Sample,
    atomic_add,
    fma,
    get,
    kernel,
    lane0,
    load,
    mul,
    put,
    scalar,
    splat,
    store,
)
from .simd_math import exp2
from .wide import run_wide

__all__ = ["KINDS", "launch", "parallel_address", "run", "warmup"]

# How keys and values are stored; queries likewise, but in fp32 beside int8.
KINDS = ("float32", "float16", "bfloat16", "int8")


# ---- finishing an item --------------------------------------------------------------------


@kernel
def _write_row(
    params: Address, item: Address, row: int, acc: Address, top: Number, mass: Number
) -> None:
    """One finished row: divide by its mass, write the output and the log-sum-exp."""
    dim = get(params, HEAD_DIM)
    group = get(params, GROUP)
    heads = get(params, KV_HEADS) * group
    each = (get(item, HEAD_HIGH) - get(item, HEAD_LOW)) * group
    head = get(item, HEAD_LOW) * group + row % each
    token = get(item, FIRST_QUERY) + row // each
    inverse = np.float32(1) / mass if mass != 0 else np.float32(0)
    out = get(params, OUT) + 4 * dim * (token * heads + head)
    for d in range(dim):
        put(out + 4 * d, scalar(np.float32(0), acc + 4 * d) * inverse)
    lse = top * np.float32(LN2) + np.float32(math.log(mass)) if mass != 0 else np.float32(-np.inf)
    put(get(params, LSE) + 4 * (head * get(params, TOKENS) + token), np.float32(lse))


@kernel
def _merge(params: Address, item: Address, first: Address, size: int, rows: int) -> None:
    """Merge the spans of a tile, in span order, and write its rows. acc of the first is reused."""
    f32 = np.float32(0)
    dims = pad(get(params, HEAD_DIM), LANES)
    spans = get(item, SPANS)
    states = 4 * dims * rows
    for row in range(rows):
        top = scalar(f32, first + states + 8 * row)
        for s in range(1, spans):
            top = max(top, scalar(f32, first + s * size + states + 8 * row))
        mass = np.float32(0)
        acc = first + 4 * dims * row
        for s in range(spans):
            state = first + s * size + states + 8 * row
            w = exp2(splat(scalar(f32, state) - top))
            mass += scalar(f32, state + 4) * lane0(w)
            for i in range(0, dims, LANES):
                part = load(f32, acc + s * size + 4 * i)
                if s == 0:
                    store(acc + 4 * i, mul(part, w))
                else:
                    store(acc + 4 * i, fma(part, w, load(f32, acc + 4 * i)))
        _write_row(params, item, row, acc, top, mass)


@kernel
def _finish(params: Address, item: Address, acc: Address, tops: Address, masses: Address) -> None:
    """Write an item's rows, or keep them until the last span of its tile is there."""
    f32 = np.float32(0)
    dims = pad(get(params, HEAD_DIM), LANES)
    heads = get(item, HEAD_HIGH) - get(item, HEAD_LOW)
    rows = heads * get(item, NUM_QUERIES) * get(params, GROUP)
    if get(item, SPANS) == 1:
        for row in range(rows):
            top, mass = scalar(f32, tops + 4 * row), scalar(f32, masses + 4 * row)
            _write_row(params, item, row, acc + 4 * dims * row, top, mass)
        return
    size = 4 * rows * (dims + 2)
    first = get(params, PARTIAL) + get(item, PARTIAL_AT)
    mine = first + size * get(item, SPAN)
    for i in range(0, dims * rows, LANES):
        store(mine + 4 * i, load(f32, acc + 4 * i))
    for row in range(rows):
        put(mine + 4 * dims * rows + 8 * row, scalar(f32, tops + 4 * row))
        put(mine + 4 * dims * rows + 8 * row + 4, scalar(f32, masses + 4 * row))
    before = atomic_add(get(params, ARRIVED) + 8 * get(item, TILE_ID), 1)
    if before == get(item, SPANS) - 1:
        put(get(params, ARRIVED) + 8 * get(item, TILE_ID), 0)  # ready for the next layer
        _merge(params, item, first, size, rows)


@kernel
def _work(asked: Sample, sample: Sample, params: Address) -> None:
    """What each thread does: take runs of items until none is left."""
    thread = atomic_add(params + 8 * THREAD, 1)
    scratch = get(params, SCRATCH) + thread * get(params, SCRATCH_BYTES)
    i = atomic_add(params + 8 * NEXT, 1)
    while i < get(params, NUM_RUNS):
        begin = get(params, RUNS) + 8 * i
        end = get(begin, 1)
        for j in range(get(begin, 0), end):
            item = get(params, ITEMS) + 8 * NUM_FIELDS * j
            if get(params, BLOCK_LSE) != 0:
                clear_block_lse(params, item)
            if get(item, WIDE) != 0:
                acc, tops, masses = run_wide(asked, sample, params, item, scratch)
            else:
                # What this thread reads next.
                following = item + 8 * NUM_FIELDS if j + 1 < end else 0
                acc, tops, masses = run_narrow(asked, sample, params, item, scratch, following)
            _finish(params, item, acc, tops, masses)
        i = atomic_add(params + 8 * NEXT, 1)


# ---- compiling and running ----------------------------------------------------------------


SIGNATURE = types.void(types.int64)
_PARTS = (
    "simd",
    "simd_math",
    "several",
    "layout",
    "rotation",
    "block_lse",
    "rows",
    "narrow",
    "product",
    "wide",
    "kernel",
)


def _source_digest() -> str:
    """A hash of the kernel's own files: others may change, and it stays compiled."""
    here = Path(__file__).parent
    files = (here / f"{part}.py" for part in _PARTS)
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()


def _function(kind: str) -> Any:
    """The worker for one storage kind, as it is to be compiled."""
    # Dummy scalars whose types tell `simd` how to read what is stored.
    samples = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}
    sample, digest = samples.get(kind, np.int8(0)), _source_digest()
    asked = samples.get(kind, np.float32(0))

    def worker(params):  # type: ignore[no-untyped-def]
        digest  # noqa: B018  part of the cache key
        _work(asked, sample, params)

    return worker


@cache
def _worker(kind: str) -> Any:
    """The compiled worker for one storage kind; the object must outlive its address."""
    if kind == "float16" and not HAS_HALF:
        raise UnsupportedBackend(
            "this processor has no instruction that converts fp16",
            where="device.cpu",
            remedy="use float32 or bfloat16",
        )
    return compile_native(SIGNATURE, _function(kind), f"the kernel for {kind}")


def cached(kind: str) -> bool:
    """Return whether the kernel for a storage kind lies compiled on disk. Cost: loading it."""
    return on_disk(SIGNATURE, _function(kind))


def warmup(kinds: tuple[str, ...] = ("float32",)) -> None:
    """Compile the kernel for these storage kinds, or load it from numba's disk cache.

    Args:
        kinds: Names out of `KINDS`.

    Raises:
        UnsupportedBackend: A kind cannot be compiled here.

    Cost: 10-30 s for each kind the first time, 0.2 s from disk after that, nothing when done.
    """
    for kind in kinds:
        _worker(kind)


_Parallel = Callable[[int, int, int, int], None]


@cache
def parallel_address() -> int:
    """Return where torch's OpenMP is entered, if it brought a runtime that has GNU's; else 0."""
    return binding.address_of_symbol("GOMP_parallel") or 0


@cache
def _openmp() -> _Parallel | None:
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return kind(parallel_address()) if parallel_address() else None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="pagedkv-attention")


def launch(kind: str, address: int, threads: int) -> None:
    """Run the call that a record of parameters describes and wait for it.

    Args:
        kind: How keys and values are stored, one of `KINDS`.
        address: Of int64 [NUM_PARAMS], the fields of `layout`; NEXT and THREAD are changed.
        threads: How many threads may work, the calling one included.

    Raises:
        UnsupportedBackend: The kernel cannot be compiled here. Nothing was written.
    """
    run(_worker(kind), address, threads)


def run(worker: Any, address: int, threads: int) -> None:
    """Have threads, the calling one included, carry out a compiled worker; wait for them.

    Args:
        worker: What `compile_native` gave for a function of one address.
        address: What it is called with; the threads share what lies there.
        threads: How many may work.
    """
    parallel = _openmp()
    if threads <= 1:
        worker.ctypes(address)
    elif parallel is not None:
        parallel(worker.address, address, threads, 0)
    else:
        wait([_pool().submit(worker.ctypes, address) for _ in range(threads)])
