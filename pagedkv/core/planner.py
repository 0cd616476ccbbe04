"""From decisions to a plan: gathers what a step's sequences compute into packed arrays."""

import numpy as np

from pagedkv.core.arrays import Int32, Int64, at_rows
from pagedkv.core.plan import PromptTargets, StepPlan
from pagedkv.core.positions import turns
from pagedkv.core.retention import Retention
from pagedkv.core.table import SequenceTable

__all__ = ["build_plan"]


def build_plan(
    step: int,
    table: SequenceTable,
    retention: Retention,
    rows: Int32,
    counts: Int32,
    moves: Int64,
    copies: Int32,
    swaps: tuple[Int32, Int32],
    siblings: dict[int, Int32],
) -> StepPlan:
    """Return the plan of a step; reads the state and changes nothing.

    Args:
        rows: [B] The rows that compute; their blocks reach as far as their new tokens.
        counts: [B] How many tokens each computes, at least 1.
        moves: [M, 2] Slots to copy first.
        swaps: Blocks that move to host memory next, and those that come back.
        copies: [C, 2] Blocks to copy after that.
        siblings: Rows that fork from a row once its prompt is computed, by that row.
    """
    start, member, offset = _packed(counts)
    row = rows[member]
    at = at_rows(rows)
    to = at if len(row) == len(rows) else row
    place = table.num_resident[:, to] + offset
    index = place // table.block_size
    groups = np.arange(table.num_groups)[:, None]
    blocks = table.block_table[groups, row, index].astype(np.int64)
    width = int(table.num_blocks[:, at].max(initial=0))
    done = table.num_computed[rows] + counts == table.num_known[rows]
    sample_rows, sample_index = _forked(rows[done], start[1:][done] - 1, siblings)
    return StepPlan(
        step=step,
        moves=moves,
        swap_out=swaps[0],
        swap_in=swaps[1],
        copies=copies,
        rows=rows,
        seq_ids=table.seq_id[rows],
        query_start=start,
        token_ids=table.token_ids[row, table.num_computed[row] + offset],
        positions=table.next_position[row] + offset,
        slot_mapping=(blocks - index) * table.block_size + place,
        block_table=table.block_table[:, at, :width].copy(),
        num_resident=table.num_resident[:, at] + counts,
        turns=turns(table, retention.rotates, rows, width),
        observations=retention.observations(rows, counts, width),
        sample_index=sample_index,
        sample_rows=sample_rows,
        sampling=table.sampling_batch(sample_rows),
        prompt_targets=_prompt_targets(table, rows, member, offset),
    )


def _packed(counts: Int32) -> tuple[Int32, Int64, Int32]:
    """Pack sequences of so many tokens one after the other.

    Returns:
        Where each begins, [B + 1]; and of each token the sequence it is of, and the place in it,
        [T] each.
    """
    start = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=start[1:])
    if start[-1] == len(counts):  # a token each, as all decode
        return start, np.arange(len(counts)), np.zeros(len(counts), np.int32)
    member = np.repeat(np.arange(len(counts)), counts)
    return start, member, (np.arange(len(member)) - start[member]).astype(np.int32)


def _prompt_targets(
    table: SequenceTable, rows: Int32, member: Int64, offset: Int32
) -> PromptTargets | None:
    """Return the prompt tokens that packed tokens [T] predict and that want log-probabilities."""
    if (table.prompt_logprobs[rows] < 0).all():
        return None
    row = rows[member]
    place = table.num_computed[row] + offset + 1
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


def _forked(rows: Int32, index: Int32, siblings: dict[int, Int32]) -> tuple[Int32, Int32]:
    """Let every sibling draw after the token that its leader draws after: [S] rows, [S] index."""
    for row, others in siblings.items():
        at = index[rows == row]
        if len(at):
            rows = np.append(rows, others)
            index = np.append(index, np.repeat(at, len(others)))
    return rows, index
