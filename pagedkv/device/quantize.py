"""Keys and values in 8 bits: one scale for each token and head, beside what it scales.

A vector of D numbers is a row of D / 4 + 1 int32 words: the fp32 scale, then D signed bytes. That
is how xformers wants quantised keys and values, coefficients first in rows of int32, and it puts
the scale on the cache line that is read anyway.
"""

import torch
from torch import Tensor

__all__ = ["dequantize", "quantize", "row_words"]

_LARGEST = 127.0  # -128 is left out: symmetric, so that 0 stays 0


def row_words(head_dim: int) -> int:
    """Return the int32 words of one vector's row; `head_dim` is a multiple of 4."""
    return head_dim // 4 + 1


def quantize(vectors: Tensor) -> Tensor:
    """Pack vectors, each scaled by its own largest magnitude: [..., D] to int32 [..., D / 4 + 1].

    The error is at most half a step, the largest magnitude / 254. NaN and infinity become a scale
    that is none, and all of the row reads as NaN.
    """
    exact = vectors.float()
    scale = exact.abs().amax(dim=-1, keepdim=True) / _LARGEST
    steps = (exact / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    data = steps.nan_to_num_().to(torch.int8).view(torch.int32)
    return torch.cat([scale.view(torch.int32), data], dim=-1)


def dequantize(rows: Tensor) -> Tensor:
    """Return the fp32 vectors of packed rows; of other rows, the same in fp32."""
    if rows.dtype != torch.int32:
        return rows.float()
    rows = rows.contiguous()
    scale = rows[..., :1].view(torch.float32)
    return rows[..., 1:].contiguous().view(torch.int8).float() * scale
