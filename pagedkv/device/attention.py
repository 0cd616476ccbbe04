"""One step's attention: what every layer of a forward shares."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pagedkv.core.arrays import Int32
from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observed, StepPlan
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.observer import LayerView, Observer
from pagedkv.device.operators import CpuPagedOp, PagedBias, paged_attention
from pagedkv.device.store import KVStore
from pagedkv.device.turned import TurnedBias
from pagedkv.device.turns import Turns

__all__ = ["PagedAttentionStep"]


class PagedAttentionStep:
    """Writes each layer's keys and values to their slots, then attends over the block tables.

    What depends on the plan and a group alone is made once per step. Where every KV head has a
    table of its own, each (head, sequence) is one sequence of a batch that is packed head by head.

    Args:
        plan: The step; its arrays are shared, not copied.
        operator: The xformers operator to attend with.
    """

    def __init__(
        self,
        plan: StepPlan,
        store: KVStore,
        geometry: ModelGeometry,
        layout: GroupLayout,
        operator: type = CpuPagedOp,
    ) -> None:
        self._plan = plan
        self._store = store
        self._geometry = geometry
        self._layout = layout
        self._operator = operator
        self._block_size = store.keys.shape[2]
        self._tables = geometry.num_kv_heads // layout.heads_per_group  # per layer
        self._biases: dict[tuple[int, int, tuple[float, ...]], PagedBias | TurnedBias] = {}
        self._slots: dict[int, Tensor] = {}
        self._observers = [
            Observer(plan, layout, self._block_size, wanted) for wanted in plan.observations
        ]

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store T tokens' keys and values, then attend; shapes as in `bridge.AttentionStep`."""
        group, slot = self._layout.group_of[layer_idx], self._layout.slot_of[layer_idx]
        if self._tables > 1:
            query, key, value = (self._head_by_head(x) for x in (query, key, value))
        self._store.write(slot, self._slots_of(group), key, value)
        bias = self._bias(group, layer_idx)
        keys, values = self._store.keys[slot], self._store.values[slot]
        if isinstance(bias, TurnedBias):
            out = bias.attend(query, keys, values, scaling, self._operator)
        else:
            out = paged_attention(query, keys, values, bias, scaling, self._operator)
        for observer in self._observers:
            self._show(observer, layer_idx, bias, (query, keys, values, out), scaling)
        if self._tables > 1:
            out = self._token_by_token(out)
        return out

    def observed(self) -> list[Observed]:
        """Return the answers to the plan's observations, after the last layer."""
        return [observer.result() for observer in self._observers]

    def _head_by_head(self, x: Tensor) -> Tensor:
        """[T, heads, d] to [tables * T, heads / tables, d]."""
        tokens, heads, dim = x.shape
        split = x.reshape(tokens, self._tables, heads // self._tables, dim)
        return split.transpose(0, 1).reshape(-1, heads // self._tables, dim)

    def _token_by_token(self, x: Tensor) -> Tensor:
        """The inverse of `_head_by_head`."""
        split = x.view(self._tables, -1, *x.shape[1:])
        return split.transpose(0, 1).reshape(split.shape[1], -1, x.shape[2])

    def _slots_of(self, group: int) -> Tensor:
        if group not in self._slots:
            slots = self._plan.slot_mapping[group : group + self._tables].ravel()
            self._slots[group] = torch.from_numpy(slots)
        return self._slots[group]

    def _bias(self, group: int, layer: int) -> PagedBias | TurnedBias:
        window = self._geometry.sliding_window[layer]
        # Layers of one group may rotate differently, and some of them not at all.
        angles = () if self._plan.turns is None else self._geometry.rope_frequencies[layer]
        key = group, window, angles
        if key not in self._biases:
            plan, groups = self._plan, slice(group, group + self._tables)
            width = plan.block_table.shape[2]
            turns = None if plan.turns is None else plan.turns[groups].reshape(-1, width)
            self._biases[key] = self._build(groups, window, self._turns(turns, layer))
        return self._biases[key]

    def _build(self, groups: slice, window: int, turns: Turns | None) -> PagedBias | TurnedBias:
        plan = self._plan
        tables = plan.block_table[groups].reshape(-1, plan.block_table.shape[2])
        resident, want = plan.num_resident[groups].ravel(), bool(self._observers)
        start, size = self._query_start(), self._block_size
        if turns is None:
            return PagedBias.build(
                start, resident, tables, size, window=window, want_block_lse=want
            )
        return TurnedBias(start, resident, tables, size, turns, want_block_lse=want)

    def _turns(self, turns: Int32 | None, layer: int) -> Turns | None:
        geometry = self._geometry
        frequencies = geometry.rope_frequencies[layer]
        if turns is None or not frequencies or not turns.any():
            return None
        return Turns(turns, frequencies, interleaved=geometry.rope_interleaved)

    def _query_start(self) -> Int32:
        start = self._plan.query_start
        heads = np.arange(self._tables, dtype=np.int32)[:, None] * start[-1]
        return np.append((heads + start[:-1]).ravel(), start[-1] * self._tables).astype(np.int32)

    def _show(
        self,
        observer: Observer,
        layer: int,
        bias: PagedBias | TurnedBias,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        scaling: float,
    ) -> None:
        """Let an observer look at a layer, table by table."""
        query, keys, values, out = tensors
        assert bias.block_lse is not None
        assert bias.lse is not None
        tables, tokens, first = self._tables, self._plan.num_tokens, self._layout.group_of[layer]
        heads, width = bias.block_lse.shape[1:]
        block_lse = bias.block_lse.view(tables, tokens, heads, width)
        lse = bias.lse.view(heads, tables, tokens)
        observer.take(first, block_lse, lse)
        for table in range(tables if observer.looks_closer else 0):
            part = slice(table * tokens, (table + 1) * tokens)
            own = query[part], keys, values, out[part]
            view = LayerView(
                block_lse=block_lse[table],
                lse=lse[:, table],
                block_error=self._errors(layer, table, own, scaling),
                standing=self._standing(layer, table),
                keys=keys,
                values=values,
            )
            observer.examine(first + table, view)

    def _standing(self, layer: int, table: int) -> Callable[[int, Tensor], Tensor]:
        """Return what turns keys to where their blocks stand now, as `LayerView` says."""

        def standing(member: int, keys: Tensor) -> Tensor:
            plan, group = self._plan, self._layout.group_of[layer] + table
            if plan.turns is None:
                return keys
            # A block's queries are turned forward by what its keys lack, so keys turn back.
            turns = self._turns(-plan.turns[group, member : member + 1, : len(keys)], layer)
            if turns is None:
                return keys
            return turns.apply(keys, torch.from_numpy(turns.index[0].astype(np.int64)))

        return standing

    def _errors(
        self,
        layer: int,
        table: int,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        scaling: float,
    ) -> Callable[[Tensor], Tensor]:
        """Return what gives |o - o_b| for packed tokens: every (token, block) attends by itself."""

        def errors(tokens: Tensor) -> Tensor:
            query, keys, values, out = tensors
            plan, width = self._plan, self._plan.block_table.shape[2]
            group = self._layout.group_of[layer] + table
            member = np.searchsorted(plan.query_start, tokens.numpy(), side="right") - 1
            blocks = plan.block_table[group, member].reshape(-1, 1)
            asked = query[tokens].repeat_interleave(width, dim=0)
            turns = None if plan.turns is None else plan.turns[group, member].reshape(-1, 1)
            turned = self._turns(turns, layer)
            if turned is not None:
                rows = torch.from_numpy(turned.index[:, 0].astype(np.int64))
                asked = turned.apply(asked, rows)
            pairs = PagedBias.build(
                np.arange(len(blocks) + 1, dtype=np.int32),
                np.full(len(blocks), self._block_size, np.int32),
                blocks,
                self._block_size,
            )
            alone = paged_attention(asked, keys, values, pairs, scaling, self._operator)
            apart = alone.view(len(tokens), width, *out.shape[1:]) - out[tokens].unsqueeze(1)
            norms: Tensor = apart.float().norm(dim=-1).transpose(1, 2)
            return norms.nan_to_num(0.0)  # entries past a table's end hold anything

        return errors
