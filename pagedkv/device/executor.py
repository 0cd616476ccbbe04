"""Carries out step plans with torch."""

import msgspec
import numpy as np
import torch

from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observed, StepPlan, StepResult
from pagedkv.device.attention import PagedAttentionStep
from pagedkv.device.bridge import forward
from pagedkv.device.models import LoadedModel
from pagedkv.device.operators import CpuPagedOp, PagedOp
from pagedkv.device.poison import Poison
from pagedkv.device.prompt_scores import score_prompt
from pagedkv.device.sampling import sample
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
    ) -> None:
        self.model = model
        self.store = store
        self.layout = layout or one_group(model.geometry)
        self.operator = operator
        self._poison = poison
        shape = model.geometry
        operator.get_ready(store.keys[0], model.dtype, shape.num_query_heads, shape.head_dim)

    def execute(self, plan: StepPlan) -> StepResult:
        """Move and copy, run the packed tokens through the model, draw a token per sample.

        Cost:
            Beside the model's own: a step's logits, one row of the vocabulary per draw and per
            prompt token that wants its log-probability. None is kept.
        """
        if len(plan.moves):
            moves = torch.from_numpy(plan.moves)
            self.store.move_slots(moves[:, 0], moves[:, 1])
        if len(plan.swap_out):
            self.store.swap_out(*torch.from_numpy(plan.swap_out).long().T)
        if len(plan.swap_in):
            self.store.swap_in(*torch.from_numpy(plan.swap_in).long().T)
        if len(plan.copies):
            copies = torch.from_numpy(plan.copies).long()
            self.store.copy_blocks(copies[:, 0], copies[:, 1])
        if self._poison:
            self._poison.spread(plan)
        logits, observed = self.forward(plan)
        num_samples = len(plan.sample_index)
        result = sample(logits[:num_samples], plan.sampling)
        if plan.prompt_targets is not None:
            scores = score_prompt(logits[num_samples:], plan.prompt_targets)
            result = msgspec.structs.replace(result, prompt_logprobs=scores)
        return msgspec.structs.replace(result, observed=observed) if observed else result

    def forward(self, plan: StepPlan) -> tuple[torch.Tensor, list[Observed]]:
        """Run a plan's tokens through the model.

        Returns:
            The logits that its samples draw from and then those that predict its prompt targets,
            float32 [S + P, vocab]; and what was observed.
        """
        step = PagedAttentionStep(plan, self.store, self.model.geometry, self.layout, self.operator)
        index = plan.sample_index
        if plan.prompt_targets is not None:
            index = np.append(index, plan.prompt_targets.index)
        logits = forward(
            self.model,
            torch.from_numpy(plan.token_ids).long(),
            torch.from_numpy(plan.positions).long(),
            step,
            torch.from_numpy(index).long(),
        )
        return logits, step.observed()
