"""Who got what out of the shared pool: one account per tenant."""

import numpy as np

from pagedkv.core.arrays import Float64, Int32, Int64
from pagedkv.core.leap import Leap
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import FinishedSequence
from pagedkv.core.stride import Stride
from pagedkv.sim.accounts import Accounts
from pagedkv.sim.occupancy import Occupancy
from pagedkv.sim.workload import SimRequest

__all__ = ["Tenants"]


class Tenants:
    """Accounts of all tenants of one engine; while only one runs, that costs next to nothing.

    A reclaimed block counts against the tenant whose sequence took it, and for the tenant that
    held it last; blocks that several sequences share count for each that holds them.

    Args:
        occupancy: Of the same engine: what all hold is what a tenant holds that is alone.
    """

    def __init__(self, manager: BlockManager, occupancy: Occupancy) -> None:
        self._manager = manager
        self._occupancy = occupancy
        self._accounts = Accounts()
        self._alone: str | None = None  # who ran, as long as nobody else did
        self._several = False
        self._of_row: Int32 = np.zeros(manager.table.num_rows, np.int32)
        self._owner: Int32 = np.full(manager.pool.num_blocks, -1, np.int32)
        self._lost: list[Int32] = []
        manager.on_reclaim = self._lost.append

    @property
    def accounts(self) -> Accounts:
        """The accounts, of all that came so far."""
        if self._alone is not None:  # what was held, this one tenant held
            account = self._accounts.of[self._alone]
            account.block_seconds = self._occupancy.entry_seconds
            account.most_blocks = self._occupancy.most_entries
        return self._accounts

    def ask(self, tenant: str) -> None:
        """Count a request that a tenant wants served."""
        self._accounts.ask(tenant)

    def enter(self, row: int, tenant: str) -> None:
        """A sequence of a tenant that has asked begins to run in a row."""
        if not self._several and tenant != self._alone:
            if self._alone is None:
                self._alone = tenant
            else:  # until now there was nobody else to keep apart
                self._owner[:] = self.accounts.number[self._alone]
                self._alone, self._several = None, True
        self._of_row[row] = self._accounts.number[tenant]

    def finish(
        self, request: SimRequest, ended: FinishedSequence, ttft: float, e2el: float, *, good: bool
    ) -> None:
        """Book a request that was served to its end."""
        self._accounts.finish(request, ended, ttft, e2el, good=good)

    def step(self, rows: Int32, seconds: Float64, leap: Leap | None = None) -> None:
        """Count what is held while a step, or a leap, runs; call it before ends free theirs.

        Args:
            seconds: [K] How long each of the steps took.
            leap: If they are the steps of one.
        """
        lost, self._lost[:] = list(self._lost), []
        if not self._several:
            return
        table, accounts = self._manager.table, self._accounts
        if len(seconds) == 1:  # who runs and does not compute holds blocks as well
            rows, leap = table.running, None
        mine = self._of_row[rows]
        held = table.num_blocks[:, rows]
        most = np.bincount(mine, held.sum(axis=0), len(accounts)).tolist()
        spent = most
        if leap is not None:  # blocks were taken on the way
            repeats = np.arange(len(seconds))[:, None, None] * leap.then
            blocks_then = -(-(leap.resident + repeats) // table.block_size)
            weighed = np.tensordot(seconds, blocks_then.sum(axis=1), 1)
            spent = np.bincount(mine, weighed, len(accounts)).tolist()
        for account, peak, area in zip(accounts.of.values(), most, spent, strict=True):
            account.block_seconds += area * (float(seconds[0]) if leap is None else 1.0)
            account.most_blocks = max(account.most_blocks, int(peak))
        self._own(*self._holders(rows), lost)

    def _holders(self, rows: Int32) -> tuple[Int32, Int32]:
        """Return the blocks that rows hold, and whose they are: [N] each."""
        table = self._manager.table
        held = table.num_blocks[:, rows]
        used = np.arange(held.max(initial=0)) < held[:, :, None]
        mine = np.broadcast_to(self._of_row[rows][None, :, None], used.shape)
        return table.block_table[:, rows, : used.shape[2]][used], mine[used]

    def begin_stride(self) -> None:
        """Note who holds what; call it before steps are taken at once."""
        if self._several:
            self._own(*self._holders(self._manager.table.running), [])

    def stride(self, stride: Stride) -> None:
        """Count what is held while steps run that were taken at once."""
        lost, self._lost[:] = list(self._lost), []
        if not self._several:
            return
        runs, seconds = stride.foreseen.runs, stride.foreseen.steps.seconds
        number = self._accounts.number
        mine = np.array([number[run.seq.request.tenant] for run in runs])
        ran = np.array([run.entered < 0 for run in runs])
        held = np.array([run.held for run in runs])
        ended = np.array([w for w, run in enumerate(runs) if run.end >= 0], np.int64)
        before = np.bincount(mine[ran], held[ran], len(self._accounts))
        # What each tenant's tables gained and lost, and before which step.
        found = np.array([w for w, run in enumerate(runs) if run.hits], np.int64)
        whose = np.concatenate((mine[ended], mine[found], mine[stride.taken_by]))
        when = [*(runs[w].end + 1 for w in ended), *(runs[w].entered for w in found)]
        step = np.concatenate((np.array(when, np.int64), stride.taken_at))
        more = np.ones(len(whose))
        more[: len(ended)] = [-runs[w].ever for w in ended]
        more[len(ended) : len(ended) + len(found)] = held[found]
        left = sum(seconds) - np.concatenate(([0.0], np.cumsum(seconds)))
        area = before * left[0] + np.bincount(whose, more * left[step], len(before))
        # The most that each ever has of all that it has gained less all that it has lost.
        order = np.lexsort((more > 0, step, whose))
        total, begin = np.cumsum(more[order]), np.flatnonzero(np.diff(whose[order], prepend=-1))
        peak = before.astype(np.float64)
        if len(begin):
            gained = np.maximum.reduceat(total, begin) - (total - more[order])[begin]
            peak[whose[order][begin]] += np.maximum(gained, 0.0)
        accounts = list(self._accounts.of.values())
        for tenant in np.unique(mine).tolist():
            accounts[tenant].block_seconds += float(area[tenant])
            accounts[tenant].most_blocks = max(accounts[tenant].most_blocks, int(peak[tenant]))
        holder = mine[stride.taken_by]
        # A block may be taken again, blank: for what it held, the first that took it counts.
        self._own(stride.blocks[::-1], holder[::-1], lost)
        self._owner[stride.blocks] = holder
        for w in sorted(stride.foreseen.shared, key=lambda w: (runs[w].last, w)):
            self._owner[stride.foreseen.shared[w]] = mine[w]  # the last that holds it stands

    def _own(self, blocks: Int32, holder: Int32 | Int64, lost: list[Int32]) -> None:
        """Note who holds blocks now, and whose they were that others took."""
        before = np.concatenate([self._owner[ids] for ids in lost]) if lost else None
        self._owner[blocks] = holder
        if before is not None:
            after = self._owner[np.concatenate(lost)]
            known = before >= 0
            np.add.at(self._accounts.evictions, (after[known], before[known]), 1)
