"""Many steps as one: a step's decision, for as long as the scheduler would decide the same.

A leap begins as any step does, with the passes of the scheduler: who goes on, who enters, who is
pushed back. Then, as long as nothing else can happen, every sequence that draws goes on drawing,
and a prompt that fills the token budget goes on filling it. It ends when somebody does.

Whoever knows the tokens beforehand (a simulator, a replay) need not plan each of these steps. This
is a part of the scheduler in a file of its own, and knows its insides.
"""

from bisect import bisect_left

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Int32, Int64
from pagedkv.core.batch import Batch
from pagedkv.core.manager import BlockManager
from pagedkv.core.planner import Decision
from pagedkv.core.publisher import Sealed
from pagedkv.core.request import FinishedSequence
from pagedkv.core.scheduler import Scheduler

__all__ = ["Leap", "can_foresee", "commit_leap", "extend_leap", "schedule_leap"]

FAR = 2**30
NEVER: Int32 = np.empty(0, np.int32)


class Leap(Struct, frozen=True, kw_only=True, eq=False):
    """Some steps in a row that one decision holds for.

    Attributes:
        decision: Of the first step.
        then: [B] How many tokens each row computes in every step after it.
        more: Their sum.
        drawing: [S] The rows that draw a token in each step; the others' prompts go on after it.
        resident: [groups, B] Tokens resident after the first step.
        known: [S] Tokens that the drawing rows know before.
        room: The most steps before one of those is full.
        steps: The most steps, or those to commit; 1 at least.

    Known once the leap is extended:
        batch: What each row computes in all of the steps.
        sealed: The blocks that rows fill in them, if that was looked at.
        taken_at: [N] Of each block taken since the decision, the step that took it, counted from 0;
            ascending.
    """

    decision: Decision
    then: Int32
    more: int
    drawing: Int64
    resident: Int32
    known: Int32
    room: int
    steps: int
    batch: Batch | None = None
    sealed: Sealed | None = None
    taken_at: Int32 = NEVER


def can_foresee(scheduler: Scheduler) -> bool:
    """Return whether what steps come to can be foreseen.

    Not if sequences are in work that may evict, stop or fork, if layers have windows or tenants
    quotas, or if KV events or an end wait to be told.
    """
    roster = scheduler._roster
    return not (
        roster.unforeseen
        or roster.finished
        or scheduler._outstanding is not None
        or scheduler.tenants.limited
        or scheduler.manager.publisher.records
        or any(scheduler.layout.windows)
    )


def schedule_leap(scheduler: Scheduler, most: int) -> Leap | None:
    """Decide the next step, as `Scheduler.schedule` does, and for how many steps that holds.

    Cautious: where it is not plain that a step repeats the one before, it is not part of the leap.

    Args:
        most: Steps, 1 at least.

    Returns:
        None, and nothing changed, if the outcome of steps cannot be foreseen. Take an ordinary
        step then.
    """
    if not can_foresee(scheduler):
        return None
    manager, table = scheduler.manager, scheduler.table
    decision = scheduler._outstanding = scheduler._decide()
    batch = decision.batch
    rows, first = batch.rows.astype(np.intp), batch.counts
    then, more = np.ones(len(rows), np.int32), len(rows)
    known, drawing = table.num_known[rows], rows
    left = None if batch is scheduler._decoding else known - table.num_computed[rows] - first
    if left is not None and not np.count_nonzero(left):
        left = None
    if left is not None:  # a prompt goes on
        drawing, known = rows[left == 0], known[left == 0]
    room = int((table.limit[drawing] - known).min(initial=FAR))
    resident = table.num_resident[:, rows] + first
    steps = min(most, room, _repeats(scheduler, decision, left))
    if steps > 1:
        if left is not None:
            then[-1] = chunk = _chunk(scheduler, len(rows))
            more += chunk - 1
        steps = 1 + _growth_steps(manager, rows, resident, then, more, steps - 1)
    return Leap(
        decision=decision,
        then=then,
        more=more,
        drawing=drawing,
        resident=resident,
        known=known,
        room=room,
        steps=steps,
    )


def _repeats(scheduler: Scheduler, decision: Decision, left: Int32 | None) -> int:
    """Return for how many steps a decision surely holds, as far as tokens and the queue go.

    Args:
        left: [B] Known tokens that each row leaves to later steps; None if nobody leaves any.
    """
    roster, limits = scheduler._roster, scheduler.config.scheduler
    batch = len(decision.batch.rows)
    if not batch or batch < len(scheduler.table.running) or roster.finished:
        return 1
    if left is not None:
        # A prompt that takes all the budget keeps everybody out, until its last tokens.
        chunk = _chunk(scheduler, batch)
        waits = roster.waiting and limits.scheduling_policy == "priority"
        if np.count_nonzero(left[:-1]) or limits.long_prefill_token_threshold or waits or chunk < 1:
            return 1
        return 1 + (int(left[-1]) - 1) // chunk
    if batch > limits.max_num_batched_tokens:
        return 1
    return _until_admission(scheduler, decision) if roster.waiting else FAR


def _chunk(scheduler: Scheduler, batch: int) -> int:
    """Return the tokens that a prompt gets in a step in which all others draw."""
    return scheduler.config.scheduler.max_num_batched_tokens - (batch - 1)


def _until_admission(scheduler: Scheduler, decision: Decision) -> int:
    """Return the steps, this one included, after which the first in the queue may enter.

    What decoding takes from the pool only makes admission harder. It could become easier in one
    way: that a running sequence seals the very block that the waiting prompt goes on with.
    """
    limits, manager, table = scheduler.config.scheduler, scheduler.manager, scheduler.table
    if limits.scheduling_policy != "fcfs" or limits.max_skips or limits.admission == "optimistic":
        return 1
    seq = next(scheduler._roster.waiting.order(decision.step))
    if scheduler.admission.has_outgrown(seq):
        return 1
    hits = manager.find_prefix(seq)
    if scheduler.admission.can_admit(seq, hits):
        return 1
    computed = table.num_computed[decision.batch.rows]
    ahead = (len(hits) + 1) * manager.block_size - computed
    ahead = ahead[ahead > 0] - decision.batch.counts[ahead > 0]
    return max(1, int(ahead.min(initial=FAR)))


def _growth_steps(
    manager: BlockManager, rows: Int64, resident: Int32, then: Int32, more: int, most: int
) -> int:
    """Return for how many steps, at most ``most``, rows can grow by blanks and, with one group, by
    cached blocks alone.

    Args:
        resident: [groups, B] Tokens resident before them.
        then: [B] Tokens that each row gains per step.
        more: Their sum.
    """
    size, groups = manager.block_size, manager.num_groups
    # Reclaiming one group's block blanks its siblings, so then the order of steps matters.
    room = manager.pool.num_available - (manager.pool.num_cached if groups > 1 else 0)
    if (len(rows) + more * most // size) * groups <= room:
        return most
    held = manager.table.num_blocks[:, rows]

    def fits(steps: int) -> bool:
        return int((-(-(resident + steps * then) // size) - held).sum()) <= room

    return bisect_left(range(1, most + 1), True, key=lambda steps: not fits(steps))


def extend_leap(scheduler: Scheduler, leap: Leap, token_ids: Int32) -> Leap:
    """Say what the steps of a leap will draw, and give its rows the blocks that these would have.

    Args:
        leap: What `schedule_leap` gave last.
        token_ids: [K, S] What each of K steps, at most the leap's, draws for each of the rows that
            draw, in their order; valid ids.

    Returns:
        The leap with the steps to commit: K, or only the first if they depend on each other's
        order, because a block is about to be sealed whose content is cached elsewhere.
    """
    manager, table, steps = scheduler.manager, scheduler.table, len(token_ids)
    batch, replace = leap.decision.batch, msgspec.structs.replace
    table.reserve_tokens(int(leap.known.max(initial=0)) + steps)
    at = leap.drawing * table.token_ids.shape[1] + leap.known
    table.token_ids.reshape(-1)[at + np.arange(steps)[:, None]] = token_ids
    if steps == 1:
        return replace(leap, steps=1, batch=batch)
    counts: Int32 = batch.counts + np.int32(steps - 1) * leap.then
    whole = batch.over(counts, batch.num_tokens + (steps - 1) * leap.more)
    sealed = manager.about_to_fill(whole)
    if _collide(manager, sealed):
        return replace(leap, steps=1, batch=batch)
    taken_at = _grow(manager, batch, leap.resident, leap.then, steps - 1)
    sealed = sealed._replace(are_new=True)
    return replace(leap, steps=steps, batch=whole, sealed=sealed, taken_at=taken_at)


def commit_leap(scheduler: Scheduler, leap: Leap) -> list[FinishedSequence]:
    """Count an extended leap's steps as taken: the state is as after as many plans and commits.

    Returns:
        The sequences that ended in the last step.
    """
    table, roster, steps, batch = scheduler.table, scheduler._roster, leap.steps, leap.batch
    assert batch is not None
    scheduler._outstanding = None
    scheduler.tier.commit()
    known = leap.known + np.int32(steps)
    scheduler.tenants.charge(batch.tenants, batch.first_time)
    scheduler.manager.advance(batch, leap.sealed)
    table.num_known[leap.drawing] = known
    all_draw = len(leap.drawing) == len(batch.rows)
    tenants = batch.tenants if all_draw else table.tenant[leap.drawing]
    scheduler.tenants.charge(tenants, steps)
    if scheduler.config.scheduler.admission == "optimistic":
        for _ in range(steps - 1):
            scheduler.admission.step()
    scheduler.totals.num_steps += steps - 1
    scheduler.totals.generation_tokens += steps * len(leap.drawing)
    if steps >= leap.room:
        full, last = known >= table.limit[leap.drawing], table.token_ids[leap.drawing, known - 1]
        scheduler._finish_ended(leap.drawing, last, np.zeros(len(full), np.bool_), full)
    finished, roster.finished = roster.finished, []
    if scheduler._audits:
        scheduler.audit()
    return finished


def _collide(manager: BlockManager, sealed: Sealed) -> bool:
    """Return whether a block that is about to be sealed is findable already, or two are alike."""
    new = sealed.digests
    return len(set(new)) < len(new) or manager.index.knows_any(new)


def _grow(manager: BlockManager, batch: Batch, resident: Int32, then: Int32, steps: int) -> Int32:
    """Give rows the very blocks that a step and as many after it would have given them.

    Args:
        resident: [groups, B] Tokens resident after the first step.
        then: [B] Tokens that each row gains per step.

    Returns:
        [N] Of each block, which of the steps took it, counted from 0; ascending.
    """
    size, held = manager.block_size, manager.table.num_blocks[:, batch.at]
    fresh = (resident + (steps * then + np.int32(size - 1))) // size - held
    many = fresh.ravel()
    grows = many.nonzero()[0]
    if not len(grows):
        return NEVER
    many, then = many[grows], then[grows % len(then)]
    space: Int32 = (held * size - resident).ravel()[grows]
    if len(grows) < many.sum():
        begin = np.repeat(np.cumsum(many) - many, many)
        ordinal = (np.arange(len(begin)) - begin).astype(np.int32)
        space, then = np.repeat(space, many) + ordinal * size, np.repeat(then, many)
    # The step that writes past a row's blocks takes the next one.
    taken_at = space // then + 1
    order = np.argsort(taken_at, kind="stable")
    ids = np.empty(len(order), np.int32)
    ids[order] = manager.allocate(len(order))
    manager.table.append_blocks(batch.rows, fresh, ids)
    return taken_at[order]
