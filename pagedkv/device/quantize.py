"""Keys and values in 8 or 4 bits: a scale for each token and head, beside what it scales.

A vector of D numbers is a row of int32 words, coefficients first: that is how xformers wants
quantised keys and values, and it puts the scale on the cache line that is read anyway.

In 8 bits it is the fp32 scale, then D signed bytes; ours, for the CPU. In 4 bits it is what
xformers' split-K kernel reads, for CUDA: scale and shift in fp16, then D numbers from 0 to 15.
"""

import torch
from torch import Tensor

__all__ = ["dequantize", "quantize", "quantize4", "row_words"]

_LARGEST = 127.0  # -128 is left out: symmetric, so that 0 stays 0
_STEPS = 15.0


def row_words(head_dim: int, bits: int = 8) -> int:
    """Return the int32 words of one vector's row; they hold whole numbers of `bits`."""
    return head_dim * bits // 32 + 1


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


def quantize4(vectors: Tensor) -> Tensor:
    """Pack vectors, each between its own least and largest: [..., D] to int32 [..., D / 8 + 1].

    The error is at most half a step, a thirtieth of the span, and the rounding of scale and shift
    to fp16. NaN and infinity become coefficients that are none, and all of the row reads as NaN.
    """
    exact = vectors.float()
    low = exact.amin(dim=-1, keepdim=True).half()
    scale = ((exact.amax(dim=-1, keepdim=True) - low.float()) / _STEPS).half()
    least = torch.finfo(torch.float16).tiny
    steps = ((exact - low.float()) / scale.float().clamp_min(least)).round_().clamp_(0, _STEPS)
    steps = steps.nan_to_num_().to(torch.int32)
    nibbles = steps.view(*steps.shape[:-1], -1, 8)
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=vectors.device)
    data = (nibbles << places).sum(dim=-1, dtype=torch.int32)
    return torch.cat([torch.cat([scale, low], dim=-1).view(torch.int32), data], dim=-1)


def dequantize(rows: Tensor, head_dim: int) -> Tensor:
    """Return the fp32 vectors [..., head_dim] of packed rows; of other rows, the same in fp32."""
    if rows.dtype != torch.int32:
        return rows.float()
    rows = rows.contiguous()
    coefficients, data = rows[..., :1].contiguous(), rows[..., 1:].contiguous()
    if rows.shape[-1] == row_words(head_dim):
        return data.view(torch.int8).float() * coefficients.view(torch.float32)
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=rows.device)
    steps = (data.unsqueeze(-1) >> places & 15).flatten(-2)
    scale, low = coefficients.view(torch.float16).float().chunk(2, dim=-1)
    return steps * scale + low
