"""What `load_model` gives: a network, its tokenizer, and what is known of both."""

from dataclasses import dataclass, field
from typing import Any

import torch

from pagedkv.device.geometry import ModelGeometry

__all__ = ["LoadedModel"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be run through `forward`.

    Attributes:
        model: A transformers causal language model in eval mode whose parameters need no gradient,
            with `attn_implementation="pagedkv"`; on the CPU in fp32, some of its parts are
            replaced by native code that computes the same (`substitutes`).
        tokenizer: Its tokenizer, or None if its files bring none.
        name: What it was asked for by.
        geometry: Its attention's shape.
        narrows_logits: It can compute logits for chosen rows only (`logits_to_keep`).
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    name: str
    geometry: ModelGeometry
    narrows_logits: bool

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def dtype_name(self) -> str:
        """The same in words: ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]
