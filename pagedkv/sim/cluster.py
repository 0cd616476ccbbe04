"""Many replicas, and the users in front of them: a whole workload."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.sim.simulator import Replica
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["ROUTES", "Cluster"]

_AHEAD = 128
"""Requests that each replica is told of at once, where none depends on another."""


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
            progress: Is told how many requests have ended, from time to time.
        """
        done = 0
        self._feeds_back = workload.closed_loop or self._limit < np.inf
        arrivals = iter(workload)
        coming = next(arrivals, None)
        self.began = workload.began
        for replica in self.replicas:
            replica.recorder.occupancy.begin(self.began)
        if self._route is _round_robin and not self._feeds_back:
            self._deal(itertools.chain([coming] if coming is not None else [], arrivals), progress)
            return
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

    def _deal(self, arrivals: Iterator[SimRequest], progress: Callable[[int], None] | None) -> None:
        """Serve requests that are dealt in turns, whatever comes of them: replicas need not wait
        for each other.
        """
        done, replicas = 0, self.replicas
        hand = list(itertools.islice(arrivals, _AHEAD * len(replicas)))
        while hand:
            following = list(itertools.islice(arrivals, _AHEAD * len(replicas)))
            until = following[0].arrival if following else np.inf
            for request in hand:
                number, self._num_sent = self._num_sent, self._num_sent + 1
                replicas[self._route(replicas, number)].expect(request, str(number))
            for replica in replicas:
                ended = replica.serve(until)
                done += ended
                if ended and progress is not None:
                    progress(done)
            hand = following

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

        Stops at the first ends, since they may bring requests before ``now``.
        """
        while True:
            behind = _behind(self.replicas, now)
            if not behind:
                return []
            replica = min(behind, key=lambda each: each.clock)
            horizon = now
            if len(behind) > 1 and self._feeds_back:
                horizon = min(r.clock for r in behind if r is not replica)
                horizon = max(horizon, np.nextafter(replica.clock, np.inf))
            ended = replica.advance(horizon)
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
