"""How full a pool was and how much ran in it, over time."""

from typing import NamedTuple

import numpy as np

from pagedkv.core.arrays import Float64, Int32, Int64
from pagedkv.core.foreseen import Steps
from pagedkv.core.leap import NEVER, Leap
from pagedkv.core.manager import BlockManager
from pagedkv.core.plan import StepPlan
from pagedkv.core.scheduler import Scheduler
from pagedkv.sim.sketch import Series

__all__ = ["SERIES", "Occupancy", "Pool"]

SERIES = ("held", "cached", "running", "waiting", "wasted_slots", "tokens")
_AT_ONCE = 512
_NOT_YET: Float64 = np.empty(0)


class Pool(NamedTuple):
    """How many blocks are held, cached and blank."""

    held: int
    cached: int
    blank: int

    @classmethod
    def of(cls, manager: BlockManager) -> "Pool":
        """Count a manager's blocks."""
        pool = manager.pool
        cached, available = pool.num_cached, pool.num_available
        return cls(pool.num_blocks - available, cached, available - cached)


class _Stretch(NamedTuple):
    """A step, or those of a leap: how long, which took how many blocks, what they began with."""

    ends: Float64
    seconds: Float64
    taken_at: Int32
    pool: Pool
    running: int
    waiting: int
    wasted: int  # slots of held blocks that are empty, after the first step but for what it takes
    entries: int  # of all block tables, during the first step
    freed: int  # how many fewer each step after it leaves empty, but for the blocks it takes
    first: int  # tokens that the first step computes
    then: int  # those of each after it
    drawn: int


class Occupancy:
    """Series of one engine's pool, and the busiest second of its clock.

    Steps and leaps are kept as they are and unfolded many at once.

    Attributes:
        series: Of the quantities in `SERIES`.
        most_tokens_per_second: The most that were drawn in any second.
        entry_seconds: Block table entries in use, summed over time: a block that several sequences
            share counts for each.
        most_entries: The most that were in use in a step.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._size = scheduler.manager.block_size
        self._series = Series(SERIES)
        self._stretches: list[_Stretch] = []
        self._planned: _Stretch | None = None
        self._entry_seconds, self._most_entries = 0.0, 0
        self._second, self._tokens, self._most = -1, 0, 0

    @property
    def series(self) -> Series:
        """The series, of all that came so far."""
        self._unfold()
        return self._series

    @property
    def most_tokens_per_second(self) -> int:
        """The most tokens that were drawn in any second."""
        self._unfold()
        return self._most

    @property
    def entry_seconds(self) -> float:
        """Block table entries in use, summed over time."""
        self._unfold()
        return self._entry_seconds

    @property
    def most_entries(self) -> int:
        """The most block table entries that were in use in a step."""
        self._unfold()
        return self._most_entries

    def begin(self, now: float) -> None:
        """Say when time begins, before anything is added: series are finest from there on."""
        self._series.start = now

    def idle(self, since: float, now: float) -> None:
        """Take in time in which nobody asked: all that is there is cached blocks."""
        self._unfold()
        since = max(since, self._series.start)
        cached = Pool.of(self._scheduler.manager).cached
        values = np.array([[cached if name == "cached" else 0 for name in SERIES]], np.float64)
        self._series.add(np.array([now]), np.array([now - since]), values)

    def came(self, now: float, seconds: float) -> None:
        """Take in a request that came so many seconds before ``now``, during a step: it waited."""
        if seconds:
            self._series.add_to("waiting", now, seconds)

    def planned(self, plan: StepPlan) -> None:
        """Look at the pool between schedule and commit: what the step holds while it runs."""
        entries, wasted = self._in_use(plan.num_tokens)
        self._planned = _Stretch(
            ends=_NOT_YET,
            seconds=_NOT_YET,
            taken_at=NEVER,
            pool=Pool.of(self._scheduler.manager),
            running=self._running,
            waiting=self._scheduler.num_waiting,
            wasted=wasted,
            entries=entries,
            freed=0,
            first=plan.num_tokens,
            then=0,
            drawn=0,
        )

    @property
    def _running(self) -> int:
        """Who is in the batch, whether or not this step computes anything for them."""
        return len(self._scheduler.table.running)

    def _in_use(self, num_tokens: int, ahead: int = 0) -> tuple[int, int]:
        """Return how many table entries are in use, and how many of their slots are empty.

        Args:
            num_tokens: Those that the step computes; they count as there.
            ahead: Entries in the tables that later steps need first.
        """
        table = self._scheduler.table
        entries = int(table.num_blocks.sum()) - ahead
        resident = int(table.num_resident.sum()) + table.num_groups * num_tokens
        return entries, entries * self._size - resident

    def step(self, end: float, seconds: float, drawn: int) -> None:
        """Take in the step that was planned last: when it ended, how long it took, tokens drawn."""
        assert self._planned is not None
        ends, took = np.array([end]), np.array([seconds])
        self._keep(self._planned._replace(ends=ends, seconds=took, drawn=drawn))

    def leap(self, leap: Leap, pool: Pool, ends: Float64, seconds: Float64) -> None:
        """Take in an extended leap before it is committed.

        Args:
            pool: As it was before its blocks were taken.
            ends, seconds: [K] When each of its steps ended, and how long it took.
        """
        first = leap.decision.batch.num_tokens
        entries, wasted = self._in_use(first, len(leap.taken_at))
        self._keep(
            _Stretch(
                ends=ends,
                seconds=seconds,
                taken_at=leap.taken_at,
                pool=pool,
                running=self._running,
                waiting=self._scheduler.num_waiting,
                wasted=wasted,
                entries=entries,
                freed=len(leap.resident) * leap.more,
                first=first,
                then=leap.more,
                drawn=len(leap.drawing),
            )
        )

    def stride(self, steps: Steps, num_blocks: int) -> None:
        """Take in steps that were taken at once.

        Args:
            steps: What each was like.
            num_blocks: Those of the pool.
        """
        self._unfold()
        ends, seconds = np.array(steps.ends), np.array(steps.seconds)
        available, entries = np.array(steps.available), np.array(steps.entries)
        columns = (
            num_blocks - available,
            available - np.array(steps.blank),
            np.array(steps.running),
            np.array(steps.waiting),
            entries * self._size - np.array(steps.resident),
            np.array(steps.tokens),
        )
        self._series.add(ends, seconds, np.stack(columns, axis=1).astype(np.float64))
        self._entry_seconds += float(seconds @ entries)
        self._most_entries = max(self._most_entries, int(entries.max()))
        self._count(ends.astype(np.int64), np.array(steps.drawn))

    def _keep(self, stretch: _Stretch) -> None:
        self._stretches.append(stretch)
        if len(self._stretches) >= _AT_ONCE:
            self._unfold()

    def _unfold(self) -> None:
        """Count what has come in, step by step."""
        if not self._stretches:
            return
        stretches, self._stretches = self._stretches, []
        steps = np.array([len(each.ends) for each in stretches])
        start = np.cumsum(steps) - steps
        # What each step is like, from what its leap began with.
        facts = np.repeat(np.array([(*e.pool, *e[4:]) for e in stretches]), steps, axis=0)
        held, cached, blank, running, waiting, wasted, entries, freed, first, then, drawn = facts.T
        repeat = np.arange(len(facts)) - np.repeat(start, steps)
        fresh = self._taken_so_far(stretches, start, steps)
        ends = np.concatenate([each.ends for each in stretches])
        columns = (
            held + fresh,
            cached - np.maximum(0, fresh - blank),
            running,
            waiting,
            wasted + fresh * self._size - repeat * freed,
            np.where(repeat, then, first),
        )
        seconds = np.concatenate([each.seconds for each in stretches])
        self._series.add(ends, seconds, np.stack(columns, axis=1).astype(np.float64))
        self._entry_seconds += float(seconds @ (entries + fresh))
        self._most_entries = max(self._most_entries, int((entries + fresh).max()))
        self._count(ends.astype(np.int64), drawn)

    @staticmethod
    def _taken_so_far(stretches: list[_Stretch], start: Int64, steps: Int64) -> Int64:
        """Return how many blocks each step's leap had taken by then."""
        taken_at = np.concatenate([each.taken_at for each in stretches])
        of = np.repeat(start, [len(each.taken_at) for each in stretches])
        taken: Int64 = np.bincount(taken_at + of, minlength=int(steps.sum()))
        total = np.cumsum(taken)
        fresh: Int64 = total - np.repeat(total[start] - taken[start], steps)
        return fresh

    def _count(self, seconds: Int64, drawn: Int64) -> None:
        """Keep the most tokens of a second: [K] seconds, ascending, [K] tokens of each step."""
        begin = np.concatenate([[0], np.flatnonzero(np.diff(seconds)) + 1])
        tokens = np.add.reduceat(drawn, begin)
        if self._second == int(seconds[0]):
            tokens[0] += self._tokens
        self._second, self._tokens = int(seconds[-1]), int(tokens[-1])
        self._most = max(self._most, int(tokens.max()))
