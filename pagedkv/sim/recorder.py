"""Watches one simulated engine and keeps what reports need, in bounded memory."""

import math
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float64, Int32, Int64
from pagedkv.core.leap import Leap
from pagedkv.core.manager import BlockManager
from pagedkv.core.plan import StepOutput, StepPlan
from pagedkv.core.request import FinishedSequence
from pagedkv.core.scheduler import Scheduler
from pagedkv.sim.sketch import Distribution, Series
from pagedkv.sim.slo import Objective
from pagedkv.sim.tenants import Tenants
from pagedkv.sim.workload import SimRequest

__all__ = ["LATENCIES", "SERIES", "Phase", "Pool", "Recorder"]

LATENCIES = ("ttft", "tpot", "itl", "e2el", "queue")
SERIES = ("held", "cached", "running", "waiting", "wasted_slots", "tokens")
_WATCHED = 20_000  # phases kept for the trace viewer


class Phase(Struct, frozen=True):
    """One stretch of a request's life, for the trace viewer.

    Attributes:
        kind: ``queued``, ``prefill``, ``decode`` or ``preempted``.
    """

    request: str
    row: int
    kind: str
    begin: float
    end: float


class _Life:
    """What is known of a sequence in work."""

    __slots__ = ("began", "first", "last", "name", "queued", "request", "row")

    def __init__(self, request: SimRequest, name: str) -> None:
        self.request = request
        self.name = name
        self.queued = request.arrival  # since when it waits
        self.began = math.nan  # when it was last admitted
        self.first = math.nan
        self.last = math.nan
        self.row = -1


class Recorder:
    """Latencies, rates, occupancy and tenants of one engine.

    Python loops run over events (an admission, an end); tokens are counted by the array.

    Attributes:
        latency: Per name of `LATENCIES`, its distribution in seconds.
        phases: The first 20,000 stretches of requests' lives; later ones are counted only.
    """

    def __init__(
        self, scheduler: Scheduler, slo: Objective, tenants: Tenants, *, watch: bool = False
    ) -> None:
        rows = scheduler.table.num_rows
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self._slo = slo
        self._lives: dict[int, _Life] = {}
        self._planned: Int64 = np.full(rows, -1, np.int64)  # the sequence that last ran in a row
        self._drew: Int64 = np.full(rows, -1, np.int64)  # the sequence that last drew in a row
        self._last: Float64 = np.zeros(rows)  # when it did
        self.tenants = tenants
        self.latency = {name: Distribution() for name in LATENCIES}
        self.series = Series(SERIES)
        self.num_good = 0
        self.num_ended: dict[str, int] = {}
        self.input_tokens = 0
        self.output_tokens = 0
        self.last_end = 0.0
        self.most_in_flight = 0
        self.most_tokens_per_second = 0
        self._second = (-1, 0)
        self._preemptions = 0
        self._during: Float64 = np.zeros((1, len(SERIES)))
        self.phases: list[Phase] = []
        self.num_unwatched = 0
        self._watch = watch

    # Events

    def add(self, seq_id: int, request: SimRequest, name: str) -> None:
        """Begin to follow a request."""
        self._lives[seq_id] = _Life(request, name)
        self.most_in_flight = max(self.most_in_flight, len(self._lives))

    def begin(self, rows: Int32, now: float) -> None:
        """Look at who computes in the step, or leap, that begins now."""
        if self._scheduler.totals.num_preemptions != self._preemptions:
            self._preemptions = self._scheduler.totals.num_preemptions
            self._look_for_preempted(now)
        seq_ids = self._scheduler.table.seq_id[rows]
        for i in np.flatnonzero(self._planned[rows] != seq_ids).tolist():
            self._admit(int(rows[i]), int(seq_ids[i]), now)

    def step(self, output: StepOutput, end: float, seconds: float) -> None:
        """Take in a committed step that ended at ``end``."""
        self._draw(output.rows, output.seq_ids, end)
        ends = np.array([end])
        self.series.add(ends, np.array([seconds]), self._during)
        self._count_tokens(ends, len(output.rows))
        self.end(output.finished, end)

    def end(self, finished: list[FinishedSequence], now: float) -> None:
        """Take in who has ended."""
        for ended in finished:
            self._finish(ended, now)

    def _admit(self, row: int, seq_id: int, now: float) -> None:
        self._planned[row] = seq_id
        life = self._lives[seq_id]
        first = math.isnan(life.began)
        if first:
            self.latency["queue"].add(now - life.request.arrival)
        self._note(life, row, "queued" if first else "preempted", life.queued, now)
        life.began, life.row = now, row
        self.tenants.enter(row, life.request.tenant)

    def _look_for_preempted(self, now: float) -> None:
        """Save what rows knew of sequences that were pushed back to waiting."""
        seq_id = self._scheduler.table.seq_id
        for row in np.flatnonzero((self._planned >= 0) & (self._planned != seq_id)).tolist():
            life = self._lives[int(self._planned[row])]
            if self._drew[row] == self._planned[row]:
                life.last = float(self._last[row])
            ran = "prefill" if math.isnan(life.first) else "decode"
            self._note(life, row, ran, life.began, now)
            self._planned[row] = self._drew[row] = -1
            life.queued, life.row = now, -1

    def _draw(self, rows: Int32 | Int64, seq_ids: Int64, end: float) -> None:
        fresh = self._drew[rows] != seq_ids
        if fresh.any():
            for i in np.flatnonzero(fresh).tolist():
                life = self._lives[int(seq_ids[i])]
                if math.isnan(life.first):
                    life.first = end
                    self._note(life, life.row, "prefill", life.began, end)
                else:
                    self.latency["itl"].add(end - life.last)
                self._drew[rows[i]] = seq_ids[i]
            old = rows[~fresh]
            self.latency["itl"].add(end - self._last[old])
        else:
            self.latency["itl"].add(end - self._last[rows])
        self._last[rows] = end

    def _finish(self, ended: FinishedSequence, now: float) -> None:
        life = self._lives.pop(ended.seq_id)
        reason = ended.finish_reason
        self.num_ended[reason] = self.num_ended.get(reason, 0) + 1
        request, count = life.request, len(ended.token_ids)
        row = life.row
        if row >= 0:
            self._note(life, row, "decode", max(life.first, life.began), now)
            if self._planned[row] == ended.seq_id:
                self._planned[row] = self._drew[row] = -1
        good = False
        if reason in ("length", "stop"):
            self.input_tokens += len(request.prompt)
            self.output_tokens += count
            ttft, e2el = life.first - request.arrival, now - request.arrival
            tpot = (e2el - ttft) / max(1, count - 1)
            self.latency["ttft"].add(ttft)
            self.latency["e2el"].add(e2el)
            if count > 1:
                self.latency["tpot"].add(tpot)
            good = self._slo.kept(ttft, tpot, e2el)
            self.num_good += good
            self.tenants.finish(request, ended, ttft, e2el, good=good)
        self.last_end = max(self.last_end, now)

    # Tokens and blocks, by the array

    def leap(self, leap: Leap, pool: "Pool", begin: float, ends: Float64, seconds: Float64) -> None:
        """Take in an extended leap before it is committed.

        Args:
            pool: As it was during the first step.
            begin: When that began.
            ends: [K] When each step ended.
            seconds: [K] How long each was.
        """
        rows = leap.decision.batch.rows
        drawing = leap.drawing
        self.begin(rows, begin)
        self._draw(drawing, self._scheduler.table.seq_id[drawing], float(ends[0]))
        if leap.steps > 1:
            self.latency["itl"].add(np.diff(ends), len(drawing))
            self._last[drawing] = ends[-1]
        self.series.add(ends, seconds, self._values(leap, pool))
        self._count_tokens(ends, len(drawing))
        self.tenants.step(rows, seconds, leap)

    def _values(self, leap: Leap, pool: "Pool") -> Float64:
        """Return what held during each step of a leap: [K, series]."""
        first, more = int(leap.decision.batch.counts.sum()), int(leap.then.sum())
        steps, groups = leap.steps, len(leap.resident)
        assert leap.taken_at is not None
        fresh = np.cumsum(np.bincount(leap.taken_at, minlength=steps))
        repeat = np.arange(steps)
        values = np.empty((steps, len(SERIES)))
        values[:, 0] = pool.held + fresh
        values[:, 1] = pool.cached - np.maximum(0, fresh - pool.blank)
        values[:, 2] = len(leap.then)
        values[:, 3] = self._scheduler.num_waiting
        held = int((-(leap.resident + leap.decision.batch.counts) % self._manager.block_size).sum())
        values[:, 4] = held + fresh * self._manager.block_size - repeat * (groups * more)
        values[:, 5] = more
        values[0, 5] = first
        return values

    def planned(self, plan: StepPlan, begin: float, seconds: float) -> None:
        """Look at the pool between schedule and commit: what the step holds while it runs."""
        self.begin(plan.rows, begin)
        pool, size = self._manager.pool, self._manager.block_size
        waste = int((-plan.num_resident % size).sum())
        self.tenants.step(plan.rows, np.array([seconds]))
        counts = pool.num_held, pool.num_cached, len(plan.rows), self._scheduler.num_waiting
        self._during = np.array([[*counts, waste, plan.num_tokens]], np.float64)

    def _count_tokens(self, ends: Float64, batch: int) -> None:
        """Keep the most tokens that any second of the clock saw."""
        if int(ends[0]) == int(ends[-1]):
            self._count_in(int(ends[0]), len(ends) * batch)
            return
        for second, times in zip(
            *np.unique(ends.astype(np.int64), return_counts=True), strict=True
        ):
            self._count_in(int(second), int(times) * batch)

    def _count_in(self, second: int, tokens: int) -> None:
        now, count = self._second
        count = tokens + (count if now == second else 0)
        self._second = (second, count)
        self.most_tokens_per_second = max(self.most_tokens_per_second, count)

    def _note(self, life: _Life, row: int, kind: str, begin: float, end: float) -> None:
        if not self._watch or math.isnan(begin):
            return
        if len(self.phases) < _WATCHED:
            self.phases.append(Phase(life.name, row, kind, begin, end))
        else:
            self.num_unwatched += 1


class Pool(NamedTuple):
    """How many blocks are held, cached and blank."""

    held: int
    cached: int
    blank: int

    @classmethod
    def of(cls, manager: BlockManager) -> "Pool":
        """Count a manager's blocks."""
        pool = manager.pool
        return cls(pool.num_held, pool.num_cached, pool.num_available - pool.num_cached)
