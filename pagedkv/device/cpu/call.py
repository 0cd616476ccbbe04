"""One call of the CPU kernel: torch tensors in, a record of addresses out, run."""

import math
from ctypes import addressof, c_int64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import layout as at
from .kernel import launch, warmup
from .work import Shape, Work, cut

__all__ = ["get_ready", "run"]

_KINDS = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int8",  # packed
}
_LOG2_E = 1.0 / math.log(2.0)

_Params = c_int64 * at.NUM_PARAMS
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def get_ready(dtype: torch.dtype) -> None:
    """Compile the kernel for keys and values stored as `dtype`, or load it from disk.

    Raises:
        UnsupportedBackend: It cannot be compiled here.
    """
    if dtype in _KINDS:  # others are refused by the operator, by name
        warmup((_KINDS[dtype],))


def run(
    batch: Any,
    prepared: dict[Any, Any],
    known: dict[Any, Any],
    inputs: Tensors,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    scale: float,
) -> None:
    """Fill the outputs.

    Args:
        batch: The bias as `operators._Batch`.
        prepared: Where what the step's further layers share is remembered: the cut.
        known: The same, of those whose inputs are laid out like these: the parameters.
        inputs: query [1, T, G, H, D], key and value [1, slots, G, H, D] (H of stride 0 if shared),
            or rows of int32 words as `quantize` packs them.
        outputs: out fp32[1, T, G, H, D], lse fp32[G * H, T], block lse fp32[T, G * H, W] or None.
        scale: Of the scores.
    """
    out, lse, block_lse = outputs
    threads = torch.get_num_threads()
    if (threads, scale) not in known:
        known[threads, scale] = _describe(batch, prepared, inputs, scale, threads)
    call: _Call = known[threads, scale]
    # Not numpy: a step makes one for each layer, and the address of an array takes it long.
    params = _Params.from_buffer_copy(call.params)
    entries = 0 if block_lse is None else block_lse.data_ptr()
    params[at.QUERY : at.TABLE] = [*(x.data_ptr() for x in (*inputs, out, lse)), entries]
    launch(call.kind, addressof(params), min(threads, params[at.NUM_RUNS]))


@dataclass(frozen=True)
class _Call:
    """What is the same for all layers of a step: parameters without addresses of tensors."""

    kind: str
    params: bytes
    owned: tuple[object, ...]  # what `params` holds addresses in


def _describe(
    batch: Any, prepared: dict[Any, Any], inputs: Tensors, scale: float, threads: int
) -> _Call:
    query, key, value = inputs
    _, tokens, groups, heads, dim = query.shape
    shared = heads == 1 or (key.stride(3) == 0 and value.stride(3) == 0)
    kv_heads, group = (groups, heads) if shared else (groups * heads, 1)
    work = _work(batch, prepared, kv_heads, group, dim)
    runs, memory = work.runs(threads), work.memory(threads)
    start = -(-memory.ctypes.data // 64) * 64
    head_step = heads if shared else 1
    offsets = [_head_offsets(query, 1), *(_head_offsets(x, head_step) for x in (key, value))]

    params = np.zeros(at.NUM_PARAMS, np.int64)
    params[at.ITEMS : at.QUERY] = (
        work.items.ctypes.data,
        len(runs) - 1,
        start,
        work.scratch_bytes,
        start + threads * work.scratch_bytes,
        work.arrived.ctypes.data,
    )
    params[at.TABLE : at.SCALE] = (
        batch.table.ctypes.data,
        batch.slot_base.ctypes.data,
        *(x.ctypes.data for x in offsets),
        *(x.stride(1) * x.element_size() for x in inputs),
        tokens,
        kv_heads,
        group,
        dim,
        batch.block_size,
        batch.table.shape[1],
        batch.window,
        int(batch.causal),
    )
    params.view(np.float32)[2 * at.SCALE] = scale * _LOG2_E
    params[at.RUNS] = runs.ctypes.data
    owned = batch, work, runs, memory, *offsets
    if batch.turns is not None:
        turns, back = batch.turns, -batch.turns.sin
        tables = (x.data_ptr() for x in (turns.cos, turns.sin, back))
        pairs = turns.cos.shape[1]
        params[at.TURN :] = (turns.index.ctypes.data, *tables, pairs, turns.interleaved)
        owned = *owned, back
    return _Call(_KINDS[key.dtype], params.tobytes(), owned)


def _head_offsets(x: torch.Tensor, step: int) -> npt.NDArray[np.int64]:
    """Byte offset of every `step`-th of the G * H heads."""
    _, _, groups, heads, _ = x.shape
    g = np.arange(groups)[:, None] * x.stride(2)
    flat: npt.NDArray[np.int64] = (g + np.arange(heads) * x.stride(3)).ravel()[::step]
    return np.ascontiguousarray(flat * x.element_size(), np.int64)


def _work(batch: Any, prepared: dict[Any, Any], kv_heads: int, group: int, dim: int) -> Work:
    key = (kv_heads, group, dim)
    if key not in prepared:
        width = batch.table.shape[1]
        turned = batch.turns is not None
        shape = Shape(*key, batch.block_size, width, batch.window, batch.causal, turned)
        prepared[key] = cut(batch.query_start, batch.resident, batch.first_limit, shape)
    work: Work = prepared[key]
    return work
