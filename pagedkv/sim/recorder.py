"""Watches one simulated engine and keeps what reports need, in bounded memory."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float64, Int32, Int64
from pagedkv.core.foreseen import Run
from pagedkv.core.leap import Leap
from pagedkv.core.plan import StepOutput, StepPlan
from pagedkv.core.request import FinishedSequence
from pagedkv.core.scheduler import Scheduler
from pagedkv.core.stride import Stride
from pagedkv.sim.detail import Detail
from pagedkv.sim.occupancy import Occupancy, Pool
from pagedkv.sim.sketch import Distribution
from pagedkv.sim.slo import Objective
from pagedkv.sim.tenants import Tenants
from pagedkv.sim.workload import SimRequest

__all__ = ["LATENCIES", "Asked", "Phase", "Recorder"]

LATENCIES = ("ttft", "tpot", "itl", "e2el", "queue")
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


class Asked(NamedTuple):
    """What somebody asks an engine for, under which name, and why it is refused, if it is."""

    request: SimRequest
    name: str
    refusal: str


class Recorder:
    """Latencies, rates and tenants of one engine, and how full its pool is.

    Python loops run over events (an admission, an end); tokens are counted by the array.

    Attributes:
        latency: Per name of `LATENCIES`, its distribution in seconds.
        refused: Requests that were not taken, by reason.
        num_unsent: Follow-ups that nobody sends, because the conversation broke off.
        detail: Every served request's own times, if they are asked for.
        phases: The first 20,000 stretches of requests' lives; later ones are counted only.
    """

    def __init__(
        self, scheduler: Scheduler, slo: Objective, *, watch: bool = False, detail: bool = False
    ) -> None:
        rows = scheduler.table.num_rows
        self._scheduler = scheduler
        self._slo = slo
        self._lives: dict[int, _Life] = {}
        self._planned: Int64 = np.full(rows, -1, np.int64)  # the sequence that last ran in a row
        self._drew: Int64 = np.full(rows, -1, np.int64)  # the sequence that last drew in a row
        self._last: Float64 = np.zeros(rows)  # when it did
        self.latency = {name: Distribution() for name in LATENCIES}
        self.occupancy = Occupancy(scheduler)
        self.tenants = Tenants(scheduler.manager, self.occupancy)
        self.refused: Counter[str] = Counter()
        self.num_unsent = 0
        self.num_good = 0
        self.num_ended: Counter[str] = Counter()
        self.input_tokens = 0
        self.output_tokens = 0
        self.last_end = 0.0
        self.most_in_flight = 0
        self._preemptions = 0
        self.phases: list[Phase] = []
        self.num_unwatched = 0
        self._watch = watch
        self.detail = Detail() if detail else None

    # Events

    def add(self, seq_id: int, request: SimRequest, name: str, now: float) -> None:
        """Begin to follow a request: from the end of the step during which it arrived."""
        self._lives[seq_id] = _Life(request, name)
        self.occupancy.came(now, now - request.arrival)
        self.tenants.ask(request.tenant)
        self.most_in_flight = max(self.most_in_flight, len(self._lives))

    def refuse(self, request: SimRequest, reason: str) -> None:
        """Count a request that was not taken, and what would have followed it."""
        self.refused[reason] += 1
        self.tenants.ask(request.tenant)
        self._break_off(request)

    def _break_off(self, request: SimRequest) -> None:
        """Nobody goes on with a conversation after a request that was not served."""
        while request.then is not None:
            request = request.then
            self.num_unsent += 1
            self.tenants.ask(request.tenant)

    def begin(self, rows: Int32 | Int64, seq_ids: Int64, now: float) -> None:
        """Look at who computes in the step, or leap, that begins now: [B] each."""
        if self._scheduler.totals.num_preemptions != self._preemptions:
            self._preemptions = self._scheduler.totals.num_preemptions
            self._look_for_preempted(now)
        for i in (self._planned[rows] != seq_ids).nonzero()[0].tolist():
            self._admit(int(rows[i]), int(seq_ids[i]), now)

    def step(self, output: StepOutput, end: float, seconds: float) -> None:
        """Take in a committed step that ended at ``end``."""
        self._draw(output.rows, output.seq_ids, end, end)
        self.occupancy.step(end, seconds, len(output.rows))
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
            self._note_run(life, row, now)
            self._planned[row] = self._drew[row] = -1
            life.queued, life.row = now, -1

    def _draw(self, rows: Int32 | Int64, seq_ids: Int64, end: float, last: float) -> None:
        """Note who drew a token in a step, [S] rows and sequences, and the gaps since the last one.

        Args:
            last: When they draw for the last time before they are looked at again.
        """
        if self.detail is not None:
            self.detail.draw(seq_ids, np.array([end]))
        fresh = self._drew[rows] != seq_ids
        if np.count_nonzero(fresh):
            for row, seq_id in zip(rows[fresh].tolist(), seq_ids[fresh].tolist(), strict=True):
                self._draw_first(row, seq_id, end)
            self.latency["itl"].add(end - self._last[rows[~fresh]])
        else:
            self.latency["itl"].add(end - self._last[rows])
        self._last[rows] = last

    def _draw_first(self, row: int, seq_id: int, end: float) -> None:
        """Note that a sequence has drawn its first token in a row."""
        life = self._lives[seq_id]
        if math.isnan(life.first):
            life.first = end
            self._note(life, life.row, "prefill", life.began, end)
        else:
            self.latency["itl"].add(end - life.last)
        self._drew[row] = seq_id

    def _finish(self, ended: FinishedSequence, now: float) -> None:
        life = self._lives.pop(ended.seq_id)
        reason = ended.finish_reason
        self.num_ended[reason] += 1
        request, count = life.request, len(ended.token_ids)
        row = life.row
        if row >= 0:
            self._note_run(life, row, now)
            if self._planned[row] == ended.seq_id:
                self._planned[row] = self._drew[row] = -1
        if self.detail is not None:
            self.detail.finish(int(life.name), request, ended)
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
        else:
            self._break_off(request)
        self.last_end = max(self.last_end, now)

    # Steps, by the array

    def leap(self, leap: Leap, pool: Pool, begin: float, ends: Float64, seconds: Float64) -> None:
        """Take in an extended leap before it is committed.

        Args:
            pool: As it was before its blocks were taken.
            begin: When its first step began.
            ends, seconds: [K] When each step ended, and how long it took.
        """
        batch, drawing = leap.decision.batch, leap.drawing
        self.begin(batch.rows, batch.seq_ids, begin)
        all_draw = len(drawing) == len(batch.rows)
        seq_ids = batch.seq_ids if all_draw else self._scheduler.table.seq_id[drawing]
        self._draw(drawing, seq_ids, float(ends[0]), float(ends[-1]))
        if len(ends) > 1 and len(drawing):
            self.latency["itl"].add(np.diff(ends), len(drawing))
            if self.detail is not None:
                self.detail.draw(seq_ids, ends[1:])
        self.occupancy.leap(leap, pool, ends, seconds)
        self.tenants.step(batch.rows, seconds, leap)

    def stride(self, stride: Stride, asked: list[Asked], begin: float) -> None:
        """Take in steps that were taken at once. None pushes anybody back, and whoever was pushed
        back before has come back in a step that was looked at.

        Args:
            asked: Per arrival among them, what was asked for.
            begin: When the first step began.
        """
        runs, steps = stride.foreseen.runs, stride.foreseen.steps
        times, ends = [begin, *steps.ends], np.array(steps.ends)
        draws = [run for run in runs if run.entered < 0 and run.first == 0]
        rows = np.array([run.row for run in draws], np.int64)
        seq_ids = np.array([run.seq.seq_id for run in draws], np.int64)
        # In the order in which it happens; what ends a step comes before what the next begins with.
        events = [(2 * step, 0, i) for i, step in enumerate(stride.foreseen.came)]
        events += [(2 * run.entered, 1, w) for w, run in enumerate(runs) if run.entered >= 0]
        events += [(2 * run.first + 1, 2, w) for w, run in enumerate(runs) if run.first >= 0]
        events += [(2 * runs[w].end + 1, 3, i) for i, (w, _) in enumerate(stride.finished)]
        if draws:
            self._draw(rows, seq_ids, times[1], times[-1])
        for when, kind, i in sorted(events):
            now = times[(when + 1) // 2]
            if kind == 0:
                self._came(stride.seq_ids[i], asked[i], now)
            elif kind == 1:
                self._admit(runs[i].row, runs[i].seq.seq_id, now)
            elif kind == 2:
                self._draw_on(runs[i], ends, now)
            else:
                self._finish(stride.finished[i][1], now)
        often = np.array(steps.decoding[1:], np.int64)
        drew = often > 0
        self.latency["itl"].add_each(np.diff(ends)[drew], often[drew])
        stay = np.array([run.row for run in runs if run.end < 0 <= run.first], np.int64)
        self._last[stay] = times[-1]
        self.tenants.stride(stride)
        self.occupancy.stride(steps, self._scheduler.manager.pool.num_blocks)

    def _came(self, seq_id: int, asked: Asked, now: float) -> None:
        if asked.refusal:
            self.refuse(asked.request, asked.refusal)
        else:
            self.add(seq_id, asked.request, asked.name, now)

    def _draw_on(self, run: Run, ends: Float64, now: float) -> None:
        """Note the draws of a run; of one that ran before, all but the first were noted."""
        seq_id, ran = run.seq.seq_id, run.entered < 0 and run.first == 0
        if not ran:
            self._draw_first(run.row, seq_id, now)
        if self.detail is not None:
            draws = ends[run.first + ran : run.end + 1 if run.end >= 0 else None]
            self.detail.draw(np.array([seq_id]), draws)

    def planned(self, plan: StepPlan, begin: float, seconds: float) -> None:
        """Look at who runs and what is held between schedule and commit."""
        self.begin(plan.rows, plan.seq_ids, begin)
        self.tenants.step(plan.rows, np.array([seconds]))
        self.occupancy.planned(plan)

    def _note_run(self, life: _Life, row: int, now: float) -> None:
        """Note what a sequence that leaves its row has done there last."""
        if math.isnan(life.first):
            self._note(life, row, "prefill", life.began, now)
        else:
            self._note(life, row, "decode", max(life.first, life.began), now)

    def _note(self, life: _Life, row: int, kind: str, begin: float, end: float) -> None:
        if not self._watch or math.isnan(begin):
            return
        if len(self.phases) < _WATCHED:
            self.phases.append(Phase(life.name, row, kind, begin, end))
        else:
            self.num_unwatched += 1
