"""Carries out step plans with torch."""

import msgspec
import torch

from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observed, StepPlan, StepResult
from pagedkv.device.attention import PagedAttentionStep
from pagedkv.device.bridge import forward
from pagedkv.device.models import LoadedModel
from pagedkv.device.operators import CpuPagedOp
from pagedkv.device.sampling import sample
from pagedkv.device.store import KVStore, one_group

__all__ = ["TorchExecutor"]


class TorchExecutor:
    """Runs plans on a model and a KV store; holds no state of any sequence besides the store.

    Args:
        model: What `load_model` gave.
        store: Blocks for at least as many ids as the scheduler hands out.
        layout: The scheduler's groups; one for everything if omitted.
        operator: The xformers operator that attends.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: KVStore,
        *,
        layout: GroupLayout | None = None,
        operator: type = CpuPagedOp,
    ) -> None:
        self.model = model
        self.store = store
        self.layout = layout or one_group(model.geometry)
        self.operator = operator

    def execute(self, plan: StepPlan) -> StepResult:
        """Copy blocks, run the packed tokens through the model, draw a token per sample."""
        if len(plan.copies):
            copies = torch.from_numpy(plan.copies).long()
            self.store.copy_blocks(copies[:, 0], copies[:, 1])
        logits, observed = self.forward(plan)
        result = sample(logits, plan.sampling)
        return msgspec.structs.replace(result, observed=observed) if observed else result

    def forward(self, plan: StepPlan) -> tuple[torch.Tensor, list[Observed]]:
        """Run a plan's tokens through the model.

        Returns:
            The logits that its samples draw from, float32 [S, vocab], and what was observed.
        """
        step = PagedAttentionStep(plan, self.store, self.model.geometry, self.layout, self.operator)
        logits = forward(
            self.model,
            torch.from_numpy(plan.token_ids).long(),
            torch.from_numpy(plan.positions).long(),
            step,
            torch.from_numpy(plan.sample_index).long(),
        )
        return logits, step.observed()
