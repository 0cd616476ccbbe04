"""Many steps as one: a step's decision, for as long as the scheduler would decide the same.

A leap begins as any step does, with the passes of the scheduler: who goes on, who enters, who is
pushed back. Then, as long as nothing else can happen, every sequence that draws goes on drawing,
and a prompt that fills the token budget goes on filling it. Where nobody waits, the others go on
when some have ended: a leap is a row of legs, and some sequences end with the last step of each.

Whoever knows the tokens beforehand (a simulator, a replay) need not plan each of these steps. This
is a part of the scheduler in a file of its own, and knows its insides.
"""

from bisect import bisect_left
from typing import NamedTuple

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

__all__ = ["Leap", "Leg", "begin_leg", "can_foresee", "commit_leg", "extend_leap", "schedule_leap"]

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
        lasts: [S] The step, counted from 1, with which each of them ends.
        room: The least of those.
        steps: The most steps, or those to commit; 1 at least.

    Known once the leap is extended:
        sealed: The blocks that rows fill in all of the steps, if that was looked at.
        sealed_with: [N] Of each row among those, the step that it ends with, or else the last.
        stops: The steps that legs end with, ascending; the last is ``steps``.
    """

    decision: Decision
    then: Int32
    more: int
    drawing: Int64
    resident: Int32
    known: Int32
    lasts: Int32
    room: int
    steps: int
    sealed: Sealed | None = None
    sealed_with: Int32 = NEVER
    stops: tuple[int, ...] = ()

    @property
    def passes_ends(self) -> bool:
        """Whether rows end before the last step; then all rows draw in every step."""
        return self.steps > self.room

    def draws(self, steps: int) -> Int64:
        """Return which of its draws, counted from 0, each row makes in the first steps: [K, S].

        A row that has ended makes its last again.
        """
        draws = np.arange(steps)[:, None]
        return np.minimum(draws, self.lasts - 1) if self.passes_ends else draws


class Leg(NamedTuple):
    """Steps of a leap in which the same rows compute.

    Attributes:
        first, end: Which of the leap's steps, counted from 0.
        batch: The rows and what each computes in all of them.
        num_tokens: What they compute in the first of them.
        then: [B] How many tokens each row computes in every step after it.
        more: Their sum.
        drawing: [S] The rows that draw a token in each step.
        resident: [groups, B] Tokens resident after the first step.
        taken_at: [N] Of each block taken since the leg before, or the decision, the step of the leg
            that took it, counted from 0; ascending.
    """

    first: int
    end: int
    batch: Batch
    num_tokens: int
    then: Int32
    more: int
    drawing: Int64
    resident: Int32
    taken_at: Int32

    @property
    def steps(self) -> int:
        """How many there are."""
        return self.end - self.first


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


def schedule_leap(scheduler: Scheduler, most: int, *, past_ends: bool = False) -> Leap | None:
    """Decide the next step, as `Scheduler.schedule` does, and for how many steps that holds.

    Cautious: where it is not plain that a step repeats the one before, it is not part of the leap.

    Args:
        most: Steps, 1 at least.
        past_ends: Whether it may go on when sequences have ended, if nobody waits for their place.

    Returns:
        None, and nothing changed, if the outcome of steps cannot be foreseen. Take an ordinary
        step then.
    """
    if not can_foresee(scheduler):
        return None
    roster, manager, table = scheduler._roster, scheduler.manager, scheduler.table
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
    lasts = table.limit[drawing] - known
    room = last = int(lasts.min(initial=FAR))
    if past_ends and left is None and not roster.waiting:
        last = int(lasts.max(initial=1))
    resident = table.num_resident[:, rows] + first
    steps = min(most, last, _repeats(scheduler, decision, left))
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
        lasts=lasts,
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
    """Say what the steps of a leap will draw.

    Args:
        leap: What `schedule_leap` gave last.
        token_ids: [K, S] What each of K steps, at most the leap's, draws for each of the rows that
            draw, in their order; valid ids. Of rows that end before, their last again.

    Returns:
        The leap with the steps to commit: K, or only the first if they depend on each other's
        order, because a block is about to be sealed whose content is cached elsewhere.
    """
    manager, table, steps = scheduler.manager, scheduler.table, len(token_ids)
    leap = msgspec.structs.replace(leap, steps=steps)
    table.reserve_tokens(int(leap.known.max(initial=0)) + steps)
    at = leap.drawing * table.token_ids.shape[1] + leap.known
    table.token_ids.reshape(-1)[at + leap.draws(steps)] = token_ids
    if steps == 1:
        return msgspec.structs.replace(leap, stops=(1,))
    sealed = manager.about_to_fill(_over(leap, steps))
    if _collide(manager, sealed):
        return msgspec.structs.replace(leap, steps=1, stops=(1,))
    sealed = sealed._replace(are_new=True)
    if not leap.passes_ends:
        return msgspec.structs.replace(leap, sealed=sealed, stops=(steps,))
    ends = np.full(table.num_rows, steps, np.int32)
    ends[leap.drawing] = np.minimum(leap.lasts, steps)
    stops = tuple(sorted({steps, *ends[leap.drawing].tolist()}))
    return msgspec.structs.replace(leap, sealed=sealed, sealed_with=ends[sealed.rows], stops=stops)


def _over(leap: Leap, steps: int) -> Batch:
    """Return the batch of a leap's first step as that of so many steps."""
    batch = leap.decision.batch
    counts: Int32
    if steps > leap.room:
        counts = batch.counts + np.minimum(leap.lasts, steps) - np.int32(1)
        return batch.over(counts, int(counts.sum()))
    counts = batch.counts + np.int32(steps - 1) * leap.then
    return batch.over(counts, batch.num_tokens + (steps - 1) * leap.more)


def begin_leg(scheduler: Scheduler, leap: Leap, before: Leg | None) -> Leg:
    """Give the rows of an extended leap's next leg the very blocks that its steps would have.

    Args:
        before: The leg before, which is committed; None for the first.
    """
    manager = scheduler.manager
    if before is None:
        end, batch, taken_at = leap.stops[0], leap.decision.batch, NEVER
        tokens, whole = batch.num_tokens, batch
        if end > 1:
            whole = _over(leap, end)
            taken_at = _grow(manager, batch, leap.resident, leap.then, end - 1)
        return Leg(
            0, end, whole, tokens, leap.then, leap.more, leap.drawing, leap.resident, taken_at
        )
    first, end = before.end, next(stop for stop in leap.stops if stop > before.end)
    on = leap.lasts > first
    rows, steps = leap.decision.batch.rows[on], end - first
    many, then = len(rows), leap.then[on]
    batch = Batch(scheduler.table, rows, then * np.int32(steps), many * steps)
    resident = leap.resident[:, on] + np.int32(first)
    taken_at = _grow(manager, batch, resident, then, steps - 1)
    return Leg(first, end, batch, many, then, many, leap.drawing[on], resident, taken_at)


def commit_leg(scheduler: Scheduler, leap: Leap, leg: Leg) -> list[FinishedSequence]:
    """Count a leg's steps as taken: the state is as after as many plans and commits.

    Returns:
        The sequences that ended in the last step.
    """
    table, roster, steps = scheduler.table, scheduler._roster, leg.steps
    if not leg.first:
        scheduler._outstanding = None
        scheduler.tier.commit()
    batch, known = leg.batch, table.num_known[leg.drawing] + np.int32(steps)
    scheduler.tenants.charge(batch.tenants, batch.first_time)
    scheduler.manager.advance(batch, _sealed_by(leap, leg))
    table.num_known[leg.drawing] = known
    all_draw = len(leg.drawing) == len(batch.rows)
    tenants = batch.tenants if all_draw else table.tenant[leg.drawing]
    scheduler.tenants.charge(tenants, steps)
    undecided = steps if leg.first else steps - 1
    if scheduler.config.scheduler.admission == "optimistic":
        for _ in range(undecided):
            scheduler.admission.step()
    scheduler.totals.num_steps += undecided
    scheduler.totals.generation_tokens += steps * len(leg.drawing)
    if leg.end >= leap.room:
        full, last = known >= table.limit[leg.drawing], table.token_ids[leg.drawing, known - 1]
        scheduler._finish_ended(leg.drawing, last, np.zeros(len(full), np.bool_), full)
    finished, roster.finished = roster.finished, []
    if scheduler._audits and leg.end == leap.steps:
        scheduler.audit()
    return finished


def _sealed_by(leap: Leap, leg: Leg) -> Sealed | None:
    """Return the blocks to make findable with a leg: of rows that end with it, before they let go
    of them, all that they fill in the leap; and with the last leg all others'.
    """
    if leap.sealed is None or len(leap.stops) == 1:
        return leap.sealed
    return leap.sealed.of((leap.sealed_with == leg.end).nonzero()[0])


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
