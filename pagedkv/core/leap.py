"""Many steps as one, where nothing can happen but that every running sequence gets a token.

Serving spends most of its steps so: nobody comes, nobody ends, nobody is short of blocks. Whoever
knows the tokens beforehand (a simulator, a replay) need not plan each of them. This is a part of
the scheduler in a file of its own, and knows its insides.
"""

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.batch import Batch
from pagedkv.core.manager import BlockManager
from pagedkv.core.prefix import extend_chain
from pagedkv.core.scheduler import Scheduler

__all__ = ["leap", "quiet_steps"]


def quiet_steps(scheduler: Scheduler, most: int) -> int:
    """Return for how many of the next ``most`` steps every running sequence surely decodes one
    token and nothing else can happen: nobody enters, ends, is preempted or evicts.

    Cautious: where it is not plain that a step is quiet, it is not. Sequences that may evict, stop
    tokens, shared tails, quotas and recorded events are never quiet; nor is a queue, unless it is
    first come first served and its first can surely not enter.
    """
    roster, manager, table = scheduler._roster, scheduler.manager, scheduler.table
    rows = table.running
    if (
        not len(rows)
        or scheduler._outstanding is not None
        or len(rows) > scheduler.config.scheduler.max_num_batched_tokens
        or roster.finished
        or roster.unforked
        or manager.records_events
        or manager._moves
        or scheduler.tenants.limited
        or any(scheduler.layout.windows)
        or table.evicts[rows].any()
        or (table.prompt_logprobs[rows] >= 0).any()
        or (table.stop_ids[rows] >= 0).any()
        or (table.num_known[rows] - table.num_computed[rows] != 1).any()
    ):
        return 0
    most = min(most, int((table.limit[rows] - table.num_known[rows]).min()) - 1)
    if most > 0 and roster.waiting:
        most = min(most, _until_admission(scheduler))
    return _growth_steps(manager, rows, most) if most > 0 else 0


def _until_admission(scheduler: Scheduler) -> int:
    """Return the steps for which the first in the queue surely stays there.

    What decoding takes from the pool only makes admission harder. It could become easier in one
    way: that a running sequence seals the very block that the waiting prompt goes on with.
    """
    limits, manager, table = scheduler.config.scheduler, scheduler.manager, scheduler.table
    if limits.scheduling_policy != "fcfs" or limits.max_skips or limits.admission == "optimistic":
        return 0
    seq = next(scheduler._roster.waiting.order(scheduler.totals.num_steps))
    if scheduler.admission.has_outgrown(seq):
        return 0
    hits = manager.find_prefix(seq)
    if scheduler.admission.can_admit(seq, hits):
        return 0
    left = (len(hits) + 1) * manager.block_size - table.num_computed[table.running]
    return int(left[left > 0].min(initial=np.iinfo(np.int32).max)) - 1


def _growth_steps(manager: BlockManager, rows: Int32, most: int) -> int:
    """Return for how many steps of one token each, at most ``most``, rows can grow by blanks and,
    with one group, by cached blocks alone; 0 if a block would have to be copied.
    """
    table, size = manager.table, manager.block_size
    resident, held = table.num_resident[:, rows], table.num_blocks[:, rows]
    last = np.maximum(held - 1, 0)
    tails = table.block_table[np.arange(manager.num_groups)[:, None], rows[None, :], last]
    if (manager.pool.ref_count[tails] > 1).any():
        return 0
    # Reclaiming one group's block blanks its siblings, so then the order of steps matters.
    room = manager.pool.num_available - (manager.pool.num_cached if manager.num_groups > 1 else 0)

    def fits(steps: int) -> bool:
        return int((-(-(resident + steps) // size) - held).sum()) <= room

    if fits(most):
        return most
    fit, unfit = 0, most
    while unfit - fit > 1:
        middle = (fit + unfit) // 2
        fit, unfit = (middle, unfit) if fits(middle) else (fit, middle)
    return fit


def leap(scheduler: Scheduler, token_ids: Int32) -> bool:
    """Carry out quiet steps at once: the state is as after as many plans and commits.

    Args:
        token_ids: [K, B] What each of K steps, at most what `quiet_steps` gave, draws for each row
            of ``table.running``, in that order.

    Returns:
        False, and nothing changed, if the steps depend on each other's order: a block is about to
        be sealed whose content is cached elsewhere. Take them singly then.
    """
    manager, table, rows = scheduler.manager, scheduler.table, scheduler.table.running
    steps = len(token_ids)
    known = table.num_known[rows]
    table.reserve_tokens(int(known.max(initial=0)) + steps)
    table.token_ids[rows[:, None], known[:, None] + np.arange(steps)] = token_ids.T
    if manager.enable_prefix_caching and _repeats(manager, rows, steps):
        return False
    batch = Batch(table, rows, np.full(len(rows), steps, np.int32))
    _grow(manager, rows, steps)
    table.num_known[rows] += steps
    scheduler._charge(batch)
    scheduler.tenants.charge(batch.tenants, batch.counts)
    manager.advance(batch)
    if scheduler.config.scheduler.admission == "optimistic":
        for _ in range(steps):
            scheduler.admission.step()
    scheduler.totals.num_steps += steps
    scheduler.totals.generation_tokens += token_ids.size
    if scheduler._audits:
        scheduler.audit()
    return True


def _repeats(manager: BlockManager, rows: Int32, steps: int) -> bool:
    """Return whether the next ``steps`` tokens of rows, which are written already, seal a block
    that is findable, or two alike. Hash chains grow by what is looked at.
    """
    table, size = manager.table, manager.block_size
    before = table.num_computed[rows]
    first, full = before // size, (before + steps) // size
    new: list[bytes] = []
    for i in np.flatnonzero(first != full).tolist():
        seq = table.sequences[int(rows[i])]
        assert seq is not None
        tokens, salt = table.token_ids[rows[i]], seq.request.cache_salt
        extend_chain(seq.hashes, tokens, int(full[i]), size, salt)
        new += seq.hashes[int(first[i]) : int(full[i])]
    return len(set(new)) < len(new) or manager.index.knows_any(new)


def _grow(manager: BlockManager, rows: Int32, steps: int) -> None:
    """Give each row the very blocks that as many steps of one token each would have given it."""
    table, size = manager.table, manager.block_size
    resident, held = table.num_resident[:, rows], table.num_blocks[:, rows]
    fresh = -(-(resident + steps) // size) - held
    flat = fresh.ravel()
    first = (held * size - resident).ravel()  # the step that takes the next block
    ordinal = np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)
    order = np.argsort(np.repeat(first, flat) + ordinal * size, kind="stable")
    ids = np.empty(len(order), np.int32)
    ids[order] = manager.allocate(len(order))
    table.append_blocks(rows, fresh, ids)
