"""Who sees what in one step: xformers' paged causal mask, with what our operators add to it."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .library import attn_bias as masks
from .reference import Batch
from .send import Send
from .turns import Turns

__all__ = ["BIASES", "PagedBias", "read"]

Ints = npt.NDArray[np.integer[Any]]


@dataclass
class PagedBias(masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask):  # type: ignore[misc]
    """xformers' paged causal mask, with a sliding window and a place for each block's lse.

    Built once per step by `build` and shared by every layer. The queries of a sequence are its
    last resident tokens: query i of n sees keys 0 .. num_resident - n + i, or the last `window`
    of those.

    Attributes:
        window: 0 for none; otherwise key k is visible to query q only if q - k < window.
        block_lse: None, or fp32[T, Hq, W]: entry (t, h, i) is the log-sum-exp of query t's scores
            over the i-th table entry of its own sequence, -inf where it sees none of it. Every
            call makes its own.
        causal: False lets every query see all of its sequence's keys.
        turns: None, or by how much queries are turned before they meet each of the table's blocks.
        lse: None, or fp32[Hq, T] of the latest call: log-sum-exp over all that a query sees.
        host_table: What `block_tables` holds, where reading it waits for no device.
        prepared: What an operator made of the bias, for the layers that follow.
    """

    window: int = 0
    causal: bool = True
    turns: Turns | None = None
    block_lse: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    want_block_lse: bool = False
    host_table: Ints | None = None
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
        turns: Turns | None = None,
        want_block_lse: bool = False,
        send: Send = torch.from_numpy,
    ) -> "PagedBias":
        """Make the bias of one step from the plan's arrays.

        Args:
            query_start: int[B + 1], where each sequence's queries begin in the packed batch.
            num_resident: int[B], tokens resident per sequence, this step's included.
            block_table: int[B, W] block ids; entries past a sequence's blocks are never read.
            block_size: Slots of a block.
            window: Sliding window in tokens, 0 for none.
            causal: Whether a sequence's queries are its last tokens and see none that follow.
            turns: [B, W] By how much queries are turned before they meet each block; only for
                operators whose `TURNS` is true. `TurnedBias` serves the others.
            want_block_lse: Have the operator fill `block_lse`.
            send: Puts arrays where the keys are. On the CPU int32 arrays are shared, not copied.

        Cost: a few numpy calls and no Python loop over sequences; 20 us for 512 of them.
        """
        starts = np.ascontiguousarray(query_start, np.int32)
        lengths = np.ascontiguousarray(num_resident, np.int32)
        table = np.ascontiguousarray(block_table, np.int32)
        queries = np.diff(starts)
        padding = table.shape[1] * block_size
        # xformers only iterates over and subtracts the `_py` lists: arrays will do.
        q_info = masks._SeqLenInfo(
            seqstart=send(starts),
            max_seqlen=int(queries.max(initial=0)),
            min_seqlen=int(queries.min()) if len(queries) else 0,
            seqstart_py=starts,
        )
        key_starts = np.arange(len(lengths) + 1, dtype=np.int32) * np.int32(padding)
        k_info = masks._PaddedSeqLenInfo(
            seqstart=send(key_starts),
            max_seqlen=int(lengths.max(initial=0)),
            min_seqlen=int(lengths.min()) if len(lengths) else 0,
            seqstart_py=key_starts,
            seqlen=send(lengths),
            seqlen_py=lengths,
            padding=padding,
        )
        return cls(
            q_seqinfo=q_info,
            k_seqinfo=k_info,
            block_tables=send(table),
            page_size=block_size,
            window=window,
            causal=causal,
            turns=turns,
            want_block_lse=want_block_lse,
            host_table=table,
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
    masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    masks.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    masks.BlockDiagonalCausalFromBottomRightMask,
)
_CAUSAL_FROM_START = (masks.BlockDiagonalCausalMask,)
_ALL_KEYS = (
    masks.PagedBlockDiagonalPaddedKeysMask,
    masks.BlockDiagonalPaddedKeysMask,
    masks.BlockDiagonalMask,
)

BIASES = (*_CAUSAL_FROM_END, *_CAUSAL_FROM_START, *_ALL_KEYS)
"""The masks that our operators know."""
