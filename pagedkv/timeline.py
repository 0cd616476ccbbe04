"""Who held which block when: a recorder for any engine, and what it recorded."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from pagedkv.core.arrays import Bool, Int32, Int64
from pagedkv.core.plan import StepOutput, StepPlan, StepResult
from pagedkv.core.scheduler import Scheduler

__all__ = ["CACHED", "FREE", "SHARED", "Span", "Timeline", "TimelineRecorder"]

FREE, CACHED, SHARED = -1, -2, -3
"""Entries of `Timeline.owner` that are not sequence ids."""


class Span(Struct, frozen=True, kw_only=True):
    """One stretch during which a sequence ran without a break.

    Attributes:
        begin: The first step it ran in.
        first_token: The first step that gave it a token; `end` if none did.
        end: One past the last step it ran in.
        preempted: Whether it was pushed back to waiting, rather than ended, after that.
    """

    seq_id: int
    begin: int
    first_token: int
    end: int
    preempted: bool


class Timeline(Struct, frozen=True, kw_only=True, eq=False):
    """What happened to a pool of blocks, step by step: S steps, N blocks.

    Attributes:
        owner: [S, N] The sequence that held each block during each step, or `FREE`, `CACHED`
            (free, content still findable) or `SHARED` (held by several sequences).
        num_running: [S] Sequences that held blocks.
        num_waiting: [S] Requests that waited.
        num_tokens: [S] Tokens computed.
        num_entries: [S] Blocks that all sequences held together if shared ones counted for each.
        num_copies: [S] Blocks copied because somebody wrote into a shared one.
        seconds: [S] When each step ended, by the recorder's clock; NaN without one.
        spans: Every stretch of running, in order of `begin`.
        request_of: Sequence id to request id.
    """

    owner: Int32
    num_running: Int32
    num_waiting: Int32
    num_tokens: Int32
    num_entries: Int32
    num_copies: Int32
    seconds: npt.NDArray[np.float64]
    spans: list[Span]
    request_of: dict[int, str]

    @property
    def num_shared(self) -> Int64:
        """[S] Blocks that several sequences held."""
        return _per_step(self.owner == SHARED)

    @property
    def num_held(self) -> Int64:
        """[S] Blocks that any sequence held, shared ones included."""
        return _per_step((self.owner >= 0) | (self.owner == SHARED))

    @property
    def num_cached(self) -> Int64:
        """[S] Free blocks whose content could still be found."""
        return _per_step(self.owner == CACHED)


class TimelineRecorder:
    """Records the pool at every step; append it to ``Engine.observers``.

    It shows each step as it was while it ran: blocks that a sequence gave back because it ended
    with the step count as held in it. Every step costs a few numpy calls and keeps
    4 * num_blocks bytes.

    Attributes:
        request_of: Sequence id to request id, of all that ran so far.

    Args:
        scheduler: The scheduler whose engine will call.
        clock: Seconds since any fixed moment; None records no times.
    """

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] | None = None) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._owner: list[Int32] = []
        self._counts: list[tuple[int, ...]] = []
        self._seconds: list[float] = []
        self._spans: list[Span] = []
        self._open: dict[int, tuple[int, int]] = {}
        self._running: Int64 = np.empty(0, np.int64)
        self._before: Int64 = np.empty(0, np.int64)
        self.request_of: dict[int, str] = {}

    def __call__(self, plan: StepPlan, result: StepResult, output: StepOutput) -> None:
        """Record a committed step."""
        del result
        blocks, seq_ids = self._held(plan)
        table = self._scheduler.table
        self._before = table.seq_id[table.running]
        running = np.unique(seq_ids)
        self._update_spans(running, output)
        self._owner.append(self._owners(blocks, seq_ids))
        waiting = self._scheduler.stats().num_waiting
        counts = (len(running), waiting, plan.num_tokens, len(blocks), len(plan.copies))
        self._counts.append(counts)
        self._seconds.append(self._clock() if self._clock else math.nan)

    @property
    def latest(self) -> Int32:
        """What `Timeline.owner` says of the last step: [N]; free everywhere before the first."""
        if self._owner:
            return self._owner[-1]
        return np.full(self._scheduler.manager.pool.num_blocks, FREE, np.int32)

    def _held(self, plan: StepPlan) -> tuple[Int32, Int64]:
        """Return the blocks that were held during the step, and by which sequence: both [E]."""
        manager = self._scheduler.manager
        table = manager.table
        used = -(-plan.num_resident // manager.block_size)
        blocks, seq_ids = _flatten(plan.block_table, used, plan.seq_ids)
        # A step's token budget may leave out some who run; who forked just now is not among them.
        idle = table.running[~np.isin(table.running, plan.rows)]
        idle = idle[np.isin(table.seq_id[idle], self._before)]
        more = _flatten(table.block_table[:, idle], table.num_blocks[:, idle], table.seq_id[idle])
        return np.append(blocks, more[0]), np.append(seq_ids, more[1])

    def _owners(self, blocks: Int32, seq_ids: Int64) -> Int32:
        """Return what `Timeline.owner` says of every block: [N]."""
        num_blocks = self._scheduler.manager.pool.num_blocks
        every = np.arange(num_blocks, dtype=np.int32)
        findable = self._scheduler.manager.index.findable(every)
        owner = np.where(findable, CACHED, FREE).astype(np.int32)
        owner[blocks] = seq_ids
        owner[np.bincount(blocks, minlength=num_blocks) > 1] = SHARED
        return owner

    def _update_spans(self, running: Int64, output: StepOutput) -> None:
        now = len(self._owner)
        for seq_id in np.setdiff1d(self._running, running).tolist():
            self._close(seq_id, now)
        for seq_id in np.setdiff1d(running, self._running).tolist():
            self._open[seq_id] = (now, -1)
            if seq_id not in self.request_of:
                self.request_of[seq_id] = self._request_id(seq_id, output)
        for seq_id in output.seq_ids.tolist():
            begin, first = self._open.get(seq_id, (now, 0))
            if first < 0:
                self._open[seq_id] = (begin, now)
        self._running = running

    def _close(self, seq_id: int, end: int) -> None:
        begin, first = self._open.pop(seq_id)
        span = Span(
            seq_id=seq_id,
            begin=begin,
            first_token=end if first < 0 else first,
            end=end,
            preempted=self._is_unfinished(seq_id),
        )
        self._spans.append(span)

    def _is_unfinished(self, seq_id: int) -> bool:
        try:
            self._scheduler.sequence(seq_id)
        except KeyError:
            return False
        return True

    def _request_id(self, seq_id: int, output: StepOutput) -> str:
        for end in output.finished:
            if end.seq_id == seq_id:
                return end.request_id
        return self._scheduler.sequence(seq_id).request.request_id

    def timeline(self) -> Timeline:
        """Return everything recorded so far; recording may go on.

        Raises:
            ValueError: Nothing was recorded yet.
        """
        if not self._owner:
            raise ValueError("no step was recorded")
        counts = np.array(self._counts, np.int32).T
        now = len(self._owner)
        running = [
            Span(seq_id=s, begin=begin, first_token=now if f < 0 else f, end=now, preempted=False)
            for s, (begin, f) in self._open.items()
        ]
        return Timeline(
            owner=np.stack(self._owner),
            num_running=counts[0],
            num_waiting=counts[1],
            num_tokens=counts[2],
            num_entries=counts[3],
            num_copies=counts[4],
            seconds=np.array(self._seconds),
            spans=sorted(self._spans + running, key=lambda span: (span.begin, span.seq_id)),
            request_of=dict(self.request_of),
        )


def _flatten(tables: Int32, used: Int32, seq_ids: Int64) -> tuple[Int32, Int64]:
    """Return the blocks in use in [G, B, W] tables and the sequence of each, both flat."""
    inside = np.arange(tables.shape[2]) < used[:, :, None]
    owners = np.broadcast_to(seq_ids[None, :, None], inside.shape)
    return tables[inside], owners[inside]


def _per_step(mask: Bool) -> Int64:
    """Count along the blocks: [S, N] to [S]."""
    counts: Int64 = mask.sum(axis=1, dtype=np.int64)
    return counts
