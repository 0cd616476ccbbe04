"""What will happen, as far as it is plain: who enters when, who draws, who ends, what is free.

Nothing is decided here that `Scheduler.schedule` would decide otherwise: this follows its passes
with a few numbers in place of the tables, step by step, and stops before the first step in which
anything else could matter: blocks that lack, a prefix that may be found, a request that may be
stopped. Nothing changes. `stride` takes such steps at once.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from pagedkv.core.admission import decayed, length_limit
from pagedkv.core.arrays import Int32, at_rows
from pagedkv.core.request import Sequence
from pagedkv.core.scheduler import Scheduler

__all__ = ["Arrival", "Foreseen", "Pace", "Run", "Steps", "foresee"]

Pace = Callable[[int, float, float], float]
"""Seconds of a step by its tokens, their context and their query-key pairs (`sim.cost.StepWork`)."""

NEVER = -1
FAR = 2**62


class Arrival(NamedTuple):
    """A request that will come: when, and what `Scheduler.prepare` made of it, or nothing."""

    time: float
    group: list[Sequence]


class Run:
    """A sequence's part in the steps that were foreseen.

    Attributes:
        seq: The sequence.
        row: Its row.
        limit: The number of known tokens at which it ends.
        ever: The most blocks it could ever hold.
        known, computed: Its tokens before the first step, or when it enters.
        held: The blocks that it held before.
        entered: The step, counted from 0, in which it enters; -1 if it ran before.
        first: The step in which it draws its first token; of one that ran before, of these steps.
        end: The step with which it ends; -1 if it does not.
    """

    __slots__ = (
        "computed",
        "end",
        "entered",
        "ever",
        "first",
        "held",
        "known",
        "limit",
        "row",
        "seq",
    )

    def __init__(
        self, seq: Sequence, row: int, limit: int, block_size: int, *, known: int, computed: int
    ) -> None:
        self.seq = seq
        self.row = row
        self.limit = limit
        self.ever = -(-(limit - 1) // block_size)
        self.known = known
        self.computed = computed
        self.held = -(-computed // block_size)
        self.entered = self.first = self.end = NEVER

    @property
    def last(self) -> int:
        """The last step that it takes part in, be it one of these or not."""
        return self.end if self.end >= 0 else FAR


class Steps(Struct, kw_only=True):
    """What each of the steps is like, in order.

    Attributes:
        ends: When it ends.
        seconds: How long it takes.
        tokens: What it computes.
        decoding: Sequences that draw a token now and drew one in the step before.
        drawn: All that draw one.
        running, waiting: Sequences, once it is decided who enters.
        available, blank: Blocks, while it runs.
        entries: Of all block tables, while it runs.
        resident: Tokens, once it has computed its own.
    """

    ends: list[float] = []
    seconds: list[float] = []
    tokens: list[int] = []
    decoding: list[int] = []
    drawn: list[int] = []
    running: list[int] = []
    waiting: list[int] = []
    available: list[int] = []
    blank: list[int] = []
    entries: list[int] = []
    resident: list[int] = []


class Foreseen(Struct, frozen=True, kw_only=True, eq=False):
    """Some steps in a row, as they will be taken.

    Attributes:
        steps: What each is like.
        runs: Everybody who computes, in order of admission.
        pieces: Stretches of tokens that runs compute: whose, from which step on, after how many
            of theirs, how many, and how many in each step; 0 for all in one.
        shared: Of runs, the blocks that others hold as well.
        came: Per arrival, the step before which it comes.
        ratio: What the admission's will be.
    """

    steps: Steps
    runs: list[Run]
    pieces: list[tuple[int, int, int, int, int]]
    shared: dict[int, list[int]]
    came: list[int]
    ratio: float

    def __len__(self) -> int:
        return len(self.steps.ends)


class _Entry(NamedTuple):
    """Who enters in a step, how many tokens it computes then, and in how many blocks."""

    seq: Sequence
    count: int
    blocks: int
    limit: int


def foresee(
    scheduler: Scheduler,
    arrivals: Ids[Arrival],
    clock: float,
    pace: Pace,
    *,
    until: float = inf,
    most: int = 4096,
) -> Foreseen | None:
    """Say what the next steps will be, for as long as that is plain. Changes nothing.

    Args:
        arrivals: Who will come, in order of time; nobody else comes before ``until``.
        clock: When the next step begins.
        pace: How long steps take.
        until: No step begins then, or later.
        most: The most steps.

    Returns:
        None if it is not plain from the start: then take an ordinary step.
    """
    if not _is_plain(scheduler):
        return None
    sight = _Foresight(scheduler, arrivals, clock, pace, until)
    if not sight.begin():
        return None
    while len(sight.steps.ends) < most and sight.step():
        pass
    return sight.foreseen() if sight.steps.ends else None


def _is_plain(scheduler: Scheduler) -> bool:
    """Return whether the rules are those that this module follows."""
    roster, manager, limits = scheduler._roster, scheduler.manager, scheduler.config.scheduler
    return not (
        roster.unforeseen
        or roster.finished
        or scheduler._outstanding is not None
        or scheduler.tenants.limited
        or scheduler.table.keeps_scores
        or manager.publisher.records
        or manager.num_groups > 1
        or any(scheduler.layout.windows)
        or limits.scheduling_policy != "fcfs"
        or limits.long_prefill_token_threshold
        or (manager.enable_prefix_caching and manager.pool.cached.order != "lru")
    )


class _Foresight:
    """The few numbers that the passes of a step come down to, and what they were in each step."""

    def __init__(
        self,
        scheduler: Scheduler,
        arrivals: Ids[Arrival],
        clock: float,
        pace: Pace,
        until: float,
    ) -> None:
        manager, limits = scheduler.manager, scheduler.config.scheduler
        self.steps = Steps()
        self._scheduler = scheduler
        self._manager = manager
        self._admission = scheduler.admission
        self._arrivals = arrivals
        self._clock, self._pace, self._until = clock, pace, until
        self._size = manager.block_size
        self._budget = limits.max_num_batched_tokens
        self._spare = int(limits.watermark * manager.pool.num_blocks)
        self._passes = limits.max_skips > 0
        self._caches = manager.enable_prefix_caching
        self._ratio = scheduler.admission.ratio
        self._runs: list[Run] = []
        self._pieces: list[tuple[int, int, int, int, int]] = []
        self._came: list[int] = []
        self._queue: deque[Sequence] = deque()
        self._checked: Sequence | None = None
        # Of those that draw in every step: how many, their resident tokens, by the step in which
        # they take a block, modulo its size, and by the step with which they end. Each has as many
        # tokens as the step's number and its base.
        self._decoding = 0
        self._context = 0
        self._phase = [0] * self._size
        self._ends_at: dict[int, list[int]] = {}
        self._base: dict[int, int] = {}
        self._since: dict[int, int] = {}
        # The one whose prompt goes on, if there is one: it is the last that was admitted.
        self._partial = NEVER
        self._done = 0
        # Blocks.
        self._available = manager.pool.num_available
        self._blank = self._available - manager.pool.num_cached
        # Were more taken, some might be that these steps have made findable.
        self._room = self._available if self._caches else FAR
        self._entries = self._resident = self._ever = 0
        self._shared: dict[int, list[int]] = {}
        self._holders: dict[int, int] = {}

    # Before the first step

    def begin(self) -> bool:
        """Look at who runs and waits; return whether that is plain."""
        table, roster = self._scheduler.table, self._scheduler._roster
        rows, at = table.running, at_rows(table.running)
        known, computed = table.num_known[at], table.num_computed[at]
        if len(rows) and not (table.publishes[at].all() and (known - computed)[:-1].max(initial=1) == 1):
            return False
        waiting = list(roster.waiting)
        if any(seq.num_preemptions for seq in waiting):
            return False
        self._queue.extend(waiting)
        columns = (rows, table.limit[at], known, computed)
        for w, (row, limit, tokens, done) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            seq = table.sequences[row]
            assert seq is not None
            run = Run(seq, row, limit, self._size, known=tokens, computed=done)
            self._runs.append(run)
            self._entries += run.held
            self._resident += done
            self._ever += run.ever
            if done + 1 == tokens:
                self._decode(w, done, 0, limit - tokens)
                run.first = 0
            else:
                self._partial, self._done = w, done
        self._firsts = {run.seq.hashes[0] for run in self._runs if run.seq.hashes}
        self._free = table.free_rows.tolist()  # ascending, so a heap
        self._look_for_shared(rows)
        return True

    def _look_for_shared(self, rows: Int32) -> None:
        """Note which blocks more than one of the rows hold: their ends need not free them."""
        pool, table = self._manager.pool, self._scheduler.table
        if self._entries == pool.num_held:
            return
        held = table.num_blocks[0, rows]
        width = int(held.max(initial=0))
        ids = table.block_table[0, rows, :width]
        shared = (pool.references(ids) > 1) & (np.arange(width) < held[:, None])
        ids = np.where(shared, ids, NEVER)
        for w in shared.any(axis=1).nonzero()[0].tolist():
            self._shared[w] = ids[w][shared[w]].tolist()
            for block in self._shared[w]:
                self._holders[block] = self._holders.get(block, 0) + 1

    # A step

    def step(self) -> bool:
        """Go through the next step; False, and nothing of it counts, if it is not plain."""
        step, size, decoding = len(self.steps.ends), self._size, self._decoding
        if not self._let_come(step) or self._clock >= self._until or decoding > self._budget:
            return False
        tokens, taken = decoding, self._phase[-step % size]
        context = self._context + decoding
        pairs = context - decoding / 2
        chunk = after = 0
        if self._partial >= 0:
            goal = self._runs[self._partial].known
            chunk = min(goal - self._done, self._budget - tokens)
            after = self._done + chunk
        if chunk:
            tokens, context = tokens + chunk, context + after
            pairs += after * chunk - chunk * chunk / 2
            taken += -(-after // size) - -(-self._done // size)
        left = self._available - taken
        if left < 0:
            return False
        ratio = decayed(self._ratio)
        entering: list[_Entry] | None = []
        if self._queue and tokens < self._budget and self._free:
            entering = self._enter(self._budget - tokens, left, self._entries + taken, ratio)
            if entering is None:
                return False
            for entry in entering:
                count = entry.count
                tokens, context = tokens + count, context + count
                pairs += count * count - count * count / 2
                taken += entry.blocks
        if not tokens or taken > self._room:
            return False
        self._ratio, self._room = ratio, self._room - taken
        self._available -= taken
        self._blank -= min(taken, self._blank)
        self._entries += taken
        self._resident += tokens
        seconds = self._pace(tokens, float(context), pairs)
        self._clock += seconds
        steps = self.steps
        steps.ends.append(self._clock)
        steps.seconds.append(seconds)
        steps.tokens.append(tokens)
        steps.decoding.append(decoding)
        steps.running.append(decoding + (self._partial >= 0) + len(entering))
        steps.waiting.append(len(self._queue) - len(entering))
        steps.available.append(self._available)
        steps.blank.append(self._blank)
        steps.entries.append(self._entries)
        steps.resident.append(self._resident)
        self._context += decoding
        over = self._ends_at.pop(step, [])
        steps.drawn.append(decoding + self._go_on(step, chunk, after, entering, over))
        if over:
            self._end(step, over)
        return True

    def _let_come(self, step: int) -> bool:
        """Let those come whose time it is; return whether there is anything to do."""
        while len(self._came) < len(self._arrivals):
            time, group = self._arrivals[len(self._came)]
            if time > self._clock:
                break
            if group and not self._scheduler.foresees(group[0]):
                return False
            self._came.append(step)
            self._queue.extend(group)
        return bool(self._decoding or self._partial >= 0 or self._queue)

    def _enter(
        self, budget: int, available: int, entries: int, ratio: float
    ) -> list[_Entry] | None:
        """Return who enters in a step, after those that run have got their blocks; None if that is
        not plain.

        Whoever runs has all its known tokens' blocks then, or has used up the budget.
        """
        size, reserve = self._size, self._admission.reserve
        entering: list[_Entry] = []
        runs, ever = self._decoding + (self._partial >= 0), self._ever
        for seq in self._queue:
            if not budget or len(entering) == len(self._free):
                break
            if not self._is_new(seq):
                return None
            limit = length_limit(seq.request, seq.num_prompt, seq.max_len)
            need, most = -(-seq.num_prompt // size), -(-(limit - 1) // size)
            fits = need <= available
            if runs:
                need = reserve(need, most, ratio) + reserve(0, ever - entries, ratio)
                fits = need + self._spare <= available
            if not fits:
                if self._passes:
                    return None
                break
            count = min(seq.num_prompt, budget)
            blocks = -(-count // size)
            entering.append(_Entry(seq, count, blocks, limit))
            if seq.hashes:
                self._firsts.add(seq.hashes[0])
            budget, available, entries = budget - count, available - blocks, entries + blocks
            runs, ever = runs + 1, ever + most
        return entering

    def _is_new(self, seq: Sequence) -> bool:
        """Return whether surely nothing that a sequence begins with will be found."""
        if not self._caches or seq is self._checked:
            return True
        if len(self._manager.find_prefix(seq)) or (seq.hashes and seq.hashes[0] in self._firsts):
            return False
        self._checked = seq
        return True

    def _go_on(
        self, step: int, chunk: int, after: int, entering: list[_Entry], over: list[int]
    ) -> int:
        """Count what prompts have computed in a step; return how many came to their end."""
        many = 0
        if chunk:
            w = self._partial
            self._pieces.append((w, step, self._done, chunk, 0))
            self._done = after
            if after == self._runs[w].known:
                self._partial = NEVER
                many += self._draw_first(w, step, over)
        for seq, count, _, limit in entering:
            self._queue.popleft()
            w, row = len(self._runs), heappop(self._free)
            run = Run(seq, row, limit, self._size, known=seq.num_prompt, computed=0)
            run.entered = step
            self._runs.append(run)
            self._ever += run.ever
            self._pieces.append((w, step, 0, count, 0))
            if count == seq.num_prompt:
                many += self._draw_first(w, step, over)
            else:
                self._partial, self._done = w, count
        return many

    def _draw_first(self, w: int, step: int, over: list[int]) -> int:
        run = self._runs[w]
        run.first = step
        left = run.limit - run.known - 1
        self._base[w] = run.known - step - 1
        if left:
            self._decode(w, run.known, step + 1, left)
        else:
            over.append(w)
        return 1

    def _decode(self, w: int, resident: int, step: int, draws: int) -> None:
        """A sequence draws in so many steps, from one on."""
        self._base[w], self._since[w] = resident - step, step
        self._phase[(resident - step) % self._size] += 1
        self._decoding += 1
        self._context += resident
        self._ends_at.setdefault(step + draws - 1, []).append(w)

    def _end(self, step: int, over: list[int]) -> None:
        """Let sequences end with a step, in the order in which they were admitted."""
        size = self._size
        over.sort()
        for w in over:
            run, base = self._runs[w], self._base[w]
            run.end, resident = step, base + step + 1
            if w in self._since:
                self._decoding -= 1
                self._context -= resident
                self._phase[base % size] -= 1
            blocks = -(-resident // size)
            freed = blocks
            for block in self._shared.get(w, ()):
                self._holders[block] -= 1
                freed -= self._holders[block] > 0
            self._available += freed
            self._blank += blocks - (resident // size if self._caches else 0)
            self._entries -= blocks
            self._resident -= resident
            self._ever -= run.ever
            heappush(self._free, run.row)

    def foreseen(self) -> Foreseen:
        """Return what was seen."""
        many = len(self.steps.ends)
        for w, since in self._since.items():
            end = self._runs[w].end
            draws = (end + 1 if end >= 0 else many) - since
            if draws:
                self._pieces.append((w, since, self._base[w] + since, draws, 1))
        return Foreseen(
            steps=self.steps,
            runs=self._runs,
            pieces=sorted(self._pieces),
            shared=self._shared,
            came=self._came,
            ratio=self._ratio,
        )
