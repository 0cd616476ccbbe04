"""Attention on CUDA over gathered blocks: what the split-K kernel cannot read in place."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from .library import attn_bias as masks
from .library import fmha
from .quantize import dequantize, row_words
from .send import Send
from .tiled import TiledOp, query_sequences
from .tiles import Tiles

__all__ = ["GatheredOp"]


@dataclass(frozen=True)
class _Gathered:
    """The blocks of all tiles, one after another, and xformers' mask over what they hold."""

    blocks: torch.Tensor  # int64 [N * W]
    block_size: int
    mask: Any


class GatheredOp(TiledOp):
    """Copies each sequence's blocks to one place, then attends by an ordinary operator.

    Any block size, head sizes that are a multiple of 8 up to 256, and keys in 8 or 4 bits, which
    are widened on the way. Every layer of every step copies all keys and values that it reads.
    """

    NAME = "pagedkv_gathered"
    KERNEL: ClassVar[Any] = None  # whichever xformers thinks best
    MOST_QUERIES = 2**31 - 1

    @classmethod
    def packed_rows(cls, head_dim: int) -> set[int]:
        """Return the lengths of packed rows that it reads: of 8 bits and of 4."""
        return {row_words(head_dim), row_words(head_dim, bits=4)}

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs cannot be run; empty if they can."""
        reasons: list[str] = super().not_supported_reasons(d)
        dim = d.query.shape[-1]
        if dim % 8 or dim > 256:
            reasons.append(f"head_dim {dim} is not a multiple of 8 up to 256")
        return reasons

    @classmethod
    def mask(cls, cut: Tiles, block_size: int, send: Send) -> Any:
        """Return where the blocks are and xformers' mask over them, one tile after another."""
        number, width = cut.table.shape
        padding = width * block_size
        starts = np.arange(number + 1, dtype=np.int32) * np.int32(padding)
        count = cut.end - cut.first
        lengths = {
            "max_seqlen": int(count.max()),
            "min_seqlen": int(count.min()),
            "seqlen": send(count),
            "seqlen_py": count,
        }
        queries = query_sequences(cut, send)
        if cut.first.any():
            starts = starts + np.append(cut.first, 0).astype(np.int32)
            keys = masks._GappySeqInfo(seqstart=send(starts), seqstart_py=starts, **lengths)
            mask = masks.BlockDiagonalGappyKeysMask(q_seqinfo=queries, k_seqinfo=keys)
        else:
            keys = masks._PaddedSeqLenInfo(
                seqstart=send(starts), seqstart_py=starts, padding=padding, **lengths
            )
            kind = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
            mask = kind(q_seqinfo=queries, k_seqinfo=keys)
        # Entries past a tile's keys hold anything: block 0 is as good, and there is one.
        used = np.arange(width) * block_size < cut.end[:, None]
        blocks = np.where(used, cut.table, 0).astype(np.int64)
        return _Gathered(send(blocks.ravel()), block_size, mask)

    @classmethod
    def launch(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: _Gathered, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `TiledOp`."""
        keys, values = (_gather(x, mask, q) for x in (k, v))
        out, lse = fmha.memory_efficient_attention_partial(
            q, keys, values, mask.mask, scale=scale, op=cls.KERNEL
        )
        return out, lse


def _gather(pool: torch.Tensor, at: _Gathered, q: torch.Tensor) -> torch.Tensor:
    """Return the blocks' vectors [1, N * W * block_size, G, H, D], as the queries are stored."""
    shared = pool.shape[3] > 1 and pool.stride(3) == 0
    one = pool[0, :, :, :1] if shared else pool[0]
    blocks = one.view(-1, at.block_size, *one.shape[1:]).index_select(0, at.blocks)
    rows = blocks.flatten(0, 1)
    if rows.dtype == torch.int32:
        rows = dequantize(rows, q.shape[-1])
    return rows.to(q.dtype).expand(-1, *q.shape[2:]).unsqueeze(0)
