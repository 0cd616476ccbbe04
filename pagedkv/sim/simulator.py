"""The engine's loop under a virtual clock: one replica, many replicas, a whole workload."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from pagedkv.config import LARGEST_INT32, EngineConfig, with_fields
from pagedkv.core.arrays import Float64
from pagedkv.core.engine import Engine
from pagedkv.core.leap import begin_leg, commit_leg, extend_leap, schedule_leap
from pagedkv.core.request import FinishedSequence, Request, SamplingParams
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import ConfigError, InvalidRequest, InvalidTransition, NeverFits
from pagedkv.sim.cost import CostModel
from pagedkv.sim.executor import CostExecutor
from pagedkv.sim.occupancy import Pool
from pagedkv.sim.recorder import Recorder
from pagedkv.sim.slo import Objective
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["ROUTES", "Cluster", "Replica"]

_LONGEST_LEAP = 256


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
        self._requests: dict[str, SimRequest] = {}
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

    def add(self, request: SimRequest, name: str) -> bool:
        """Hand a request to the scheduler; False if it refused it for good, which is counted."""
        if not self.busy and request.arrival > self.clock:
            self.recorder.occupancy.idle(self.clock, request.arrival)
            self.executor.clock = self.clock = request.arrival
        try:
            seq_ids = self.scheduler.add(
                Request(
                    request_id=name,
                    prompt_token_ids=request.prompt.token_ids(),
                    sampling=SamplingParams(
                        max_tokens=request.output_len, seed=request.output_stream, ignore_eos=True
                    ),
                    priority=request.priority,
                    tenant=request.tenant,
                    arrival=request.arrival,
                )
            )
        except NeverFits:
            self.recorder.refuse(request, "larger than the pool")
            return False
        except InvalidRequest as fault:
            self.recorder.refuse(request, self._why(request, fault))
            return False
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

    def advance(self, until: float, *, past_ends: bool = False) -> list[tuple[SimRequest, bool]]:
        """Step until the clock reaches ``until``, nothing is left, or requests have ended.

        Args:
            past_ends: Whether a leap in which some end may go on: nobody needs to know when.

        Returns:
            The requests that ended in the last step, or leap, and of each whether it was served.
        """
        ended: list[tuple[SimRequest, bool]] = []
        while not ended and self.clock < until and self.busy:
            leaping = self._leap(until, past_ends=past_ends) if self._leaps else None
            finished = self._step() if leaping is None else leaping
            ended = [
                (self._requests.pop(end.request_id), end.finish_reason != "error")
                for end in finished
            ]
        return ended

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

    def _leap(self, until: float, *, past_ends: bool) -> list[FinishedSequence] | None:
        """Take steps as one until the clock reaches ``until``, or as long as they are alike; who
        ended. None, and nothing happened, if that cannot be foreseen.
        """
        scheduler = self.scheduler
        leap = schedule_leap(scheduler, _LONGEST_LEAP, past_ends=past_ends)
        if leap is None:
            return None
        rows = leap.decision.batch.rows
        seconds = self.executor.leap_seconds(leap) if len(rows) else np.zeros(1)
        ends = _ends(self.clock, seconds, until)
        leap = extend_leap(
            scheduler, leap, self.executor.leap_tokens(scheduler.table, leap, len(ends))
        )
        self.recorder.leap(leap, self.clock, ends)
        finished: list[FinishedSequence] = []
        leg = None
        for stop in leap.stops:
            pool = Pool.of(scheduler.manager)
            leg = begin_leg(scheduler, leap, leg)
            self.recorder.leg(leg, pool, ends, seconds)
            ended = commit_leg(scheduler, leap, leg)
            self.recorder.end(ended, float(ends[stop - 1]))
            finished += ended
        self._check_progress(len(rows), finished)
        self.executor.land(leap, float(ends[leap.steps - 1]))
        self.clock = self.executor.clock
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


def _round_robin(replicas: list[Replica], number: int) -> int:
    return number % len(replicas)


def _least_loaded(replicas: list[Replica], number: int) -> int:
    del number
    return min(range(len(replicas)), key=lambda i: (replicas[i].num_in_flight, i))


ROUTES: dict[str, Callable[[list[Replica], int], int]] = {
    "round_robin": _round_robin,
    "least_loaded": _least_loaded,
}
"""How requests are dealt to replicas."""


class Cluster:
    """Replicas behind a router, and the users in front of it.

    Args:
        replicas: The engines.
        route: A name of `ROUTES`.
        max_concurrency: Users that send one request at a time: the next is held back, and counts
            as arrived, only when another has ended. None sends everything when it is due.

    Attributes:
        began: When the first request of the workload came.
    """

    def __init__(
        self,
        replicas: list[Replica],
        *,
        route: str = "round_robin",
        max_concurrency: int | None = None,
    ) -> None:
        if route not in ROUTES:
            raise ConfigError(
                f"there is no way of routing {route!r}",
                where="routing",
                remedy=f"give one of {', '.join(ROUTES)}",
            )
        if not replicas:
            raise ConfigError("there is no replica", where="replicas", remedy="give 1 or more")
        if max_concurrency is not None and max_concurrency < 1:
            raise ConfigError(
                f"max_concurrency is {max_concurrency}",
                where="max_concurrency",
                remedy="give 1 or more, or leave it out",
            )
        self.replicas = replicas
        self._route = ROUTES[route]
        self._limit: float = max_concurrency or np.inf
        self._num_sent = 0
        self._due: list[tuple[float, int, SimRequest]] = []  # follow-ups, by time and order
        self._tie = itertools.count()
        self._held: deque[SimRequest] = deque()
        self._in_flight = 0
        self._freed: list[float] = []  # under a limit, when who still counts as in flight ended
        self._feeds_back = True
        self.began = 0.0

    def run(self, workload: Workload, progress: Callable[[int], None] | None = None) -> None:
        """Serve a workload to its end.

        Args:
            progress: Is told how many requests have ended, at every arrival and end.
        """
        done = 0
        self._feeds_back = workload.closed_loop or self._limit < np.inf
        arrivals = iter(workload)
        coming = next(arrivals, None)
        self.began = workload.began
        for replica in self.replicas:
            replica.recorder.occupancy.begin(self.began)
        while True:
            follow = self._due[0][0] if self._due else np.inf
            fresh = coming.arrival if coming is not None else np.inf
            freed = self._freed[0] if self._freed else np.inf
            now = min(follow, fresh, freed)
            ended = self._advance(now)
            if ended:
                done += len(ended)
                if progress is not None:
                    progress(done)
            elif np.isinf(now):
                break
            elif self._freed and not _behind(self.replicas, freed):
                self._free()
            elif follow <= fresh:
                self._offer(heapq.heappop(self._due)[2])
            else:
                assert coming is not None
                self._offer(coming)
                coming = next(arrivals, None)

    def _offer(self, request: SimRequest) -> None:
        if self._in_flight >= self._limit:
            self._held.append(request)
        else:
            self._send(request)

    def _send(self, request: SimRequest) -> None:
        number, self._num_sent = self._num_sent, self._num_sent + 1
        replica = self.replicas[self._route(self.replicas, number)]
        if replica.add(request, str(number)):
            self._in_flight += 1

    def _advance(self, now: float) -> list[tuple[SimRequest, bool]]:
        """Run replicas up to ``now``, the one that is furthest behind first; who ended, and whether
        it was served.

        Stops at the first ends, since they may bring requests before ``now``. If none can, only
        the replica that what comes then goes to is run: its leaps are not cut by what others get.
        """
        concerned = self.replicas
        if self._route is _round_robin and not self._feeds_back and now < np.inf:
            concerned = [self.replicas[_round_robin(self.replicas, self._num_sent)]]
        while True:
            behind = _behind(concerned, now)
            if not behind:
                return []
            replica = min(behind, key=lambda each: each.clock)
            horizon = now
            if len(behind) > 1 and self._feeds_back:
                horizon = min(r.clock for r in behind if r is not replica)
                horizon = max(horizon, np.nextafter(replica.clock, np.inf))
            ended = replica.advance(horizon, past_ends=not self._feeds_back)
            if ended:
                for request, served in ended:
                    self._follow(request if served else None, replica.clock)
                return ended

    def _follow(self, request: SimRequest | None, now: float) -> None:
        """A request has ended: what its user does next, and when another may come in its place.

        Args:
            request: None if it was not served; its user does not go on.
        """
        if self._limit < np.inf:
            heapq.heappush(self._freed, now)
        if request is not None and request.then is not None:
            follow = msgspec.structs.replace(request.then, arrival=now + request.then.think)
            heapq.heappush(self._due, (follow.arrival, next(self._tie), follow))

    def _free(self) -> None:
        """Let those come who are held back until the first of the ends, which every replica has
        reached: one that is behind would serve them before they arrive.
        """
        now = heapq.heappop(self._freed)
        self._in_flight -= 1
        while self._held and self._in_flight < self._limit:
            held = self._held.popleft()
            self._send(msgspec.structs.replace(held, arrival=max(held.arrival, now)))


def _behind(replicas: list[Replica], now: float) -> list[Replica]:
    """Return those that have work before ``now``."""
    return [replica for replica in replicas if replica.busy and replica.clock < now]
