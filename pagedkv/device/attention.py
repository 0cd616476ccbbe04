"""One step's attention: what every layer of a forward shares."""

import torch
from torch import Tensor

from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observed, StepPlan
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.operators import CpuPagedOp, PagedOp
from pagedkv.device.passes import Pass, head_by_head
from pagedkv.device.send import Send
from pagedkv.device.single import token_pass
from pagedkv.device.store import KVStore

__all__ = ["PagedAttentionStep"]


class PagedAttentionStep:
    """Writes each layer's keys and values to their slots, then attends over the block tables.

    What depends on the plan and a group alone is made once per step. Where every KV head has a
    table of its own, each (head, sequence) is one sequence of a batch that is packed head by head.

    Policies that rank tokens are told by a second pass over the queries that they listen to, with
    single slots for blocks. So the attention that the model goes on with is the same whether or
    not somebody listens.

    Args:
        plan: The step; its arrays are shared, not copied.
        operator: The xformers operator to attend with.
        send: Puts arrays where the store is. All of a step's are put there here, so that none is
            left for `attend`.
    """

    def __init__(
        self,
        plan: StepPlan,
        store: KVStore,
        geometry: ModelGeometry,
        layout: GroupLayout,
        operator: type[PagedOp] = CpuPagedOp,
        send: Send = torch.from_numpy,
    ) -> None:
        self._plan = plan
        self._store = store
        self._layout = layout
        block_size = store.block_size
        self._tables = geometry.num_kv_heads // layout.heads_per_group  # per layer
        slots = send(plan.slot_mapping)
        firsts = sorted(set(layout.group_of))
        self._slots = {group: slots[group : group + self._tables].view(-1) for group in firsts}
        by_block = [wanted for wanted in plan.observations if wanted.unit == "block"]
        self._blocks = Pass(plan, by_block, block_size, geometry, layout, operator, send)
        self._tokens = [
            token_pass(plan, wanted, block_size, geometry, layout, operator, send)
            for wanted in plan.observations
            if wanted.unit == "token"
        ]

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store T tokens' keys and values, then attend; shapes as in `bridge.AttentionStep`."""
        group, slot = self._layout.group_of[layer_idx], self._layout.slot_of[layer_idx]
        if self._tables > 1:
            key, value = (head_by_head(x, self._tables) for x in (key, value))
        self._store.write(slot, self._slots[group], key, value)
        keys, values = self._store.layers[slot]
        out = self._blocks.attend(layer_idx, query, keys, values, scaling)
        for listening, tokens in self._tokens:
            by_slot = -1, 1, *keys.shape[2:]
            asked = query.index_select(0, tokens)
            listening.attend(layer_idx, asked, keys.view(by_slot), values.view(by_slot), scaling)
        return out

    def observed(self) -> list[Observed]:
        """Return the answers to the plan's observations, after the last layer."""
        by_block = iter(self._blocks.observed())
        by_token = iter([answer for each, _ in self._tokens for answer in each.observed()])
        return [
            next(by_token if wanted.unit == "token" else by_block)
            for wanted in self._plan.observations
        ]
