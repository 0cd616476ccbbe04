"""Rotating queries so that old keys are read at new distances.

Keys are stored once, rotated to the position they were written at. When eviction closes a gap
before a block, its distance to every later query changes; a rotary score depends on distance
alone, so turning the query by the change reads the block where it now stands, exactly, and leaves
shared blocks untouched (Su et al. 2021; StreamingLLM's cache positions, Xiao et al. 2024).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.core.arrays import Int32
from pagedkv.device.send import Send

__all__ = ["Turns"]


class Turns:
    """By how much the queries of each sequence are turned before they meet each of its blocks.

    Attributes:
        index: int32 [B, W] Which row of the tables; row 0 turns nothing.
        cos, sin: fp32 [U, pairs] Of the angle of each pair of elements; computed in fp64. They are
            where the vectors are.
        interleaved: A pair is elements (2i, 2i + 1), not (i, i + pairs).

    Args:
        turns: int [B, W] Positions to turn by.
        frequencies: Radians that one position turns each pair by; the first 2 * pairs elements of
            a head are rotated, the rest are not.
        send: Puts arrays where the vectors are.
    """

    def __init__(
        self,
        turns: Int32,
        frequencies: tuple[float, ...],
        *,
        interleaved: bool = False,
        send: Send = torch.from_numpy,
    ) -> None:
        amounts, index = np.unique(np.append(0, turns.ravel()), return_inverse=True)
        zero = index[0]
        order = np.arange(len(amounts))
        order[[0, zero]] = zero, 0  # the identity comes first
        self.index: Int32 = np.ascontiguousarray(order[index[1:]].reshape(turns.shape), np.int32)
        angles: npt.NDArray[np.float64] = amounts[order][:, None] * np.array(frequencies)
        self.cos, self.sin = (send(of(angles).astype(np.float32)) for of in (np.cos, np.sin))
        self.interleaved = interleaved

    def apply(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return vectors [N, ..., head_dim], each of the N turned by its own row: int64 [N]."""
        shape = (len(rows), *(1,) * (vectors.dim() - 2), self.cos.shape[1])
        cos = self.cos.index_select(0, rows).view(shape)
        sin = self.sin.index_select(0, rows).view(shape)
        return self._rotated(vectors, cos, sin)

    def _rotated(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = self.cos.shape[1]
        turned = vectors.clone()
        step = slice(0, 2 * pairs, 2) if self.interleaved else slice(0, pairs)
        other = slice(1, 2 * pairs, 2) if self.interleaved else slice(pairs, 2 * pairs)
        a, b = vectors[..., step].float(), vectors[..., other].float()
        turned[..., step] = (a * cos - b * sin).to(vectors.dtype)
        turned[..., other] = (b * cos + a * sin).to(vectors.dtype)
        return turned
