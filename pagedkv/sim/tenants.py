"""Who got what out of the shared pool: one account per tenant."""

from typing import Any

import numpy as np

from pagedkv.core.arrays import Float64, Int32, Int64
from pagedkv.core.leap import Leap
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import FinishedSequence
from pagedkv.sim.sketch import Distribution
from pagedkv.sim.workload import SimRequest

__all__ = ["Tenants", "jain_index"]


def jain_index(shares: Float64) -> float:
    """Return how equal shares are: 1 if all are, 1/n if one has everything (Jain et al. 1984)."""
    squares = float((shares * shares).sum())
    return float(shares.sum()) ** 2 / (len(shares) * squares) if squares else 1.0


class _Account:
    """What one tenant asked for and got."""

    def __init__(self) -> None:
        self.requests = 0
        self.good = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.ttft = Distribution()
        self.e2el = Distribution()
        self.speed = 0.0
        self.block_seconds = 0.0
        self.most_blocks = 0


class Tenants:
    """Accounts of all tenants of one engine; a single nameless tenant costs next to nothing.

    A reclaimed block counts against the tenant whose sequence took it, and for the tenant that
    held it last; blocks that several sequences share count for each that holds them.
    """

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._accounts: dict[str, _Account] = {}
        self._number: dict[str, int] = {}
        self._of_row: Int32 = np.zeros(manager.table.num_rows, np.int32)
        self._owner: Int32 = np.full(manager.pool.num_blocks, -1, np.int32)
        self._lost: list[Int32] = []
        self._taken: Int64 = np.zeros((0, 0), np.int64)  # [by, from]
        manager.on_reclaim = self._lost.append

    def enter(self, row: int, tenant: str) -> None:
        """A sequence of a tenant begins to run in a row."""
        if tenant not in self._number:
            self._number[tenant] = len(self._number)
            self._accounts[tenant] = _Account()
            count = len(self._number)
            taken = np.zeros((count, count), np.int64)
            taken[:-1, :-1] = self._taken
            self._taken = taken
            if count == 2:  # until now there was nobody else to keep apart
                self._owner[:] = 0
        self._of_row[row] = self._number[tenant]

    def step(self, rows: Int32, seconds: Float64, leap: Leap | None = None) -> None:
        """Count what rows hold while a step, or a leap, runs; call it before ends free theirs.

        Args:
            seconds: [K] How long each of the steps took.
            leap: If they are the steps of one.
        """
        lost, self._lost[:] = list(self._lost), []
        if len(self._number) < 2:
            return
        table = self._manager.table
        mine = self._of_row[rows]
        held = table.num_blocks[:, rows]
        most = np.bincount(mine, held.sum(axis=0), len(self._number)).tolist()
        spent = most
        if leap is not None:  # blocks were taken on the way
            repeats = np.arange(len(seconds))[:, None, None] * leap.then
            resident = leap.resident + leap.decision.batch.counts + repeats
            blocks_then = -(-resident // table.block_size)
            weighed = np.tensordot(seconds, blocks_then.sum(axis=1), 1)
            spent = np.bincount(mine, weighed, len(self._number)).tolist()
        for account, peak, area in zip(self._accounts.values(), most, spent, strict=True):
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
            np.add.at(self._taken, (after[known], before[known]), 1)

    def finish(
        self, request: SimRequest, ended: FinishedSequence, ttft: float, e2el: float, *, good: bool
    ) -> None:
        """Book a request that was served to its end."""
        account = self._accounts[request.tenant]
        account.requests += 1
        account.good += good
        account.input_tokens += len(request.prompt)
        account.output_tokens += len(ended.token_ids)
        account.cached_tokens += ended.num_cached_tokens
        account.preemptions += ended.num_preemptions
        account.ttft.add(ttft)
        account.e2el.add(e2el)
        account.speed += len(ended.token_ids) / max(e2el, 1e-9)

    def merge(self, other: "Tenants") -> None:
        """Add the accounts of another engine."""
        for name in other._accounts:
            if name not in self._accounts:
                self.enter(0, name)
        at = np.array([self._number[name] for name in other._accounts], np.int64)
        self._taken[np.ix_(at, at)] += other._taken
        for name, theirs in other._accounts.items():
            mine = self._accounts[name]
            for field, value in vars(theirs).items():
                if isinstance(value, Distribution):
                    getattr(mine, field).merge(value)
                else:
                    setattr(mine, field, getattr(mine, field) + value)

    def table(self, duration: float) -> dict[str, dict[str, Any]]:
        """Return every tenant's account, in order of appearance."""
        caused = self._taken.sum(axis=1) - np.diagonal(self._taken)
        suffered = self._taken.sum(axis=0) - np.diagonal(self._taken)
        return {
            name: {
                "requests": account.requests,
                "good_requests": account.good,
                "input_tokens": account.input_tokens,
                "output_tokens": account.output_tokens,
                "prefix_cache_hit_rate": account.cached_tokens / max(1, account.input_tokens),
                "mean_ttft_ms": account.ttft.mean * 1000,
                "p99_ttft_ms": float(account.ttft.percentile(99)) * 1000,
                "mean_e2el_ms": account.e2el.mean * 1000,
                "preemptions": account.preemptions,
                "mean_blocks_held": account.block_seconds / max(duration, 1e-9),
                "most_blocks_held": account.most_blocks,
                "evictions_caused_to_others": int(caused[self._number[name]]),
                "evictions_suffered_from_others": int(suffered[self._number[name]]),
                "mean_tokens_per_second": account.speed / max(1, account.requests),
            }
            for name, account in self._accounts.items()
        }

    def fairness(self) -> dict[str, float]:
        """Return Jain's index over tenants, of the tokens served and of the speed they saw."""
        served = [a for a in self._accounts.values() if a.requests]
        tokens = np.array([a.input_tokens + a.output_tokens for a in served], np.float64)
        speed = np.array([a.speed / a.requests for a in served], np.float64)
        return {"jain_index_tokens": jain_index(tokens), "jain_index_speed": jain_index(speed)}
