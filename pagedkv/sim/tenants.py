"""Who got what out of the shared pool: one account per tenant."""

import numpy as np

from pagedkv.core.arrays import Float64, Int32
from pagedkv.core.leap import Leap
from pagedkv.core.manager import BlockManager
from pagedkv.sim.accounts import Accounts

__all__ = ["Tenants"]


class Tenants:
    """Accounts of all tenants of one engine; a single nameless tenant costs next to nothing.

    A reclaimed block counts against the tenant whose sequence took it, and for the tenant that
    held it last; blocks that several sequences share count for each that holds them.
    """

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self.accounts = Accounts()
        self._of_row: Int32 = np.zeros(manager.table.num_rows, np.int32)
        self._owner: Int32 = np.full(manager.pool.num_blocks, -1, np.int32)
        self._lost: list[Int32] = []
        manager.on_reclaim = self._lost.append

    def enter(self, row: int, tenant: str) -> None:
        """A sequence of a tenant begins to run in a row."""
        if tenant not in self.accounts.number:
            self.accounts.open(tenant)
            if len(self.accounts) == 2:  # until now there was nobody else to keep apart
                self._owner[:] = 0
        self._of_row[row] = self.accounts.number[tenant]

    def step(self, rows: Int32, seconds: Float64, leap: Leap | None = None) -> None:
        """Count what rows hold while a step, or a leap, runs; call it before ends free theirs.

        Args:
            seconds: [K] How long each of the steps took.
            leap: If they are the steps of one.
        """
        lost, self._lost[:] = list(self._lost), []
        if len(self.accounts) < 2:
            return
        table = self._manager.table
        mine = self._of_row[rows]
        held = table.num_blocks[:, rows]
        most = np.bincount(mine, held.sum(axis=0), len(self.accounts)).tolist()
        spent = most
        if leap is not None:  # blocks were taken on the way
            repeats = np.arange(len(seconds))[:, None, None] * leap.then
            resident = leap.resident + leap.decision.batch.counts + repeats
            blocks_then = -(-resident // table.block_size)
            weighed = np.tensordot(seconds, blocks_then.sum(axis=1), 1)
            spent = np.bincount(mine, weighed, len(self.accounts)).tolist()
        for account, peak, area in zip(self.accounts.of.values(), most, spent, strict=True):
            account.block_seconds += area * (float(seconds[0]) if leap is None else 1.0)
            account.most_blocks = max(account.most_blocks, int(peak))
        width = int(held.max(initial=0))
        used = np.arange(width) < held[:, :, None]
        blocks = table.block_table[:, rows, :width][used]
        holder = np.broadcast_to(mine[None, :, None], used.shape)[used]
        before = np.concatenate([self._owner[ids] for ids in lost]) if lost else None
        self._owner[blocks] = holder
        if before is not None:
            after = self._owner[np.concatenate(lost)]
            known = before >= 0
            np.add.at(self.accounts.evictions, (after[known], before[known]), 1)
