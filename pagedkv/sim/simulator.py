"""The engine's loop under a virtual clock: one replica."""

import numpy as np

from pagedkv.config import LARGEST_INT32, EngineConfig, with_fields
from pagedkv.core.arrays import Float64
from pagedkv.core.engine import Engine
from pagedkv.core.foreseen import Arrival
from pagedkv.core.foresight import foresee
from pagedkv.core.leap import commit_leap, extend_leap, schedule_leap
from pagedkv.core.request import FinishedSequence, Request, SamplingParams, Sequence
from pagedkv.core.scheduler import Scheduler
from pagedkv.core.stride import take_stride
from pagedkv.errors import InvalidRequest, InvalidTransition, NeverFits
from pagedkv.sim.cost import CostModel
from pagedkv.sim.executor import CostExecutor
from pagedkv.sim.occupancy import Pool
from pagedkv.sim.recorder import Asked, Recorder
from pagedkv.sim.slo import Objective
from pagedkv.sim.workload import SimRequest

__all__ = ["Replica"]

_LONGEST_LEAP, _LONGEST_STRIDE = 256, 4096
"""The most steps."""

_SHORTEST_STRIDE = 8
"""With fewer steps, a leap costs less."""


class Replica:
    """One simulated engine: the real scheduler, a cost model and a clock.

    Args:
        config: As for an engine; the model's vocabulary and end tokens are ignored, since a
            simulated token means nothing and lengths are given.
        cost: What a step takes.
        leap: Take quiet steps as one. Nothing but the time it takes to simulate depends on it.
        watch: Keep the phases of requests for a trace viewer.
        detail: Keep every request's own latencies.
        executor: Carries plans out instead of the cost model: a `Recording`, for example.
    """

    def __init__(
        self,
        config: EngineConfig,
        cost: CostModel,
        *,
        slo: Objective | None = None,
        leap: bool = True,
        watch: bool = False,
        detail: bool = False,
        executor: CostExecutor | None = None,
    ) -> None:
        config = with_fields(config, vocab_size=LARGEST_INT32, eos_token_ids=())
        self.scheduler = Scheduler(config)
        self.executor = executor or CostExecutor(cost, config.cache.block_size)
        self.clock = 0.0
        self.num_leaps = 0
        self._leaps = leap
        self._longest_stride = _LONGEST_STRIDE
        self._in_vain = self._pause = 0  # strides that were refused in a row; how many to leave out
        self._requests: dict[str, SimRequest] = {}
        self._asked: list[Asked] = []  # who will come
        self._arrivals: list[Arrival] = []
        self.recorder = Recorder(self.scheduler, slo or Objective(), watch=watch, detail=detail)
        self.executor.on_plan = self.recorder.planned
        self.engine = Engine(self.scheduler, self.executor)

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or running."""
        return self.scheduler.has_unfinished()

    @property
    def num_in_flight(self) -> int:
        """Requests waiting or running."""
        return len(self._requests)

    def expect(self, request: SimRequest, name: str) -> None:
        """Get ready for a request that comes later than all expected so far; see `serve`."""
        group, refusal = self._prepared(request, name)
        self._asked.append(Asked(request, name, refusal))
        self._arrivals.append(Arrival(request.arrival, group))

    def add(self, request: SimRequest, name: str) -> bool:
        """Hand a request to the scheduler; False if it refused it for good, which is counted."""
        group, refusal = self._prepared(request, name)
        return self._add(Asked(request, name, refusal), group)

    def _prepared(self, request: SimRequest, name: str) -> tuple[list[Sequence], str]:
        """Return the sequences of a request, or why it is refused."""
        sampling = SamplingParams(
            max_tokens=request.output_len, seed=request.output_stream, ignore_eos=True
        )
        try:
            asked = Request(
                request_id=name,
                prompt_token_ids=request.prompt.token_ids(),
                sampling=sampling,
                priority=request.priority,
                tenant=request.tenant,
                arrival=request.arrival,
            )
            return self.scheduler.prepare(asked), ""
        except NeverFits:
            return [], "larger than the pool"
        except InvalidRequest as fault:
            return [], self._why(request, fault)

    def _add(self, asked: Asked, group: list[Sequence]) -> bool:
        request, name, refusal = asked
        if not self.busy and request.arrival > self.clock:
            self.recorder.occupancy.idle(self.clock, request.arrival)
            self.executor.clock = self.clock = request.arrival
        if refusal:
            self.recorder.refuse(request, refusal)
            return False
        seq_ids = self.scheduler.enlist(group)
        self._requests[name] = request
        self.recorder.add(seq_ids[0], request, name, self.clock)
        return True

    def _why(self, request: SimRequest, fault: InvalidRequest) -> str:
        """Return why a request was not taken, in words that fit others like it."""
        if "prompt_token_ids" in fault.where:
            return "longer than the model takes"
        names = [entry.partition("=")[0] for entry in self.scheduler.config.scheduler.tenants]
        if names and request.tenant not in names:
            return f"of tenant {request.tenant!r}, who is none of {', '.join(map(repr, names))}"
        return "not accepted"

    def advance(self, until: float) -> list[tuple[SimRequest, bool]]:
        """Step until the clock reaches ``until``, nothing is left, or requests have ended.

        Returns:
            The requests that ended in the last step, or leap, and of each whether it was served.
        """
        ended: list[tuple[SimRequest, bool]] = []
        while not ended and self.clock < until and self.busy:
            leaping = self._leap(until) if self._leaps else None
            finished = self._step() if leaping is None else leaping
            ended = [
                (self._requests.pop(end.request_id), end.finish_reason != "error")
                for end in finished
            ]
        return ended

    def serve(self, until: float) -> int:
        """Step until the clock reaches ``until`` or nothing is left; whoever is expected comes in
        time, and nobody else before then.

        Returns:
            How many requests have ended.
        """
        ended = 0
        while True:
            while self._asked and (self._asked[0].request.arrival <= self.clock or not self.busy):
                self._add(self._asked.pop(0), self._arrivals.pop(0).group)
            if not self.busy or self.clock >= until:
                return ended
            finished = self._stride(until) if self._leaps else None
            if finished is not None:
                ended += len(finished)
                continue
            coming = self._asked[0].request.arrival if self._asked else until
            ended += len(self.advance(min(until, coming)))

    def _stride(self, until: float) -> list[FinishedSequence] | None:
        """Take all steps at once that can be foreseen; who ended. None, and nothing happened, if
        they are few or cannot be.
        """
        scheduler, executor = self.scheduler, self.executor
        if self._pause:
            self._pause -= 1
            return None
        pace, most = executor.pace(scheduler.totals.num_steps), self._longest_stride
        foreseen = foresee(scheduler, self._arrivals, self.clock, pace, until=until, most=most)
        if foreseen is None or len(foreseen) < _SHORTEST_STRIDE:
            return None
        self.recorder.tenants.begin_stride()
        stride = take_stride(scheduler, foreseen, self._arrivals, executor.answers)
        if stride is None:  # look less far, and less often, so that little is foreseen in vain
            self._longest_stride = max(_SHORTEST_STRIDE, len(foreseen) // 2)
            self._in_vain += 1
            self._pause = min(2**self._in_vain, 64)
            return None
        self._in_vain, self._longest_stride = 0, min(_LONGEST_STRIDE, 2 * most)
        came = slice(len(foreseen.came))
        asked = self._asked[came]
        del self._asked[came], self._arrivals[came]
        self._requests |= {each.name: each.request for each in asked if not each.refusal}
        finished = [ended for _, ended in stride.finished]
        self.recorder.stride(stride, asked, self.clock)
        for ended in finished:
            del self._requests[ended.request_id]
        executor.clock = self.clock = foreseen.steps.ends[-1]
        self.num_leaps += 1
        return finished

    def _step(self) -> list[FinishedSequence]:
        plan, _, output = self.engine.step()
        self._check_progress(plan.num_tokens, output.finished)
        self.clock = self.executor.clock
        self.recorder.step(output, self.clock, self.executor.last if plan.num_tokens else 0.0)
        return output.finished

    def _check_progress(self, num_tokens: int, finished: list[FinishedSequence]) -> None:
        if not num_tokens and not finished:
            raise InvalidTransition(
                "the scheduler has work and plans none of it",
                where=f"step {self.scheduler.totals.num_steps - 1}",
            )

    def _leap(self, until: float) -> list[FinishedSequence] | None:
        """Take steps as one until the clock reaches ``until``, or as long as they are alike; who
        ended. None, and nothing happened, if that cannot be foreseen.
        """
        scheduler, executor = self.scheduler, self.executor
        leap = schedule_leap(scheduler, _LONGEST_LEAP)
        if leap is None:
            return None
        rows, pool = leap.decision.batch.rows, Pool.of(scheduler.manager)
        seconds = executor.leap_seconds(leap) if len(rows) else np.zeros(1)
        ends = _ends(self.clock, seconds, until)
        token_ids = executor.leap_tokens(scheduler.table, leap, len(ends))
        leap = extend_leap(scheduler, leap, token_ids)
        ends, seconds = ends[: leap.steps], seconds[: leap.steps]
        self.recorder.leap(leap, pool, self.clock, ends, seconds)
        finished = commit_leap(scheduler, leap)
        executor.land(leap, float(ends[-1]))
        self.clock = executor.clock
        self.recorder.end(finished, self.clock)
        self._check_progress(len(rows), finished)
        self.num_leaps += leap.steps > 1
        return finished


def _ends(clock: float, seconds: Float64, until: float) -> Float64:
    """Return when steps end, added up as a clock would; the last is the first at ``until``."""
    ends = []
    for each in seconds.tolist():
        clock += each
        ends.append(clock)
        if clock >= until:
            break
    return np.array(ends)
