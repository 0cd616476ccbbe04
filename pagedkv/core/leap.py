"""Many steps as one, where nothing can happen but that every running sequence gets a token.

Serving spends most of its steps so: nobody comes, nobody ends, nobody is short of blocks. Whoever
knows the tokens beforehand (a simulator, a replay) need not plan each of them.
"""

import numpy as np

from pagedkv.config import SchedulerConfig
from pagedkv.core.admission import Admission
from pagedkv.core.arrays import Int32
from pagedkv.core.manager import BlockManager
from pagedkv.core.retention import Retention
from pagedkv.core.roster import Roster

__all__ = ["leap", "quiet_steps"]


def quiet_steps(
    limits: SchedulerConfig,
    manager: BlockManager,
    retention: Retention,
    admission: Admission,
    roster: Roster,
    most: int,
) -> int:
    """Return for how many of the next ``most`` steps nothing but decoding can happen.

    Cautious: where it is not plain that a step is quiet, it is not. Sequences that may evict,
    stop tokens, shared tails and recorded events are never quiet.
    """
    table = manager.table
    rows = table.running
    if (
        not len(rows)
        or len(rows) > limits.max_num_batched_tokens
        or roster.finished
        or roster.unforked
        or manager.records_events
        or retention.may_evict(rows)
        or (table.stop_ids[rows] >= 0).any()
        or (table.num_known[rows] - table.num_computed[rows] != 1).any()
    ):
        return 0
    most = min(most, int((table.limit[rows] - table.num_known[rows]).min()) - 1)
    if most > 0 and len(roster.waiting):
        most = min(most, _until_admission(manager, admission, roster))
    return manager.growth_steps(rows, most) if most > 0 else 0


def _until_admission(manager: BlockManager, admission: Admission, roster: Roster) -> int:
    """Return the steps for which the first in the queue surely stays there.

    What decoding takes from the pool only makes admission harder. It could become easier in one
    way: that a running sequence seals the very block that the waiting prompt goes on with.
    """
    seq = roster.waiting.peek()
    if admission.has_outgrown(seq):
        return 0
    hits = manager.find_prefix(seq)
    if admission.can_admit(seq, hits):
        return 0
    table = manager.table
    left = (len(hits) + 1) * manager.block_size - table.num_computed[table.running]
    return int(left[left > 0].min(initial=np.iinfo(np.int32).max)) - 1


def leap(manager: BlockManager, token_ids: Int32) -> bool:
    """Carry out quiet steps at once: the state is as after as many plans and commits.

    Block ids may be dealt out in another order than step by step; nothing else differs.

    Args:
        token_ids: [K, B] The tokens that each of the K steps gives each running row.

    Returns:
        False, and nothing changed, if the steps depend on each other's order: a block is about to
        be sealed whose content is cached elsewhere, while cached blocks are being reclaimed.
    """
    table = manager.table
    rows = table.running
    steps = len(token_ids)
    table.write_tokens(rows, token_ids)
    if manager.would_repeat(rows, steps):
        return False
    counts = np.full(len(rows), steps, np.int32)
    manager.grow(rows, counts)
    table.num_known[rows] += steps
    manager.advance(rows, counts)
    return True
