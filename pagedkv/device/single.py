"""Listening by token: a pass over single slots for the queries that somebody wants to hear."""

import msgspec
import numpy as np
from torch import Tensor

from pagedkv.core.arrays import Int32
from pagedkv.core.groups import GroupLayout
from pagedkv.core.plan import Observation, StepPlan
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.operators import PagedOp
from pagedkv.device.passes import Pass
from pagedkv.device.send import Send

__all__ = ["token_pass"]


def token_pass(
    plan: StepPlan,
    wanted: Observation,
    block_size: int,
    geometry: ModelGeometry,
    layout: GroupLayout,
    operator: type[PagedOp],
    send: Send,
) -> tuple[Pass, Tensor]:
    """Return the pass that answers an observation by token, and the queries it takes: int64 [N].

    It sees the sequences that the observation names, from the first of their tokens that observes,
    and the last in any case, whose mass is always wanted. Their keys must not need turning: who
    evicts by token keeps the original positions.

    Cost: as much attention again for these queries, and fp32 [N, query heads, slots] a layer.
    """
    members, first = wanted.members, wanted.first_query
    counts = np.diff(plan.query_start)[members]
    skipped = np.minimum(first, counts - 1)
    left = counts - skipped
    start = np.append(0, np.cumsum(left)).astype(np.int32)
    begin = plan.query_start[:-1][members] + skipped
    member = np.repeat(np.arange(len(members)), left)
    tokens = begin[member] + np.arange(len(member)) - start[member]
    narrowed = msgspec.structs.replace(
        plan,
        query_start=start,
        block_table=_slots(plan.block_table[:, members], block_size, wanted.width),
        num_resident=np.ascontiguousarray(plan.num_resident[:, members]),
        turns=None,
    )
    heard = msgspec.structs.replace(
        wanted,
        members=np.arange(len(members), dtype=np.int32),
        first_query=(first - skipped).astype(np.int32),
    )
    listening = Pass(narrowed, [heard], 1, geometry, layout, operator.by_slot(), send)
    return listening, send(tokens.astype(np.int64))


def _slots(block_table: Int32, block_size: int, width: int) -> Int32:
    """Return tables that list the slots of blocks: [G, M, W] to [G, M, width]."""
    entry, within = np.divmod(np.arange(width, dtype=np.int32), np.int32(block_size))
    slots: Int32 = block_table[:, :, entry] * np.int32(block_size) + within
    return slots
