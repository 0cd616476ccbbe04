"""xformers attention operators over paged KV: ours for the CPU, xformers' own elsewhere.

The only file that imports xformers; `splitk.py` wraps its kernel for CUDA. xformers has no operator
for the CPU; `CpuPagedOp` is one, and `ReferenceOp` is its slow plain-torch twin. All are used
through xformers' public calls:

    bias = PagedBias.build(query_start, num_resident, block_table, block_size)
    out = xformers.ops.memory_efficient_attention_forward(q, k, v, attn_bias=bias, op=CpuPagedOp)
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from pagedkv.errors import UnsupportedBackend

from . import reference
from .reference import Batch


@contextmanager
def _quietly() -> Iterator[None]:
    """xformers warns in its log wherever its CUDA extension does not fit torch: not news here."""
    logger = logging.getLogger("xformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        raise UnsupportedBackend(
            f"xformers cannot be imported ({error})",
            where="device.operators",
            remedy="install pagedkv[torch]",
        ) from error
    finally:
        logger.setLevel(before)


with _quietly():
    import xformers.ops as _ops
    from xformers.ops.fmha import attn_bias as _biases
    from xformers.ops.fmha import common, triton_splitk

__all__ = [
    "CpuPagedOp",
    "PagedBias",
    "PagedOp",
    "ReferenceOp",
    "common",
    "outputs",
    "paged_attention",
    "read",
    "result",
    "triton_splitk",
]

Ints = npt.NDArray[np.integer[Any]]


@dataclass
class PagedBias(_biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask):  # type: ignore[misc]
    """xformers' paged causal mask, with a sliding window and a place for each block's lse.

    Built once per step by `build` and shared by every layer. The queries of a sequence are its
    last resident tokens: query i of n sees keys 0 .. num_resident - n + i, or the last `window`
    of those.

    Attributes:
        window: 0 for none; otherwise key k is visible to query q only if q - k < window.
        block_lse: None, or fp32[T, Hq, W]: entry (t, h, i) is the log-sum-exp of query t's scores
            over the i-th table entry of its own sequence, -inf where it sees none of it. The
            operator overwrites all of it at every call: read it before the next layer runs.
        causal: False lets every query see all of its sequence's keys.
        lse: None, or fp32[Hq, T] of the latest call: log-sum-exp over all that a query sees.
    """

    window: int = 0
    causal: bool = True
    block_lse: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    want_block_lse: bool = False
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        query_start: Ints,
        num_resident: Ints,
        block_table: Ints,
        block_size: int,
        *,
        window: int = 0,
        causal: bool = True,
        want_block_lse: bool = False,
        device: torch.device | str = "cpu",
    ) -> "PagedBias":
        """Make the bias of one step from the plan's arrays.

        Args:
            query_start: int[B + 1], where each sequence's queries begin in the packed batch.
            num_resident: int[B], tokens resident per sequence, this step's included.
            block_table: int[B, W] block ids; entries past a sequence's blocks are never read.
            block_size: Slots of a block.
            window: Sliding window in tokens, 0 for none.
            causal: Whether a sequence's queries are its last tokens and see none that follow.
            want_block_lse: Have the operator allocate (once) and fill `block_lse`.
            device: Where the tensors go. On the CPU int32 arrays are shared, not copied.

        Cost: a few numpy calls and no Python loop over sequences; 20 us for 512 of them.
        """
        starts = np.ascontiguousarray(query_start, np.int32)
        lengths = np.ascontiguousarray(num_resident, np.int32)
        table = np.ascontiguousarray(block_table, np.int32)
        queries = np.diff(starts)
        padding = table.shape[1] * block_size
        # xformers only iterates over and subtracts the `_py` lists: arrays will do.
        q_info = _biases._SeqLenInfo(
            seqstart=torch.from_numpy(starts).to(device),
            max_seqlen=int(queries.max(initial=0)),
            min_seqlen=int(queries.min()) if len(queries) else 0,
            seqstart_py=starts,
        )
        key_starts = np.arange(len(lengths) + 1, dtype=np.int32) * np.int32(padding)
        k_info = _biases._PaddedSeqLenInfo(
            seqstart=torch.from_numpy(key_starts).to(device),
            max_seqlen=int(lengths.max(initial=0)),
            min_seqlen=int(lengths.min()) if len(lengths) else 0,
            seqstart_py=key_starts,
            seqlen=torch.from_numpy(lengths).to(device),
            seqlen_py=lengths,
            padding=padding,
        )
        return cls(
            q_seqinfo=q_info,
            k_seqinfo=k_info,
            block_tables=torch.from_numpy(table).to(device),
            page_size=block_size,
            window=window,
            causal=causal,
            want_block_lse=want_block_lse,
        )

    def to(self, device: torch.device) -> "PagedBias":
        """The same bias on another device (arrays are copied)."""
        return type(self).build(
            self.q_seqinfo.seqstart_py,
            self.k_seqinfo.seqlen_py,
            self.block_tables.cpu().numpy(),
            self.page_size,
            window=self.window,
            causal=self.causal,
            want_block_lse=self.want_block_lse,
            device=device,
        )

    def plain(self) -> Any:
        """xformers' own mask over the same tensors, for operators that know no subclass.

        Raises:
            UnsupportedBackend: A window or block lse is wanted: only our operators know those.
        """
        if self.window or self.want_block_lse or not self.causal:
            raise UnsupportedBackend(
                "xformers' own causal paged mask has neither a window nor a block lse",
                where="device.operators",
                remedy="use one of pagedkv's operators",
            )
        return _biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(
            q_seqinfo=self.q_seqinfo,
            k_seqinfo=self.k_seqinfo,
            block_tables=self.block_tables,
            page_size=self.page_size,
        )

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """The dense mask over the whole pool, window included; for tests.

        Args:
            shape: [..., T, B * W * block_size], as xformers wants it for paged masks.
        """
        dense: torch.Tensor = super().materialize(shape, dtype, device)
        if not self.window:
            return dense
        batch = read(self)
        dense = dense.clone()
        for b in range(len(batch.resident)):
            keys = batch.slots(b)
            for i, t in enumerate(range(*batch.query_start[b : b + 2])):
                dense[..., t, keys[: max(0, batch.limit(b, i) - self.window)]] = -math.inf
        return dense


def read(bias: Any) -> Batch:
    """The kernel's view of a bias, remembered on one of ours."""
    if isinstance(bias, PagedBias):
        if "batch" not in bias.prepared:
            bias.prepared["batch"] = _read_bias(bias)
        return bias.prepared["batch"]  # type: ignore[no-any-return]
    return _read_bias(bias)


def _read_bias(bias: Any) -> Batch:
    from_end = type(bias) in _CAUSAL_FROM_END and getattr(bias, "causal", True)
    return Batch.read(bias, from_end=from_end, from_start=type(bias) in _CAUSAL_FROM_START)


_CAUSAL_FROM_END = (
    PagedBias,
    _biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    _biases.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    _biases.BlockDiagonalCausalFromBottomRightMask,
)
_CAUSAL_FROM_START = (_biases.BlockDiagonalCausalMask,)
_ALL_KEYS = (
    _biases.PagedBlockDiagonalPaddedKeysMask,
    _biases.BlockDiagonalPaddedKeysMask,
    _biases.BlockDiagonalMask,
)


class PagedOp(common.AttentionFwOpBase):  # type: ignore[misc]
    """What our two operators declare to xformers."""

    OPERATOR = True
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cpu"}
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = {torch.float32, torch.float16, torch.bfloat16}
    SUPPORTED_MAX_K = math.inf
    SUPPORTED_ATTN_BIAS_TYPES = (*_CAUSAL_FROM_END, *_CAUSAL_FROM_START, *_ALL_KEYS)
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_OUTPUT_DTYPE = True
    SUPPORTS_PARTIAL = True
    SUPPORTS_BMGHK = True

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs cannot be run; empty if they can. xformers puts it in its error."""
        reasons: list[str] = super().not_supported_reasons(d)
        # xformers takes every device without bf16 tensor cores for one without bf16.
        reasons = [r for r in reasons if not r.startswith("bf16 is only supported on")]
        if reasons:
            return reasons
        if d.key.dtype == torch.int32 and d.query.dtype != torch.float32:
            reasons.append(f"keys in 8 bits want float32 queries, not {d.query.dtype}")
        if any(x.requires_grad for x in (d.query, d.key, d.value)) and torch.is_grad_enabled():
            reasons.append("there is no backward pass: run under torch.no_grad()")
        for name in ("query", "key", "value"):
            if getattr(d, name).stride(-1) != 1 and getattr(d, name).shape[-1] > 1:
                reasons.append(f"{name}.stride(-1) is not 1: call .contiguous()")
        batch = read(d.attn_bias)
        if batch.query_start[-1] != d.query.shape[1]:
            reasons.append(
                f"the bias is for {batch.query_start[-1]} queries, not {d.query.shape[1]}"
            )
        if batch.num_slots < 0 or batch.num_slots > d.key.shape[1]:
            reasons.append(f"the block table leads outside the {d.key.shape[1]} slots of the keys")
        if (batch.resident > batch.table.shape[1] * batch.block_size).any():
            reasons.append("a sequence has more tokens than its row of the block table has slots")
        return reasons


def outputs(inp: Any, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Empty fp32 out [1, T, G, H, D] and lse [G * H, T]; block lse [T, G * H, W] if wanted."""
    _, tokens, groups, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty((groups * heads, tokens), dtype=torch.float32)
    bias = inp.attn_bias
    if not isinstance(bias, PagedBias) or not bias.want_block_lse:
        return out, lse, None
    shape = (tokens, groups * heads, bias.block_tables.shape[1])
    if bias.block_lse is None or bias.block_lse.shape != shape:
        bias.block_lse = torch.empty(shape, dtype=torch.float32)
    return out, lse, bias.block_lse


def result(inp: Any, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What `apply` returns, in xformers' shapes and the output dtype."""
    if isinstance(inp.attn_bias, PagedBias):
        inp.attn_bias.lse = lse
    shape = inp.query.shape
    out = out.view(shape).to(inp.get_output_dtype())
    return out, common.Context(out=out, lse=lse.view(1, *shape[2:-1], shape[1]))


class CpuPagedOp(PagedOp):
    """Attention on the CPU over blocks read in place, by the native kernel.

    fp32, fp16 or bf16 in memory, fp32 arithmetic; any head size, group size and block size; decode
    rows and prefill chunks in one batch. A sequence's output is bit-identical in any batch.
    """

    NAME = "pagedkv_cpu"

    @classmethod
    def get_ready(cls, dtype: torch.dtype) -> None:
        """Compile the kernel for caches of `dtype` now and not in the first step.

        Raises:
            UnsupportedBackend: It cannot be compiled here.

        Cost: 10-20 s once per machine and kind of storage, 0.2 s per process from then on.
        """
        from .cpu import call

        call.get_ready(dtype)

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """Run attention; returns (out, Context(out, lse)).

        Raises:
            UnsupportedBackend: The kernel cannot be compiled here; nothing was written.

        Cost: reads each key and value once per tile of queries; some 30 us besides.
        """
        from .cpu import call

        q, k, v = inp.get_qkv_in_bmghk()
        out, lse, block_lse = outputs(inp, q)
        if out.numel():
            batch = read(inp.attn_bias)
            prepared = getattr(inp.attn_bias, "prepared", {})
            call.run(batch, prepared, (q, k, v), (out, lse, block_lse), inp.scale_float)
        return result(inp, out, lse)


class ReferenceOp(PagedOp):
    """The same contract in plain torch, one dense fp32 softmax per sequence: the tests' oracle."""

    NAME = "pagedkv_reference"

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """Run attention; returns (out, Context(out, lse)). Slow: gathers every context."""
        q, k, v = inp.get_qkv_in_bmghk()
        out, lse, block_lse = outputs(inp, q)
        batch = read(inp.attn_bias)
        reference.run(batch, {}, (q, k, v), (out, lse, block_lse), inp.scale_float)
        return result(inp, out, lse)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    bias: PagedBias,
    scale: float | None = None,
    op: Any = CpuPagedOp,
) -> torch.Tensor:
    """One layer's attention over paged keys and values, through xformers' public call.

    Args:
        query: [T, Hq, D], the step's packed queries.
        key_cache: [num_blocks, block_size, Hkv, D], contiguous; query head h reads KV head
            h // (Hq / Hkv). In another float type than the query, or packed by `quantize`.
        value_cache: Like `key_cache`.
        bias: The step's; its `block_lse` and `lse` are overwritten.
        scale: Of the scores; D ** -0.5 if None.
        op: What `dispatch.choose_operator` gave.

    Returns:
        [T, Hq, D] in the query's dtype.

    Raises:
        ValueError: xformers' own, saying which input the operator does not take and why.
    """
    tokens, heads, dim = query.shape
    blocks, size, kv_heads, row = key_cache.shape
    group = heads // kv_heads
    whole = (1, blocks * size, kv_heads, 1, row)
    wide = (1, blocks * size, kv_heads, group, row)
    # The kernel takes query and keys alike, or fp32 beside packed 8 bits; it computes in fp32.
    packed = key_cache.dtype == torch.int32
    asked = query.to(torch.float32 if packed else key_cache.dtype)
    out: torch.Tensor = _ops.memory_efficient_attention_forward(
        asked.reshape(1, tokens, kv_heads, group, dim),
        key_cache.view(whole).expand(wide),
        value_cache.view(whole).expand(wide),
        attn_bias=bias,
        scale=scale,
        op=op,
        output_dtype=query.dtype,
    )
    return out.view(tokens, heads, dim)
