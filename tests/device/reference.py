"""The slow truth that models are held against: transformers' own runs, and plain attention."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pagedkv.device.loaded import LoadedModel

__all__ = ["DenseStep", "greedy", "kept_logits", "packed", "reference_logits", "reference_model"]


def reference_model(loaded: LoadedModel, attn_implementation: str = "sdpa") -> Any:
    """The same weights in a model made anew: transformers' own attention, norms and rotations."""
    config = copy.deepcopy(loaded.model.config)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    model.load_state_dict(loaded.model.state_dict(), assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    """`f32[len(token_ids), vocab]` of one whole sequence from position 0."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()


def kept_logits(llm: Any) -> list[Tensor]:
    """Return a list that every step's logits are added to from now on."""
    executor, kept = llm.engine.executor, []
    forward = executor.forward

    def keep(plan: Any) -> Any:
        drawn, observed = forward(plan)
        kept.append(drawn.clone())
        return drawn, observed

    executor.forward = keep
    return kept


class DenseStep:
    """Causal attention over packed sequences, remembering every key and value. An AttentionStep.

    Call `begin` with how many tokens of which sequence the next forward brings, in packed order.
    """

    def __init__(self, windows: tuple[int, ...]) -> None:
        self.windows = windows
        self.rows: list[tuple[int, int]] = []
        self.memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.calls: list[int] = []

    def begin(self, rows: list[tuple[int, int]]) -> "DenseStep":
        self.rows = rows
        self.calls = []
        return self

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self.calls.append(layer_idx)
        outputs, start = [], 0
        for sequence, count in self.rows:
            part = slice(start, start + count)
            keys, values = self._remember(layer_idx, sequence, key[part], value[part])
            outputs.append(_attention(query[part], keys, values, scaling, self.windows[layer_idx]))
            start += count
        assert start == len(query)
        return torch.cat(outputs)

    def _remember(
        self, layer_idx: int, sequence: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        slot = (layer_idx, sequence)
        old_key, old_value = self.memory.get(slot, (key[:0], value[:0]))
        # Copies: the next layer may overwrite what this one hands on.
        self.memory[slot] = torch.cat([old_key, key]), torch.cat([old_value, value])
        return self.memory[slot]


def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
    """The last len(query) of len(key) tokens attend to themselves and to what came before."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    at = torch.arange(len(key))
    distance = at[len(key) - len(query) :, None] - at[None, :]
    seen = (distance >= 0) & ((distance < window) if window else True)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def packed(parts: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Token ids and positions of several (tokens, first position) one after another."""
    token_ids = [token for tokens, _ in parts for token in tokens]
    positions = [first + i for tokens, first in parts for i in range(len(tokens))]
    return torch.tensor(token_ids), torch.tensor(positions)


def greedy(loaded: LoadedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy continuation of one prompt through a DenseStep, end of sequence ignored."""
    from pagedkv.device.bridge import forward

    step = DenseStep(loaded.geometry.sliding_window)
    written: list[int] = []
    tokens, first = prompt, 0
    for _ in range(max_tokens):
        ids, positions = packed([(tokens, first)])
        last = torch.tensor([len(tokens) - 1])
        logits = forward(loaded, ids, positions, step.begin([(0, len(tokens))]), last)
        first += len(tokens)
        tokens = [int(logits[0].argmax())]
        written += tokens
    return written
