"""From decisions to a plan: gathers what a step's sequences compute into packed arrays."""

from typing import NamedTuple

import numpy as np

from pagedkv.core.arrays import Int32, Int64, plan_width
from pagedkv.core.batch import Batch, Draws
from pagedkv.core.plan import PromptTargets, StepPlan
from pagedkv.core.positions import turns
from pagedkv.core.retention import Retention

__all__ = ["Decision", "build_plan", "drawing"]


class Decision(NamedTuple):
    """What the passes of a step came to.

    Attributes:
        step: Its number.
        batch: The rows that compute; their blocks reach as far as their new tokens.
        moves: [M, 2] Slots to copy first.
        swaps: Blocks that move to host memory next, and those that come back.
        copies: [C, 2] Blocks to copy after that.
    """

    step: int
    batch: Batch
    moves: Int64
    swaps: tuple[Int32, Int32]
    copies: Int32


def build_plan(retention: Retention, decision: Decision, draws: Draws) -> StepPlan:
    """Return the plan of a step; reads the state and changes nothing.

    Args:
        draws: The rows that draw a token.
    """
    step, batch, moves, swaps, copies = decision
    table, at = batch.table, batch.at
    width = plan_width(int(table.num_blocks[batch.groups, at].max(initial=0)))
    place, computed, position = (
        column[..., at] if batch.decodes else column[..., batch.token_rows] + batch.offset
        for column in (table.num_resident[batch.groups], table.num_computed, table.next_position)
    )
    return StepPlan(
        step=step,
        moves=moves,
        swap_out=swaps[0],
        swap_in=swaps[1],
        copies=copies,
        rows=batch.rows,
        seq_ids=batch.seq_ids,
        query_start=batch.start,
        token_ids=table.token_ids[batch.token_rows, computed],
        positions=position.copy(),
        slot_mapping=_slots(batch, place),
        block_table=table.block_table[:, at, :width].copy(),
        num_resident=table.num_resident[:, at] + batch.counts,
        turns=turns(batch, width),
        observations=retention.observations(batch, width),
        sample_index=draws.index,
        sample_rows=draws.rows,
        sampling=draws.sampling(),
        prompt_targets=_prompt_targets(batch),
    )


def _slots(batch: Batch, place: Int32) -> Int64:
    """Return the slots of tokens, [groups, T], from their places in their tables, [groups, T] or,
    where those are the same in every group, [1, T].
    """
    table = batch.table
    index = place // table.block_size
    if batch.decodes:  # into the last block: to look it up would touch all tables again
        blocks = table.tail[:, batch.at]
    else:
        # Flat, for looking up by group, row and index takes twice as long.
        entry = table.tables_of(batch.token_rows).reshape(table.num_groups, -1)
        blocks = table.block_table.reshape(-1).take(entry * table.block_table.shape[2] + index)
    # Gathered rows come out row after row; plans lie group after group.
    slots: Int64 = blocks.astype(np.int64, order="C")
    slots *= table.block_size
    slots += place - index * table.block_size
    return slots


def _prompt_targets(batch: Batch) -> PromptTargets | None:
    """Return the prompt tokens that tokens of a step predict and that want log-probabilities."""
    if batch.prompt_logprobs is None:
        return None
    table, row = batch.table, batch.token_rows
    place = table.num_computed[row] + batch.offset + 1
    wanted = (table.prompt_logprobs[row] >= 0) & (place < table.num_prompt[row])
    index = np.flatnonzero(wanted & (place > table.num_scored[row]))
    if not len(index):
        return None
    row, place = row[index], place[index]
    return PromptTargets(
        index=index.astype(np.int32),
        seq_ids=table.seq_id[row],
        place=place,
        token_ids=table.token_ids[row, place],
        num_logprobs=table.prompt_logprobs[row],
    )


def drawing(batch: Batch, siblings: dict[int, Int32]) -> Draws:
    """Return who draws: rows that reach their last known token, and siblings of their leader.

    Args:
        siblings: Rows that fork from a row once its prompt is computed, by that row.
    """
    if batch.holds and not siblings:
        return batch.draws
    table = batch.table
    done = table.num_computed[batch.at] + batch.counts == table.num_known[batch.at]
    rows, index = batch.rows[done], batch.start[1:][done] - 1
    for row, others in siblings.items():
        at = index[rows == row]
        if len(at):
            rows = np.append(rows, others)
            index = np.append(index, np.repeat(at, len(others)))
    return Draws(table, rows, index)
