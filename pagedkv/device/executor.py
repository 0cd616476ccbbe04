"""Carries out step plans with torch."""

from typing import NamedTuple

import msgspec
import numpy as np
import torch

from pagedkv.core.arrays import Int32, Int64
from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observed, StepPlan, StepResult
from pagedkv.device.attention import PagedAttentionStep
from pagedkv.device.bridge import forward
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.operators import CpuPagedOp, PagedOp
from pagedkv.device.poison import Poison
from pagedkv.device.prompt_scores import score_prompt
from pagedkv.device.sampling import sample
from pagedkv.device.send import Send
from pagedkv.device.staging import Transfer, transfer_to
from pagedkv.device.store import KVStore, one_group

__all__ = ["TorchExecutor"]


class TorchExecutor:
    """Runs plans on a model and a KV store; holds no state of any sequence besides the store.

    Args:
        model: What `load_model` gave.
        store: Blocks for at least as many ids as the scheduler hands out.
        layout: The scheduler's groups; one for everything if omitted.
        operator: The xformers operator that attends; it is compiled here, so that no step waits
            for it.
        poison: Keeps what nobody may read full of NaN, in audited runs.
        transfer: Takes a step's arrays to the store's device; chosen by the device if omitted.

    Raises:
        UnsupportedBackend: The operator cannot be compiled for what the store holds.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: KVStore,
        *,
        layout: GroupLayout | None = None,
        operator: type[PagedOp] = CpuPagedOp,
        poison: Poison | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.layout = layout or one_group(model.geometry)
        self.operator = operator
        self._poison = poison
        self._transfer = transfer or transfer_to(store.keys.device)
        shape = model.geometry
        operator.get_ready(store.keys[0], model.dtype, shape.num_query_heads, shape.head_dim)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Move and copy, run the packed tokens through the model, draw a token per sample.

        Cost:
            Beside the model's own: a step's logits, one row of the vocabulary per draw and per
            prompt token that wants its log-probability. None is kept. On a GPU all arrays go
            there in one copy, and the host waits for nothing before it draws.
        """
        logits, observed = self.forward(plan)
        num_samples = len(plan.sample_index)
        result = sample(logits[:num_samples], plan.sampling)
        if plan.prompt_targets is not None:
            scores = score_prompt(logits[num_samples:], plan.prompt_targets)
            result = msgspec.structs.replace(result, prompt_logprobs=scores)
        return msgspec.structs.replace(result, observed=observed) if observed else result

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[torch.Tensor, list[Observed]]:
        """Carry a plan out up to its logits.

        Returns:
            The logits that its samples draw from and then those that predict its prompt targets,
            float32 [S + P, vocab]; and what was observed.
        """
        take = self._transfer.take
        step = PagedAttentionStep(
            plan, self.store, self.model.geometry, self.layout, self.operator, take
        )
        index = plan.sample_index
        if plan.prompt_targets is not None:
            index = np.append(index, plan.prompt_targets.index)
        token_ids, positions, logits_index = (
            take(array.astype(np.int64)) for array in (plan.token_ids, plan.positions, index)
        )
        rearrangement = _Rearrangement.of(plan, take)
        self._transfer.send()
        rearrangement.apply(self.store)
        if self._poison:
            self._poison.spread(plan)
        logits = forward(self.model, token_ids, positions, step, logits_index)
        return logits, step.observed()


class _Rearrangement(NamedTuple):
    """What a plan moves and copies before its tokens run: pairs of tensors, source and target."""

    moves: tuple[torch.Tensor, torch.Tensor] | None
    swap_out: tuple[torch.Tensor, torch.Tensor] | None
    swap_in: tuple[torch.Tensor, torch.Tensor] | None
    copies: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, plan: StepPlan, take: Send) -> "_Rearrangement":
        """Send what there is; blocks of host memory are named on the host."""
        here, there = torch.from_numpy, take

        def pair(pairs: Int64 | Int32, *sides: Send) -> tuple[torch.Tensor, torch.Tensor] | None:
            if not len(pairs):
                return None
            source, target = np.ascontiguousarray(pairs.T, np.int64)
            return sides[0](source), sides[1](target)

        return cls(
            moves=pair(plan.moves, there, there),
            swap_out=pair(plan.swap_out, there, here),
            swap_in=pair(plan.swap_in, here, there),
            copies=pair(plan.copies, there, there),
        )

    def apply(self, store: KVStore) -> None:
        """Do it, in the order that `StepPlan` gives."""
        if self.moves:
            store.move_slots(*self.moves)
        if self.swap_out:
            store.swap_out(*self.swap_out)
        if self.swap_in:
            store.swap_in(*self.swap_in)
        if self.copies:
            store.copy_blocks(*self.copies)
