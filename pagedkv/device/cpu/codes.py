"""Weights that were quantised once, found again in their fp32 values: a byte each, bit for bit.

GGUF's simple formats cut the rows of a matrix into groups of GROUP weights: scale * code + offset,
scale and offset in fp16, codes of 4 to 8 bits. An extreme of a group has an extreme code, so a
group's least and largest weight tell its scale and offset, if it has any. Nothing is rounded here:
what is found gives back every weight, or is not used.
"""

import torch
from torch import Tensor

__all__ = ["GROUP", "GROUP_BYTES", "decode", "encode"]

GROUP = 32
GROUP_BYTES = 8 + GROUP  # for one output feature: scale and offset in fp32, and codes
# Steps between a group's extremes, the least being the offset: Q4_1 and Q5_1. Without offset, steps
# from 0 to the farther extreme; below 0, scales take a sign, the other one than it has: Q4_0, Q5_0.
_FORMATS = ((15, True), (127, False), (-8, False), (31, True), (-16, False))
_AT_ONCE = 1 << 20  # weights

_Coded = tuple[Tensor, Tensor, Tensor]


def encode(weight: Tensor, columns: int) -> Tensor | None:
    """Return a weight in bytes, panel by panel; None if it is not in one of the formats.

    Args:
        weight: fp32 [outputs, inputs], `outputs` a multiple of `columns`.
        columns: Output features of a panel.

    Returns:
        int8 [P, inputs / GROUP, GROUP_BYTES * columns]: of each group its scales and its offsets,
        fp32 [columns], and codes [GROUP, columns].

    Cost: little more than looking at the first panel if that is in no format.
    """
    outputs, inputs = weight.shape
    if inputs % GROUP or not weight.numel():
        return None
    panels = weight.view(outputs // columns, columns, inputs // GROUP, GROUP)
    for steps, offset in _FORMATS:
        coded = _encoded(panels, steps, offset) if _coded(panels[:1], steps, offset) else None
        if coded is not None:
            return coded
    return None


def _encoded(panels: Tensor, steps: int, offset: bool) -> Tensor | None:
    """What `encode` returns, for one format and panels [P, columns, groups, GROUP]."""
    count, columns, groups, _ = panels.shape
    out = torch.empty(count, groups, GROUP_BYTES * columns, dtype=torch.int8, device="cpu")
    some = max(_AT_ONCE // panels[0].numel(), 1)
    for part, to in zip(torch.split(panels, some), torch.split(out, some), strict=True):
        coded = _coded(part, steps, offset)
        if coded is None:
            return None
        sides = [x.transpose(1, 2).contiguous().view(torch.int8) for x in coded[:2]]
        codes = coded[2].permute(0, 2, 3, 1).flatten(2)
        torch.cat([*sides, codes], dim=2, out=to)
    return out


def _coded(panels: Tensor, steps: int, offset: bool) -> _Coded | None:
    """Scales and offsets [P, columns, groups] and codes, if they give the panels bit for bit."""
    low, high = panels.aminmax(dim=-1)
    if offset:
        scale = ((high - low) / steps).half().float()
    else:
        far = torch.where(high > -low, high, low)
        signed = far.abs() if steps > 0 else torch.where(far == 0, far, -far)
        scale = (signed / abs(steps)).half().float()
        low = scale * 0  # under a negative scale weights of 0 are -0.0
    codes = (panels - low[..., None]) / (scale + (scale == 0))[..., None]
    coded = scale, low, codes.round_().clamp_(-128, 127).to(torch.int8)
    same = torch.equal(_weights(*coded).view(torch.int32), panels.view(torch.int32))
    return coded if same and bool(scale.isfinite().all()) else None


def _weights(scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
    """What a fused multiply-add gives: fp16 times a byte is exact in fp32."""
    return codes.float().mul_(scale[..., None]).add_(offset[..., None])


def decode(coded: Tensor) -> Tensor:
    """Return what `encode` was given, bit for bit."""
    columns = coded.shape[2] // GROUP_BYTES
    *sides, codes = torch.split(coded, [4 * columns, 4 * columns, GROUP * columns], dim=2)
    scale, offset = (x.contiguous().view(torch.float32).transpose(1, 2) for x in sides)
    codes = codes.reshape(*codes.shape[:2], GROUP, columns).permute(0, 3, 1, 2)
    return _weights(scale, offset, codes).flatten(2).flatten(0, 1)
