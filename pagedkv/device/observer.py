"""What eviction is told: attention mass and its relatives, by block or token, from the attention.

Every number is defined in `pagedkv.eviction.scores`. Mass comes from the log-sum-exps that the
operator writes as it goes: ``exp(lse_b - lse)`` is exactly the softmax mass of a block, so no
attention matrix is ever formed.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pagedkv.core.arrays import Float32, Int64
from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observation, Observed, StepPlan
from pagedkv.device.quantize import dequantize
from pagedkv.device.send import Send, sender
from pagedkv.device.staging import fetch

__all__ = ["LayerView", "Observer"]

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda mass: mass.sum(dim=1),
    "mean": lambda mass: mass.sum(dim=1),  # divided once, after the last layer
    "max": lambda mass: mass.amax(dim=1),
}


# Floats that may wait before they are turned into masses: a few MiB, and many layers of a decode.
_MOST_PENDING = 2**20


class LayerView:
    """One layer's attention over one group's tables, as observers that look closer see it.

    Attributes:
        block_lse: fp32 [T, H, W] Log-sum-exp of each query's scores over each table entry.
        lse: fp32 [H, T] Over all that the query sees.
        block_error: Given packed tokens, int64 [N] on the host, the norms |o - o_b| for each
            entry: fp32 [N, H, W].
        standing: Given one of the plan's sequences and the fp32 keys [E, block_size, heads,
            head_dim] of its table's first E entries, the keys turned to where the blocks stand
            now; up to a rotation that all of them share.
        keys: [num_blocks, block_size, heads, head_dim] of this layer.
        values: The same of values.
        head_dim: Numbers of a key; rows of packed ones are shorter.
    """

    __slots__ = ("block_error", "block_lse", "head_dim", "keys", "lse", "standing", "values")

    def __init__(
        self,
        *,
        block_lse: Tensor,
        lse: Tensor,
        block_error: Callable[[Int64], Tensor],
        standing: Callable[[int, Tensor], Tensor],
        keys: Tensor,
        values: Tensor,
        head_dim: int,
    ) -> None:
        self.block_lse = block_lse
        self.lse = lse
        self.block_error = block_error
        self.standing = standing
        self.keys = keys
        self.values = values
        self.head_dim = head_dim


class Observer:
    """Gathers one `Observation` of a step, layer by layer.

    Sums over queries are taken once all layers of a group are in, because what is reduced over
    heads and layers first need not be linear. In a layer little more is done than to keep what it
    gave: many small calls would cost a decode step more than all of their arithmetic.
    """

    def __init__(
        self,
        plan: StepPlan,
        layout: GroupLayout,
        block_size: int,
        wanted: Observation,
        send: Send,
    ) -> None:
        start = plan.query_start[:-1][wanted.members] + wanted.first_query
        end = plan.query_start[1:][wanted.members]
        count = end - start
        self._kind, self._gqa = wanted.kind, wanted.gqa
        self._block_size = block_size
        self._layers = layout.slot_layers
        self._member = np.repeat(np.arange(len(count)), count)
        offset = np.arange(len(self._member)) - np.repeat(np.cumsum(count) - count, count)
        tokens = (start[self._member] + offset).astype(np.int64)
        self._places, self._tokens = tokens, send(tokens)
        # [G, N]: the index of each observing query among its sequence's resident tokens
        before_end = end[self._member] - tokens
        self._index = plan.num_resident[:, wanted.members][:, self._member] - before_end
        groups, width = plan.num_resident.shape[0], plan.block_table.shape[2]
        self._members = wanted.members.tolist()
        self._table = plan.block_table[:, wanted.members]
        self._sealed = plan.num_resident[:, wanted.members] // block_size
        step = np.diff(plan.query_start)[wanted.members]
        self._sealed_before = (plan.num_resident[:, wanted.members] - step) // block_size
        # By query only where a group's layers come one after the other: there are few groups then.
        device = self._tokens.device
        rows = groups if self._layers > 1 else 0
        self._seen = torch.zeros((rows, len(tokens), width), dtype=torch.float32, device=device)
        self._mass = torch.zeros((groups, len(count), width), dtype=torch.float32, device=device)
        self._static = torch.zeros((groups, len(count), width), dtype=torch.float32, device=device)
        self._values = np.zeros((groups, len(count), width), np.float32)
        # The tables that each layer is about, in the order in which layers come.
        tables = np.arange(groups * self._layers // len(layout.group_of))
        self._groups = np.array(layout.group_of, np.int64)[:, None] + tables
        self._groups_there = send(self._groups)
        self._num_layers = 0
        self._ask(tokens, (end - 1).astype(np.int64), int(plan.query_start[-1]), send)

    def _ask(self, tokens: Int64, last: Int64, num_tokens: int, send: Send) -> None:
        """Settle which queries' masses are looked at: all that observe, and each one's last."""
        asked = last if self.looks_closer else np.union1d(tokens, last)
        # None stands for all, in order.
        self._asked = None if len(asked) == num_tokens else send(asked)
        self._last = _places(asked, last, send)
        self._adds = len(tokens) > 0 and not self.looks_closer
        self._observing = _places(asked, tokens, send) if self._adds else None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._num_pending = 0

    @property
    def looks_closer(self) -> bool:
        """Whether `examine` is to be called as well."""
        return self._kind in _STATIC or self._kind == "lobo_sum"

    def take(self, block_lse: Tensor, lse: Tensor) -> None:
        """Take in the masses of one layer; once per layer, after its attention ran.

        What is given may be kept, and must not change afterwards.

        Args:
            block_lse: fp32 [tables, T, H, W] Log-sum-exp of each query's scores over each entry.
            lse: fp32 [H, tables, T] Over all that the query sees.
        """
        if self._asked is not None:
            block_lse = block_lse.index_select(1, self._asked)
            lse = lse.index_select(2, self._asked)
        self._pending.append((block_lse, lse))
        self._num_pending += block_lse.numel()
        if self._num_pending > _MOST_PENDING:
            self._settle()

    def _settle(self) -> None:
        """Turn what layers left into masses, and add them up: [tables, N, H, W] at once."""
        if not self._pending:
            return
        blocks, lses = zip(*self._pending, strict=True)
        layers = slice(self._num_layers, self._num_layers + len(blocks))
        self._pending, self._num_pending, self._num_layers = [], 0, layers.stop
        groups = self._groups_there[layers].view(-1)
        lse = torch.cat(lses, dim=1).permute(1, 2, 0).unsqueeze(3)
        mass = torch.cat(blocks).sub_(lse).exp_()
        last = _picked(mass, self._last)
        self._mass.index_add_(0, groups, last.mean(dim=2) / self._layers)
        if self._adds:
            self._add(self._groups[layers].ravel(), groups, _picked(mass, self._observing))

    def _add(self, here: Int64, groups: Tensor, mass: Tensor) -> None:
        """Reduce masses [tables, N, H, W] over heads and add them to what was seen.

        Args:
            here: [tables] Whose they are.
            groups: The same, where the masses are.
            mass: [tables, N, H, W]
        """
        self._heads = mass.shape[2] * self._layers
        heads = self._heads if self._gqa == "mean" else 1
        seen = mass.amax(dim=2) if self._gqa == "max" else mass.sum(dim=2) / heads
        if self._layers == 1:  # nothing is to come for these groups: keep no more than their sums
            self._values[here] = self._heard(here, fetch(seen))
        elif self._gqa == "max":
            self._seen.scatter_reduce_(0, groups[:, None, None].expand_as(seen), seen, "amax")
        else:
            self._seen.index_add_(0, groups, seen)

    def examine(self, group: int, layer: LayerView) -> None:
        """Look at more of a table in one layer than masses; where `looks_closer`."""
        if self._kind in _STATIC:
            self._take_static(group, layer)
        elif len(self._places):
            mass = _mass(layer, self._tokens)
            ratio = mass / (1 - mass).clamp_min(1e-6)
            error = ratio * layer.block_error(self._places)
            here = np.array([group])
            self._add(here, sender(error.device)(here), error[None])

    def _take_static(self, group: int, layer: LayerView) -> None:
        fresh = np.arange(self._table.shape[2])
        fresh_at = (fresh >= self._sealed_before[group][:, None]) & (
            fresh < self._sealed[group][:, None]
        )
        for member in np.flatnonzero(fresh_at.any(axis=1)).tolist():
            entries = np.flatnonzero(fresh_at[member])
            send = sender(layer.keys.device)
            table = send(self._table[group, member, : int(entries[-1]) + 1].astype(np.int64))
            at = send(entries)
            values = _STATIC[self._kind](layer, self._members[member], table, at)
            reduced, known = _REDUCE[self._gqa](values), self._static[group, member]
            if self._gqa == "max":
                before = known.index_select(0, at)
                best = torch.where(before == 0, reduced, torch.maximum(before, reduced))
                known.index_copy_(0, at, best)
            else:
                heads = values.shape[1] * self._layers if self._gqa == "mean" else 1
                known.index_add_(0, at, reduced / heads)

    def result(self) -> Observed:
        """Return what was observed, once every layer was taken in."""
        self._settle()
        if self._kind in _STATIC:
            self._values = fetch(self._static)
        elif self._layers > 1 and len(self._places):
            self._values = self._heard(np.arange(len(self._index)), fetch(self._seen))
        return Observed(values=self._values, mass=fetch(self._mass))

    def _heard(self, groups: Int64, seen: Float32) -> Float32:
        """Turn reduced masses by query into what the kind names: [G, N, W] to [G, M, W]."""
        index, size = self._index[groups][:, :, None], np.float32(self._block_size)
        whole = np.arange(1, seen.shape[2] + 1) * self._block_size - 1 <= index
        visible = (index + 1).astype(np.float32)
        seen = np.where(whole, seen, np.float32(0))
        if self._kind.startswith("lift"):
            seen = seen * (visible / size)
        elif self._kind == "mass_low":
            scale = self._heads if self._gqa == "sum" else 1
            seen = (whole & (seen * visible < scale * size)).astype(np.float32)
        return self._over_queries(seen)

    def _over_queries(self, seen: Float32) -> Float32:
        """Reduce [G, N, W] over the queries of each member: [G, M, W]."""
        values = np.zeros((len(seen), *self._mass.shape[1:]), np.float32)
        present, begin = np.unique(self._member, return_index=True)
        if self._kind == "mass_last":
            ends = np.append(begin[1:], len(self._member)) - 1
            values[:, present] = seen[:, ends]
        elif self._kind.endswith("max"):
            values[:, present] = np.maximum.reduceat(seen, begin, axis=1)
        else:
            values[:, present] = np.add.reduceat(seen, begin, axis=1)
        return values


def _places(asked: Int64, tokens: Int64, send: Send) -> Tensor | None:
    """Return where tokens stand among the asked; None if they are all of them."""
    if np.array_equal(asked, tokens):
        return None
    return send(np.searchsorted(asked, tokens))


def _picked(mass: Tensor, places: Tensor | None) -> Tensor:
    return mass if places is None else mass.index_select(1, places)


def _mass(layer: LayerView, tokens: Tensor) -> Tensor:
    """Return each table entry's share of the softmax: fp32 [N, H, W]."""
    lse = layer.lse.index_select(1, tokens).t()
    return torch.exp(layer.block_lse.index_select(0, tokens) - lse.unsqueeze(2))


def _key_norm(layer: LayerView, _: int, table: Tensor, entries: Tensor) -> Tensor:
    """Mean over a block's tokens of |k|: [E, heads]."""
    norms: Tensor = dequantize(layer.keys[table[entries]], layer.head_dim).norm(dim=-1)
    return norms.mean(dim=1)


def _value_key_norm(layer: LayerView, _: int, table: Tensor, entries: Tensor) -> Tensor:
    """Mean over a block's tokens of |v| / |k|: [E, heads]."""
    keys: Tensor = dequantize(layer.keys[table[entries]], layer.head_dim).norm(dim=-1)
    values: Tensor = dequantize(layer.values[table[entries]], layer.head_dim).norm(dim=-1)
    return (values / keys.clamp_min(1e-12)).mean(dim=1)


def _key_diff(layer: LayerView, member: int, table: Tensor, entries: Tensor) -> Tensor:
    """Mean cosine of a block's keys to the mean unit key up to it: [E, heads].

    Keys that were written before and after an eviction were rotated from different origins, so
    they are compared where they stand now.
    """
    known = dequantize(layer.keys[table], layer.head_dim)
    unit = torch.nn.functional.normalize(layer.standing(member, known), dim=-1)
    mean = torch.nn.functional.normalize(unit.sum(dim=1).cumsum(dim=0), dim=-1)
    return (unit[entries] * mean[entries].unsqueeze(1)).sum(dim=-1).mean(dim=1)


_STATIC: dict[str, Callable[[LayerView, int, Tensor, Tensor], Tensor]] = {
    "key_norm": _key_norm,
    "value_key_norm": _value_key_norm,
    "key_diff": _key_diff,
}
