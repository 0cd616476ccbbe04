"""NaN where nobody may read, so that a wrong read shows in the output; for audited runs only."""

from collections.abc import Callable

import numpy as np
import torch

from pagedkv.core.arrays import Bool, Int64
from pagedkv.core.plan import StepPlan
from pagedkv.device.store import KVStore

__all__ = ["Poison"]


class Poison:
    """Fills blocks with NaN once nobody holds them or can find them, and tails not written yet.

    Args:
        store: Filled with NaN already.
        is_blank: Which blocks are free and their content worthless: bool [num_blocks].
    """

    def __init__(self, store: KVStore, is_blank: Callable[[], Bool]) -> None:
        self._store = store
        self._is_blank = is_blank
        self._poisoned = is_blank()

    def spread(self, plan: StepPlan) -> None:
        """Fill what became unreadable since the last plan.

        Called between a plan's copies, which read from blocks given up, and its writes.

        Cost: the blocks that turned blank, and a block per sequence and group.
        """
        blank = self._is_blank()
        fresh = np.flatnonzero(blank & ~self._poisoned)
        self._poisoned = blank
        size = self._store.block_size
        within = np.arange(size)
        slots = np.append((fresh[:, None] * size + within).ravel(), _tails(plan, size))
        self._store.fill_nan(torch.from_numpy(slots))


def _tails(plan: StepPlan, size: int) -> Int64:
    """Return the slots of each sequence's last block that hold none of its tokens."""
    resident = plan.num_resident.ravel()
    tables = plan.block_table.reshape(len(resident), -1)
    last = tables[np.arange(len(resident)), np.maximum(resident - 1, 0) // size].astype(np.int64)
    within = np.arange(size)
    unwritten = (within >= (resident % size)[:, None]) & (resident % size > 0)[:, None]
    slots: Int64 = (last[:, None] * size + within)[unwritten]
    return slots
