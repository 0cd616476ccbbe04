"""Many steps as one: a step's decision, for as long as the scheduler would decide the same.

A leap begins as any step does, with the passes of the scheduler: who goes on, who enters, who is
pushed back. Then, as long as nothing else can happen, every sequence that draws goes on drawing,
and a prompt that fills the token budget goes on filling it. Sequences may end with the last step.

Whoever knows the tokens beforehand (a simulator, a replay) need not plan each of these steps. This
is a part of the scheduler in a file of its own, and knows its insides.
"""

from bisect import bisect_left

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Bool, Int32, Int64
from pagedkv.core.batch import Batch
from pagedkv.core.manager import BlockManager
from pagedkv.core.planner import Decision
from pagedkv.core.prefix import extend_chain
from pagedkv.core.request import FinishedSequence
from pagedkv.core.scheduler import Scheduler

__all__ = ["Leap", "commit_leap", "extend_leap", "schedule_leap"]

FAR = 2**30


class Leap(Struct, frozen=True, kw_only=True, eq=False):
    """Some steps in a row that one decision holds for.

    Attributes:
        decision: Of the first step.
        then: [B] How many tokens each row computes in every step after it.
        draws: [B] Whether a row draws a token in each step; the others' prompts go on after it.
        resident: [groups, B] Tokens resident before the first step.
        steps: The most steps, or those to commit; 1 at least.
        taken_at: [N] Of each block taken after the first step, the step, counted from 0; known
            once the leap is extended.
    """

    decision: Decision
    then: Int32
    draws: Bool
    resident: Int32
    steps: int
    taken_at: Int64 | None = None

    def counts(self, steps: int) -> Int32:
        """Return how many tokens each row computes in the first so many steps: [B]."""
        counts: Int32 = self.decision.batch.counts + np.int32(steps - 1) * self.then
        return counts


def schedule_leap(scheduler: Scheduler, most: int) -> Leap | None:
    """Decide the next step, as `Scheduler.schedule` does, and for how many steps that holds.

    Cautious: where it is not plain that a step repeats the one before, it is not part of the leap.

    Args:
        most: Steps, 1 at least.

    Returns:
        None, and nothing changed, if the outcome of steps cannot be foreseen: sequences are in
        work that may evict, stop or fork, layers have windows, tenants quotas, or KV events or an
        end wait to be told. Take an ordinary step then.
    """
    roster, manager, table = scheduler._roster, scheduler.manager, scheduler.table
    if (
        roster.unforeseen
        or roster.finished
        or scheduler._outstanding is not None
        or scheduler.tenants.limited
        or manager.records_events
        or any(scheduler.layout.windows)
    ):
        return None
    decision = scheduler._outstanding = scheduler._decide()
    rows, first = decision.batch.rows, decision.batch.counts
    left = table.num_known[rows] - table.num_computed[rows] - first
    resident = table.num_resident[:, rows]
    draws = left == 0
    then = np.ones(len(rows), np.int32)
    steps = min(most, _repeats(scheduler, decision, left))
    if steps > 1:
        if left[-1]:
            then[-1] = _chunk(scheduler, len(rows))
        steps = 1 + _growth_steps(manager, rows, resident + first, then, steps - 1)
    return Leap(decision=decision, then=then, draws=draws, resident=resident, steps=steps)


def _repeats(scheduler: Scheduler, decision: Decision, left: Int32) -> int:
    """Return for how many steps a decision surely holds, as far as tokens and the queue go.

    Args:
        left: [B] Known tokens that each row leaves to later steps.
    """
    roster, table, limits = scheduler._roster, scheduler.table, scheduler.config.scheduler
    rows = decision.batch.rows
    if not len(rows) or len(rows) < len(table.running) or roster.finished:
        return 1
    drawing = rows
    if left.any():
        # A prompt that takes all the budget keeps everybody out, until its last tokens.
        chunk = _chunk(scheduler, len(rows))
        waits = roster.waiting and limits.scheduling_policy == "priority"
        if left[:-1].any() or limits.long_prefill_token_threshold or waits or chunk < 1:
            return 1
        drawing, steps = rows[:-1], 1 + (int(left[-1]) - 1) // chunk
    elif len(rows) > limits.max_num_batched_tokens:
        return 1
    else:
        steps = _until_admission(scheduler, decision) if roster.waiting else FAR
    room = table.limit[drawing] - table.num_known[drawing]
    return min(steps, int(room.min(initial=FAR)))


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
    manager: BlockManager, rows: Int32, resident: Int32, then: Int32, most: int
) -> int:
    """Return for how many steps, at most ``most``, rows can grow by blanks and, with one group, by
    cached blocks alone.

    Args:
        resident: [groups, B] Tokens resident before them.
        then: [B] Tokens that each row gains per step.
    """
    size, held = manager.block_size, manager.table.num_blocks[:, rows]
    # Reclaiming one group's block blanks its siblings, so then the order of steps matters.
    room = manager.pool.num_available - (manager.pool.num_cached if manager.num_groups > 1 else 0)
    if held.size + int(then.sum()) * most * len(held) // size <= room:
        return most

    def fits(steps: int) -> bool:
        return int((-(-(resident + steps * then) // size) - held).sum()) <= room

    return bisect_left(range(1, most + 1), True, key=lambda steps: not fits(steps))


def extend_leap(scheduler: Scheduler, leap: Leap, token_ids: Int32) -> Leap:
    """Say what the steps of a leap will draw, and give their sequences the blocks for it.

    Args:
        leap: What `schedule_leap` gave last.
        token_ids: [K, S] What each of K steps, at most the leap's, draws for each of the rows that
            draw, in their order; valid ids.

    Returns:
        The leap with the steps to commit: K, or only the first if they depend on each other's
        order, because a block is about to be sealed whose content is cached elsewhere.
    """
    manager, table, steps = scheduler.manager, scheduler.table, len(token_ids)
    rows, first = leap.decision.batch.rows, leap.decision.batch.counts
    drawing = rows[leap.draws]
    known = table.num_known[drawing]
    table.reserve_tokens(int(known.max(initial=0)) + steps)
    table.token_ids[drawing[:, None], known[:, None] + np.arange(steps)] = token_ids.T
    if steps > 1 and manager.enable_prefix_caching and _collide(manager, rows, leap.counts(steps)):
        steps = 1
    taken_at = _grow(manager, rows, leap.resident + first, leap.then, steps - 1)
    return msgspec.structs.replace(leap, steps=steps, taken_at=taken_at)


def commit_leap(scheduler: Scheduler, leap: Leap) -> list[FinishedSequence]:
    """Count an extended leap's steps as taken: the state is as after as many plans and commits.

    Returns:
        The sequences that ended in the last step.
    """
    table, roster, steps = scheduler.table, scheduler._roster, leap.steps
    scheduler._outstanding = None
    scheduler.tier.commit()
    batch = Batch(table, leap.decision.batch.rows, leap.counts(steps))
    drawing = batch.rows[leap.draws]
    scheduler._charge(batch)
    scheduler.manager.advance(batch)
    table.num_known[drawing] += steps
    scheduler.tenants.charge(table.tenant[drawing], np.full(len(drawing), steps, np.int32))
    if scheduler.config.scheduler.admission == "optimistic":
        for _ in range(steps - 1):
            scheduler.admission.step()
    scheduler.totals.num_steps += steps - 1
    scheduler.totals.generation_tokens += steps * len(drawing)
    full = table.num_known[drawing] >= table.limit[drawing]
    last = table.token_ids[drawing, table.num_known[drawing] - 1]
    scheduler._finish_ended(drawing, last, np.zeros_like(full), full)
    finished, roster.finished = roster.finished, []
    if scheduler._audits:
        scheduler.audit()
    return finished


def _collide(manager: BlockManager, rows: Int32, counts: Int32) -> bool:
    """Return whether the next tokens of rows, which are written already, seal a block that is
    findable, or two alike. Hash chains grow by what is looked at.
    """
    table, size = manager.table, manager.block_size
    before = table.num_computed[rows]
    first, full = before // size, (before + counts) // size
    new: list[bytes] = []
    for i in (first != full).nonzero()[0].tolist():
        seq = table.sequences[int(rows[i])]
        assert seq is not None
        tokens, salt = table.token_ids[rows[i]], seq.request.cache_salt
        extend_chain(seq.hashes, tokens, int(full[i]), size, salt)
        new += seq.hashes[int(first[i]) : int(full[i])]
    return len(set(new)) < len(new) or manager.index.knows_any(new)


def _grow(manager: BlockManager, rows: Int32, resident: Int32, then: Int32, steps: int) -> Int64:
    """Give each row the very blocks that as many steps of ``then`` tokens would have given it.

    Returns:
        [N] Of each block, which of the steps took it, counted from 1; ascending.
    """
    if not steps:
        return np.zeros(0, np.int64)
    table, size = manager.table, manager.block_size
    held = table.num_blocks[:, rows]
    fresh = -(-(resident + steps * then) // size) - held
    flat = fresh.ravel()
    start = np.cumsum(flat) - flat
    ordinal = np.arange(int(flat.sum())) - np.repeat(start, flat)
    # The step that writes past a row's blocks takes the next one.
    room = np.repeat((held * size - resident).ravel(), flat) + ordinal * size
    taken_at: Int64 = room // np.repeat(np.tile(then, len(held)), flat) + 1
    order = np.argsort(taken_at, kind="stable")
    ids = np.empty(len(order), np.int32)
    ids[order] = manager.allocate(len(order))
    table.append_blocks(rows, fresh, ids)
    taken_at = taken_at[order]
    return taken_at
