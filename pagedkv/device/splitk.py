"""Attention on CUDA over blocks read in place: xformers' split-K kernel behind our contract."""

from typing import Any, ClassVar

import numpy as np
import torch

from .bias import read
from .gathered import GatheredOp
from .library import attn_bias as masks
from .library import common, triton_splitk
from .operators import PagedOp
from .quantize import row_words
from .send import Send
from .tiled import TiledOp, query_sequences
from .tiles import Tiles

__all__ = ["BLOCK_SIZES", "HEAD_DIMS", "SplitKPagedOp", "splitk_op"]

HEAD_DIMS = frozenset({16, 32, 64, 128, 256, 512})
BLOCK_SIZES = (64, 32, 16)  # a block holds whole tiles of one of these many keys


class SplitKPagedOp(TiledOp):
    """Paged attention by `KERNEL`; subclasses say in what tiles of keys.

    Keys and values are fp16 or bf16, or packed in 4 bits: the kernel reads those itself.
    """

    NAME = "pagedkv_splitk"
    KERNEL: ClassVar[Any] = triton_splitk.FwOp
    MOST_QUERIES = 16

    @classmethod
    def packed_rows(cls, head_dim: int) -> set[int]:
        """Return the lengths of packed rows that it reads: of 4 bits."""
        return {row_words(head_dim, bits=4)}

    @classmethod
    def by_slot(cls) -> type[PagedOp]:
        """Return the operator that gathers: single slots are no tiles of keys."""
        return GatheredOp

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs cannot be run; empty if they can."""
        reasons: list[str] = super().not_supported_reasons(d)
        if reasons:
            return reasons
        block_size = read(d.attn_bias).block_size
        if block_size % cls.KERNEL.BLOCK_N:
            reasons.append(f"block_size {block_size} is not a multiple of {cls.KERNEL.BLOCK_N}")
        if d.query.shape[-1] not in HEAD_DIMS:
            reasons.append(f"head_dim {d.query.shape[-1]} is none of {sorted(HEAD_DIMS)}")
        return reasons

    @classmethod
    def mask(cls, cut: Tiles, block_size: int, send: Send) -> Any:
        """Return xformers' paged mask: causal from the start, or of one query from anywhere."""
        each = {
            "q_seqinfo": query_sequences(cut, send),
            "block_tables": send(cut.table),
            "page_size": block_size,
        }
        ends, longest, shortest = send(cut.end), int(cut.end.max()), int(cut.end.min())
        number, padding = len(cut.end), cut.table.shape[1] * block_size
        lengths = {
            "max_seqlen": longest,
            "min_seqlen": shortest,
            "seqlen": ends,
            "seqlen_py": cut.end,
        }
        if cut.first.any():
            # Of paged keys it wants where they end, and that from the start of the table.
            starts = np.append(cut.first, 0).astype(np.int32)
            keys = masks._GappySeqInfo(seqstart=send(starts), seqstart_py=starts, **lengths)
            return masks.PagedBlockDiagonalGappyKeysMask(k_seqinfo=keys, **each)
        starts = np.arange(number + 1, dtype=np.int32) * np.int32(padding)
        keys = masks._PaddedSeqLenInfo(
            seqstart=send(starts), seqstart_py=starts, padding=padding, **lengths
        )
        kind = masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        return kind(k_seqinfo=keys, **each)

    @classmethod
    def launch(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `TiledOp`."""
        inputs = common.Inputs(q, k, v, attn_bias=mask, scale=scale)
        out, context = cls.KERNEL.apply(inputs, needs_gradient=True)
        return out, context.lse


def splitk_op(block_size: int) -> type[SplitKPagedOp]:
    """Return the operator whose tiles of keys fit this block size.

    Args:
        block_size: A multiple of 16.
    """
    keys = next(size for size in BLOCK_SIZES if block_size % size == 0)
    kernel = type(f"SplitK{keys}", (triton_splitk.FwOp,), {"BLOCK_N": keys})
    return type(f"SplitKPagedOp{keys}", (SplitKPagedOp,), {"KERNEL": kernel})
