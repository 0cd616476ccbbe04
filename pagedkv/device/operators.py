"""xformers attention operators over paged KV: ours for the CPU, and what all of ours share.

xformers has no operator for the CPU; `CpuPagedOp` is one, and `ReferenceOp` is its slow plain-torch
twin. All are used through xformers' public calls:

    bias = PagedBias.build(query_start, num_resident, block_table, block_size)
    out = xformers.ops.memory_efficient_attention_forward(q, k, v, attn_bias=bias, op=CpuPagedOp)
"""

import math
from operator import is_
from typing import Any, ClassVar

import torch

from . import reference
from .bias import BIASES, PagedBias, read
from .library import common, ops
from .quantize import row_words
from .send import Send

__all__ = [
    "CpuPagedOp",
    "PagedBias",
    "PagedOp",
    "ReferenceOp",
    "outputs",
    "paged_attention",
    "result",
]


class PagedOp(common.AttentionFwOpBase):  # type: ignore[misc]
    """What our operators declare to xformers, and what else an executor asks of them."""

    OPERATOR = True
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cpu"}
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = {torch.float32, torch.float16, torch.bfloat16}
    SUPPORTED_MAX_K = math.inf
    SUPPORTED_ATTN_BIAS_TYPES = BIASES
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_OUTPUT_DTYPE = True
    SUPPORTS_PARTIAL = True
    SUPPORTS_BMGHK = True
    TURNS: ClassVar[bool] = False  # whether a bias may bring turns

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs cannot be run; empty if they can. xformers puts it in its error.

        What can be run is remembered on a bias of ours, for the layers that follow.
        """
        prepared = getattr(d.attn_bias, "prepared", {})
        inputs = d.query, d.key, d.value
        asked = cls, d.p, *_shapes(inputs)
        known = prepared.get(asked)
        if known is None or torch.is_grad_enabled():
            reasons = cls._refusals(d)
            if reasons:
                return reasons
            known = prepared.setdefault(asked, {})
        prepared[_LATEST] = inputs, known
        return []

    @classmethod
    def _refusals(cls, d: Any) -> list[str]:
        reasons: list[str] = super().not_supported_reasons(d)
        # xformers takes every device without bf16 tensor cores for one without bf16.
        reasons = [r for r in reasons if not r.startswith("bf16 is only supported on")]
        if reasons:
            return reasons
        asked = cls.asked_in(d.query.dtype, d.key.dtype)
        if d.query.dtype != asked:
            reasons.append(f"these keys want {asked} queries, not {d.query.dtype}")
        if d.key.dtype == torch.int32 and d.key.shape[-1] not in cls.packed_rows(d.query.shape[-1]):
            reasons.append(f"it reads no packed rows of {d.key.shape[-1]} words")
        if any(x.requires_grad for x in (d.query, d.key, d.value)) and torch.is_grad_enabled():
            reasons.append("there is no backward pass: run under torch.no_grad()")
        for name in ("query", "key", "value"):
            if getattr(d, name).stride(-1) != 1 and getattr(d, name).shape[-1] > 1:
                reasons.append(f"{name}.stride(-1) is not 1: call .contiguous()")
        return reasons + cls._bias_refusals(d)

    @classmethod
    def _bias_refusals(cls, d: Any) -> list[str]:
        reasons = []
        batch = read(d.attn_bias)
        if batch.turns is not None and not cls.TURNS:
            reasons.append("it turns no queries: attend with a TurnedBias")
        if batch.turns is not None and batch.turns.index.shape != batch.table.shape:
            shapes = f"{batch.turns.index.shape}, not for {batch.table.shape}"
            reasons.append(f"the turns are for a block table of {shapes}")
        if batch.turns is not None and 2 * batch.turns.cos.shape[1] > d.query.shape[-1]:
            turned = 2 * batch.turns.cos.shape[1]
            reasons.append(f"{turned} elements are turned, of heads of {d.query.shape[-1]}")
        if batch.query_start[-1] != d.query.shape[1]:
            reasons.append(
                f"the bias is for {batch.query_start[-1]} queries, not {d.query.shape[1]}"
            )
        if batch.num_slots < 0 or batch.num_slots > d.key.shape[1]:
            reasons.append(f"the block table leads outside the {d.key.shape[1]} slots of the keys")
        if batch.overrun:
            reasons.append("a sequence has more tokens than its row of the block table has slots")
        return reasons

    @classmethod
    def asked_in(cls, computed: torch.dtype, stored: torch.dtype) -> torch.dtype:
        """Return what queries are rounded to before they meet keys stored as `stored`.

        xformers wants both alike; beside packed keys (int32) fp32 is the most exact.
        """
        return torch.float32 if stored == torch.int32 else stored

    @classmethod
    def packed_rows(cls, head_dim: int) -> set[int]:
        """Return the lengths of packed rows that it reads, in words."""
        return {row_words(head_dim)}

    @classmethod
    def by_slot(cls) -> type["PagedOp"]:
        """Return the operator for the same keys where each slot is a block of its own."""
        return cls

    @classmethod
    def get_ready(cls, keys: torch.Tensor, computed: torch.dtype, heads: int, dim: int) -> None:
        """Compile what steps over these keys need, now and not in the first step.

        Args:
            keys: [num_blocks, block_size, Hkv, row] of one layer; not changed.
            computed: The model's element type.
            heads: Query heads of the same layer.
            dim: Their size.

        Raises:
            UnsupportedBackend: It cannot be compiled here.
        """

    @classmethod
    def prepare(cls, bias: PagedBias, send: Send) -> None:
        """Make what its calls with this bias share, while the step's arrays are being sent."""


# In `prepared`: the inputs that were looked at last, and what is known of their like.
_LATEST = "latest"


def _shapes(inputs: Any) -> tuple[Any, ...]:
    """What tells inputs from others: a dozen questions to torch, for each layer of a step."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)


def _known(prepared: dict[Any, Any], inputs: Any) -> dict[Any, Any]:
    """Where what is known of such inputs is kept; xformers has mostly just had them looked at."""
    latest, known = prepared.pop(_LATEST, ((None,) * 3, {}))
    if not all(map(is_, latest, inputs)):
        known = prepared.setdefault(_shapes(inputs), {})
    return known  # type: ignore[no-any-return]


def outputs(inp: Any, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Empty fp32 out [1, T, G, H, D] and lse [G * H, T]; block lse [T, G * H, W] if wanted."""
    _, tokens, groups, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty((groups * heads, tokens), dtype=torch.float32, device=q.device)
    bias = inp.attn_bias
    if not isinstance(bias, PagedBias) or not bias.want_block_lse:
        return out, lse, None
    shape = (tokens, groups * heads, bias.block_tables.shape[1])
    bias.block_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    return out, lse, bias.block_lse


def result(
    inp: Any, out: torch.Tensor, lse: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, Any]:
    """What `apply` returns, in xformers' shapes and the output dtype.

    xformers calls it a gradient's need when somebody wants the lse.
    """
    if isinstance(inp.attn_bias, PagedBias):
        inp.attn_bias.lse = lse
    shape, dtype = inp.query.shape, inp.get_output_dtype()
    if out.dim() != len(shape):
        out = out.view(shape)
    if out.dtype != dtype:
        out = out.to(dtype)
    if not needs_gradient:
        return out, None
    return out, common.Context(out=out, lse=lse.view(1, *shape[2:-1], shape[1]))


class CpuPagedOp(PagedOp):
    """Attention on the CPU over blocks read in place, by the native kernel.

    fp32, fp16 or bf16 in memory, fp32 arithmetic; any head size, group size and block size; decode
    rows and prefill chunks in one batch. A sequence's output is bit-identical in any batch.
    """

    NAME = "pagedkv_cpu"
    TURNS = True

    @classmethod
    def get_ready(cls, keys: torch.Tensor, computed: torch.dtype, heads: int, dim: int) -> None:
        """As in `PagedOp`: 10-30 s once per machine and kind of storage, then 0.2 s a process."""
        from .cpu import call

        call.get_ready(keys.dtype)

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """Run attention; returns (out, Context(out, lse) if needed).

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
            known = _known(prepared, (q, k, v))
            call.run(batch, prepared, known, (q, k, v), (out, lse, block_lse), inp.scale_float)
        return result(inp, out, lse, needs_gradient)


class ReferenceOp(PagedOp):
    """The same contract in plain torch, one dense fp32 softmax per sequence: the tests' oracle."""

    NAME = "pagedkv_reference"
    TURNS = True

    @classmethod
    def packed_rows(cls, head_dim: int) -> set[int]:
        """Return the lengths of packed rows that it reads: of 8 bits and of 4."""
        return {row_words(head_dim), row_words(head_dim, bits=4)}

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """Run attention; returns (out, Context(out, lse) if needed). Slow: gathers all."""
        q, k, v = inp.get_qkv_in_bmghk()
        out, lse, block_lse = outputs(inp, q)
        batch = read(inp.attn_bias)
        reference.run(batch, {}, (q, k, v), (out, lse, block_lse), inp.scale_float)
        return result(inp, out, lse, needs_gradient)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    bias: PagedBias,
    scale: float | None = None,
    op: type[PagedOp] = CpuPagedOp,
) -> torch.Tensor:
    """One layer's attention over paged keys and values, through xformers' public call.

    Args:
        query: [T, Hq, D], the step's packed queries.
        key_cache: [num_blocks, block_size, Hkv, D], contiguous; query head h reads KV head
            h // (Hq / Hkv). In another float type than the query, or packed by `quantize`.
        value_cache: Like `key_cache`.
        bias: The step's; its `block_lse` and `lse` become this call's.
        scale: Of the scores; D ** -0.5 if None.
        op: What `dispatch.choose_operator` gave.

    Returns:
        [T, Hq, D] in the query's dtype.

    Raises:
        ValueError: A cache is not contiguous, or they differ in shape; or xformers' own, saying
            which input the operator does not take and why.
    """
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("a cache of keys or values is not contiguous: call .contiguous()")
    if key_cache.shape != value_cache.shape:
        shapes = f"{tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        raise ValueError(f"caches of keys and values are not alike: {shapes}")
    tokens, heads, dim = query.shape
    blocks, size, kv_heads, row = key_cache.shape
    group = heads // kv_heads
    # As `view` and `expand` would, in one step: a decode step does this for every layer.
    wide = (1, blocks * size, kv_heads, group, row)
    steps = (0, kv_heads * row, row, 0, 1)
    dtype = query.dtype
    asked_in = op.asked_in(dtype, key_cache.dtype)
    asked = query if dtype == asked_in else query.to(asked_in)
    out: torch.Tensor = ops.memory_efficient_attention_forward(
        asked.reshape(1, tokens, kv_heads, group, dim),
        key_cache.as_strided(wide, steps),
        value_cache.as_strided(wide, steps),
        attn_bias=bias,
        scale=scale,
        op=op,
        output_dtype=dtype,
    )
    return out.view(tokens, heads, dim)
