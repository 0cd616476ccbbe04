"""The projection to the vocabulary from a second copy of its matrix, laid out for the processor.

A small batch through a large matrix spends much of its time copying that matrix into the order
that the product wants. oneDNN, which torch brings, can keep it in that order.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.errors import UnsupportedBackend

__all__ = ["PackedLinear", "pack_lm_head"]

# What the layout is tuned for; a matrix packed for 32 rows serves any number of them.
_ROWS = 32


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weight.

    The weight stays where it is, tied to an embedding or not: names, checkpoints and counts of
    parameters are as before. The copy follows no later change of it and cannot be deep-copied.

    Args:
        linear: Whose weight and bias it shares.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        weight = linear.weight.detach()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``: [..., in_features] to [..., out_features]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self._packed, self.bias, "none", [], ""
        )
        return out


def pack_lm_head(model: Any, name: str) -> None:
    """Have a transformers model multiply by a packed copy of its output embedding's matrix.

    Args:
        name: What the model was asked for by; for errors.

    Raises:
        UnsupportedBackend: torch does not pack this matrix on this machine, or the packed product
            is not the plain one within rounding. The model is left as it was.

    Cost: the matrix once more in memory, and twice for a moment; 0.1 s for 100 MB.
    """
    head = model.get_output_embeddings()
    problem = ""
    if not isinstance(head, nn.Linear):
        problem = f"its output embedding is {type(head).__name__}, not a linear layer"
    elif head.weight.device.type != "cpu":
        problem = f"its output embedding is on {head.weight.device}; packing is for the CPU"
    else:
        try:
            packed = PackedLinear(head)
            problem = _difference(packed, head)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            problem = f"torch {torch.__version__} does not pack it here ({lines[0]})"
    if problem:
        raise UnsupportedBackend(
            f"pack_lm_head cannot be had: {problem}",
            where=name,
            remedy="leave pack_lm_head out",
        )
    model.set_output_embeddings(packed)


def _difference(packed: nn.Linear, plain: nn.Linear) -> str:
    """Say how the two differ on random rows, if by more than rounding; else ""."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, plain.in_features, generator=generator).to(plain.weight.dtype)
    with torch.no_grad():
        expected, found = plain(probe).float(), packed(probe).float()
    # bf16 and fp16 round every product's sum to their own few bits.
    bound = max(1e-4, 2 * torch.finfo(plain.weight.dtype).eps) * float(expected.abs().max())
    error = float((found - expected).abs().max())
    return "" if error <= bound else f"the packed product is off by {error:.1e} (bound {bound:.1e})"
