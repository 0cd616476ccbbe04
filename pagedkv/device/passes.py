"""A plan's queries over its tables: attention layer by layer, and what its observers see of it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pagedkv.core.arrays import Int32, Int64
from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observation, Observed, StepPlan
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.observer import LayerView, Observer
from pagedkv.device.operators import PagedBias, PagedOp, paged_attention
from pagedkv.device.quantize import dequantize
from pagedkv.device.send import Send, sender
from pagedkv.device.turned import TurnedBias
from pagedkv.device.turns import Turns

__all__ = ["Pass", "head_by_head"]


def head_by_head(x: Tensor, tables: int) -> Tensor:
    """Pack vectors table by table: [T, heads, d] to [tables * T, heads / tables, d]."""
    tokens, heads, dim = x.shape
    split = x.reshape(tokens, tables, heads // tables, dim)
    return split.transpose(0, 1).reshape(-1, heads // tables, dim)


class Pass:
    """Attends over the tables of a plan and lets observers look.

    Args:
        plan: Whose `query_start`, `block_table`, `num_resident` and `turns` say who sees what.
        observations: What to observe; empty runs the plain operator.
        block_size: Slots of an entry of the plan's tables; 1 if they list single slots.
        operator: The xformers operator to attend with.
        send: Puts arrays where the keys are; what every layer needs is sent by the constructor.
    """

    def __init__(
        self,
        plan: StepPlan,
        observations: list[Observation],
        block_size: int,
        geometry: ModelGeometry,
        layout: GroupLayout,
        operator: type[PagedOp],
        send: Send,
    ) -> None:
        self._plan = plan
        self._geometry = geometry
        self._layout = layout
        self._operator = operator
        self._send = send
        self._block_size = block_size
        self._tables = geometry.num_kv_heads // layout.heads_per_group  # per layer
        self._observers = [
            Observer(plan, layout, block_size, wanted, send) for wanted in observations
        ]
        self._biases = self._by_layer()

    def attend(
        self, layer_idx: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> Tensor:
        """Attend from T queries; their own keys and values are stored already.

        Args:
            layer_idx: The layer.
            query: [T, query_heads, head_dim]
            keys: [num_blocks, block_size, heads_per_group, head_dim] of the layer.
            values: The same shape.
            scaling: Of the scores.

        Returns:
            [T, query_heads, head_dim]
        """
        if self._tables > 1:
            query = head_by_head(query, self._tables)
        bias = self._biases[layer_idx]
        if isinstance(bias, TurnedBias):
            out = bias.attend(query, keys, values, scaling, self._operator)
        else:
            out = paged_attention(query, keys, values, bias, scaling, self._operator)
        for observer in self._observers:
            self._show(observer, layer_idx, bias, (query, keys, values, out), scaling)
        return self._token_by_token(out) if self._tables > 1 else out

    def observed(self) -> list[Observed]:
        """Return the answers to the observations, after the last layer."""
        return [observer.result() for observer in self._observers]

    def _token_by_token(self, x: Tensor) -> Tensor:
        """The inverse of `head_by_head`."""
        split = x.view(self._tables, -1, *x.shape[1:])
        return split.transpose(0, 1).reshape(split.shape[1], -1, x.shape[2])

    def _by_layer(self) -> list[PagedBias | TurnedBias]:
        """Make the biases, one for all layers that see the same the same way; each layer's."""
        plan, made, biases = self._plan, {}, []
        for layer, group in enumerate(self._layout.group_of):
            window = self._geometry.sliding_window[layer]
            # Layers of one group may rotate differently, and some of them not at all.
            angles = () if plan.turns is None else self._geometry.rope_frequencies[layer]
            key = group, window, angles
            if key not in made:
                groups, width = slice(group, group + self._tables), plan.block_table.shape[2]
                turns = None if plan.turns is None else plan.turns[groups].reshape(-1, width)
                bias = self._build(groups, window, self._turns(turns, layer, self._send))
                if isinstance(bias, TurnedBias):
                    bias.prepare(self._operator, self._send)
                else:
                    self._operator.prepare(bias, self._send)
                made[key] = bias
            biases.append(made[key])
        return biases

    def _build(self, groups: slice, window: int, turns: Turns | None) -> PagedBias | TurnedBias:
        plan = self._plan
        tables = plan.block_table[groups].reshape(-1, plan.block_table.shape[2])
        resident, want = plan.num_resident[groups].ravel(), bool(self._observers)
        start, size = self._query_start(), self._block_size
        if turns is None or self._operator.TURNS:
            return PagedBias.build(
                start,
                resident,
                tables,
                size,
                window=window,
                turns=turns,
                want_block_lse=want,
                send=self._send,
            )
        return TurnedBias(
            start, resident, tables, size, turns, want_block_lse=want, send=self._send
        )

    def _turns(self, turns: Int32 | None, layer: int, send: Send) -> Turns | None:
        geometry = self._geometry
        frequencies = geometry.rope_frequencies[layer]
        if turns is None or not frequencies or not turns.any():
            return None
        return Turns(turns, frequencies, interleaved=geometry.rope_interleaved, send=send)

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
        tables, tokens = self._tables, len(query) // self._tables
        first = self._layout.group_of[layer]
        heads, width = bias.block_lse.shape[1:]
        block_lse = bias.block_lse.view(tables, tokens, heads, width)
        lse = bias.lse.view(heads, tables, tokens)
        observer.take(block_lse, lse)
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
                head_dim=query.shape[-1],
            )
            observer.examine(first + table, view)

    def _standing(self, layer: int, table: int) -> Callable[[int, Tensor], Tensor]:
        """Return what turns keys to where their blocks stand now, as `LayerView` says."""

        def standing(member: int, keys: Tensor) -> Tensor:
            plan, group = self._plan, self._layout.group_of[layer] + table
            if plan.turns is None:
                return keys
            # A block's queries are turned forward by what its keys lack, so keys turn back.
            own = -plan.turns[group, member : member + 1, : len(keys)]
            send = sender(keys.device)
            turns = self._turns(own, layer, send)
            if turns is None:
                return keys
            return turns.apply(keys, send(turns.index[0].astype(np.int64)))

        return standing

    def _errors(
        self,
        layer: int,
        table: int,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        scaling: float,
    ) -> Callable[[Int64], Tensor]:
        """Return what gives |o - o_b| for packed tokens: every (token, block) attends by itself."""
        if self._block_size == 1:
            return self._token_errors(layer, table, tensors)

        def errors(tokens: Int64) -> Tensor:
            query, keys, values, out = tensors
            send = sender(query.device)
            plan, width = self._plan, self._plan.block_table.shape[2]
            group = self._layout.group_of[layer] + table
            member = np.searchsorted(plan.query_start, tokens, side="right") - 1
            at = send(tokens)
            blocks = plan.block_table[group, member].reshape(-1, 1)
            asked = query.index_select(0, at).repeat_interleave(width, dim=0)
            turns = None if plan.turns is None else plan.turns[group, member].reshape(-1, 1)
            turned = self._turns(turns, layer, send)
            if turned is not None:
                asked = turned.apply(asked, send(turned.index[:, 0].astype(np.int64)))
            pairs = PagedBias.build(
                np.arange(len(blocks) + 1, dtype=np.int32),
                np.full(len(blocks), self._block_size, np.int32),
                blocks,
                self._block_size,
                send=send,
            )
            alone = paged_attention(asked, keys, values, pairs, scaling, self._operator)
            whole = out.index_select(0, at).unsqueeze(1)
            apart = alone.view(len(tokens), width, *out.shape[1:]) - whole
            norms: Tensor = apart.float().norm(dim=-1).transpose(1, 2)
            return norms.nan_to_num(0.0)  # entries past a table's end hold anything

        return errors

    def _token_errors(
        self, layer: int, table: int, tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Callable[[Int64], Tensor]:
        """The same for single slots: what attends to one slot alone gets its value.

        Differences are taken element by element: |o|^2 - 2 o v + |v|^2 would lose what is left
        where one token has nearly all the mass.
        """

        def errors(tokens: Int64) -> Tensor:
            _, _, values, out = tensors
            send = sender(out.device)
            plan, heads, dim = self._plan, values.shape[2], out.shape[2]
            tables = plan.block_table[self._layout.group_of[layer] + table]
            member = np.searchsorted(plan.query_start, tokens, side="right") - 1
            asking, begin, counts = np.unique(member, return_index=True, return_counts=True)
            shape = len(tokens), out.shape[1], tables.shape[1]
            norms = torch.zeros(shape, dtype=torch.float32, device=out.device)
            for count in np.unique(counts).tolist():  # decode rows in one call
                these = counts == count
                places = begin[these][:, None] + np.arange(count)
                at, mine = send(places), send(tables[asking[these]].astype(np.int64))
                alone = dequantize(values[mine, 0], dim).transpose(1, 2)
                whole = out[send(tokens[places])].float()
                asked = whole.reshape(*at.shape, heads, -1, dim).transpose(1, 2)
                apart = torch.cdist(
                    asked.reshape(*asked.shape[:2], -1, dim),
                    alone,
                    compute_mode="donot_use_mm_for_euclid_dist",
                )
                shaped = apart.reshape(len(at), heads, count, -1, tables.shape[1]).transpose(1, 2)
                norms[at] = shaped.reshape(*at.shape, -1, tables.shape[1])
            return norms.nan_to_num(0.0)  # entries past a table's end hold anything

        return errors
