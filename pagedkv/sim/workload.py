"""Who asks for what, and when: the input of a simulation."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec
from msgspec import Struct

from pagedkv.errors import TraceError
from pagedkv.sim.content import Content
from pagedkv.sim.ranges import check

__all__ = ["SimRequest", "Workload"]


class SimRequest(Struct, kw_only=True, eq=False):
    """One request of a workload.

    Attributes:
        arrival: Seconds since the simulation's start; of a follow-up, set when its turn comes.
        prompt: What it says.
        output_len: Tokens it generates, exactly.
        output_stream: The stream its answer's tokens are from.
        tenant: On whose account.
        session: The conversation it is part of, if any.
        priority: Lower is sooner.
        think: Seconds between the end of the request before and this follow-up.
        then: The follow-up, which arrives `think` seconds after this one has ended.
    """

    arrival: float
    prompt: Content
    output_len: int
    output_stream: int
    tenant: str = ""
    session: str = ""
    priority: int = 0
    think: float = 0.0
    then: "SimRequest | None" = None

    def turns(self) -> Iterator["SimRequest"]:
        """Yield this request and its follow-ups, in order."""
        turn: SimRequest | None = self
        while turn is not None:
            yield turn
            turn = turn.then


class Workload:
    """A named stream of requests in order of arrival, read once per iteration.

    Args:
        name: What it is, for reports.
        source: Makes a fresh iterator over the requests; they must come in order of arrival.
        block_size: Tokens that one of the trace's own hashes stands for; 0 where it has none.
        closed_loop: Whether requests have follow-ups.
        skipped: Rows that were left out while reading, by reason; filled as the source is read.
    """

    def __init__(
        self,
        name: str,
        source: Callable[[], Iterable[SimRequest]],
        *,
        block_size: int = 0,
        closed_loop: bool = False,
        skipped: Counter[str] | None = None,
    ) -> None:
        self.name = name
        self.block_size = block_size
        self.closed_loop = closed_loop
        self.skipped: Counter[str] = Counter() if skipped is None else skipped
        self._source = source
        self._began: float | None = None
        self._whole: Workload | None = None  # if this is one of several parts of it

    @property
    def began(self) -> float:
        """When the first request came, of the whole if this is a part of one; 0 if unread."""
        if self._whole is not None:
            return self._whole.began
        return self._began or 0.0

    def __iter__(self) -> Iterator[SimRequest]:
        """Read from the start.

        Raises:
            TraceError: A request arrives before the one before it.
        """
        before = 0.0
        for request in self._source():
            if request.arrival < before:
                raise TraceError(
                    f"a request arrives at {request.arrival:g} s after one at {before:g} s",
                    where=self.name,
                    remedy="sort the requests by arrival",
                )
            before = request.arrival
            if self._began is None:
                self._began = before
            yield request

    def head(self, count: int | None) -> "Workload":
        """Return the workload's first ``count`` requests; all of it for None.

        Follow-ups count: the last conversation is cut where the number is reached.

        Raises:
            ConfigError: The count is less than 1.
        """
        if count is None:
            return self
        check("workload", num_prompts=count)

        def source() -> Iterator[SimRequest]:
            left = count
            for request in self:
                turns = list(itertools.islice(request.turns(), left))
                yield request if turns[-1].then is None else _linked(turns)
                left -= len(turns)
                if not left:
                    return

        return self._derived(source)

    def dealt(self, number: int, processes: int, replicas: int) -> "Workload":
        """Return what round robin deals to the replicas ``number``, ``number + processes`` ...

        In turns among those alone, each of them gets the same.
        """

        def source() -> Iterator[SimRequest]:
            for i, request in enumerate(self):
                if i % replicas % processes == number:
                    yield request

        made = self._derived(source)
        made._whole = self
        return made

    def faster(self, speedup: float) -> "Workload":
        """Return the workload with arrivals ``speedup`` times as dense; think times stay.

        Raises:
            ConfigError: The factor is out of range.
        """
        check("workload", speedup=speedup)
        if speedup == 1:
            return self

        def source() -> Iterator[SimRequest]:
            for request in self:
                yield msgspec.structs.replace(request, arrival=request.arrival / speedup)

        return self._derived(source)

    def _derived(self, source: Callable[[], Iterable[SimRequest]]) -> "Workload":
        # Iterating the derived one iterates this one, which counts what it skips: one counter.
        made = Workload(self.name, source, block_size=self.block_size, closed_loop=self.closed_loop)
        made.skipped = self.skipped
        return made


def _linked(turns: list[SimRequest]) -> SimRequest:
    """Return copies of some turns, each followed by the next."""
    then = None
    for turn in reversed(turns):
        then = msgspec.structs.replace(turn, then=then)
    assert then is not None
    return then
