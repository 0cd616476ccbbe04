"""What will happen, as far as it is plain: who enters when, who draws, who ends, what is free.

Nothing is decided here that `Scheduler.schedule` would decide otherwise: this follows its passes
with a few numbers in place of the tables, step by step, and stops before the first step in which
anything else could matter: blocks that lack, a prefix that may be found, a request that may be
stopped. Nothing changes. `stride` takes such steps at once.
"""

from collections import deque
from collections.abc import Sequence as Ids
from heapq import heappop, heappush
from math import inf

from pagedkv.core.admission import decayed, length_limit
from pagedkv.core.arrays import at_rows
from pagedkv.core.foreseen import NEVER, Arrival, Chunk, Foreseen, Pace, Piece, Run, Steps
from pagedkv.core.leap import can_foresee
from pagedkv.core.request import Sequence
from pagedkv.core.scheduler import Scheduler
from pagedkv.core.sharing import Sharing, Supply

__all__ = ["foresee"]


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
    if not (can_foresee(scheduler) and _is_followed(scheduler)):
        return None
    sight = _Foresight(scheduler, arrivals, clock, pace, until)
    if not sight.begin():
        return None
    while len(sight.steps.ends) < most and sight.step():
        sight.coast(most)
    return sight.foreseen()


def _is_followed(scheduler: Scheduler) -> bool:
    """Return whether the rules are those that this module follows."""
    manager, limits = scheduler.manager, scheduler.config.scheduler
    return not (
        limits.scheduling_policy != "fcfs"
        or limits.long_prefill_token_threshold
        or manager.num_groups > 1
        or manager.table.keeps_scores
        or (manager.enable_prefix_caching and manager.pool.cached.order != "lru")
    )


class _Foresight:
    """The few numbers that the passes of a step come down to, and what they were in each step.

    Runs are told apart by their index in order of admission, ``w``.
    """

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
        self._reserve = scheduler.admission.reserve
        self._ratio = scheduler.admission.ratio
        self._arrivals = arrivals
        self._clock, self._pace, self._until = clock, pace, until
        self._size = manager.block_size
        self._budget = limits.max_num_batched_tokens
        self._spare = int(limits.watermark * manager.pool.num_blocks)
        self._may_pass = limits.max_skips > 0
        self._caches = manager.enable_prefix_caching
        self._runs: list[Run] = []
        self._pieces: list[Piece] = []
        self._came: list[int] = []
        self._queue: deque[Sequence] = deque()
        self._rows = manager.table.running
        self._free: list[int] = manager.table.free_rows.tolist()  # ascending, so a heap
        # Of those that draw in every step: how many, their resident tokens, and how many there are
        # by the step in which they take a block, modulo its size, and by that with which they end.
        self._decoding = self._context = 0
        self._phase = [0] * self._size
        self._ends_at: dict[int, list[int]] = {}
        # Of each of them, its tokens less the step's number, and the step since which it draws.
        self._base: dict[int, int] = {}
        self._since: dict[int, int] = {}
        # The one whose prompt goes on, if there is one: it is the last that was admitted.
        self._partial, self._done = NEVER, 0
        # What is computed in these steps, and not findable yet.
        self._coming: set[bytes] = set()
        self._supply = Supply(manager)
        self._sharing: Sharing | None = None
        # Of all that run: entries of their tables, tokens, and blocks that they could ever hold.
        self._entries = self._resident = self._ever = 0

    def begin(self) -> bool:
        """Look at who runs and waits; return whether that is plain."""
        table, rows, at = self._scheduler.table, self._rows, at_rows(self._rows)
        known, computed = table.num_known[at], table.num_computed[at]
        if not table.publishes[at].all() or ((known - computed)[:-1] != 1).any():
            return False
        self._queue.extend(self._scheduler._roster.waiting)
        if any(seq.num_preemptions for seq in self._queue):
            return False
        columns = (column.tolist() for column in (rows, table.limit[at], known, computed))
        for w, (row, limit, tokens, done) in enumerate(zip(*columns, strict=True)):
            seq = table.sequences[row]
            assert seq is not None
            run = Run(seq, row, limit, self._size, known=tokens, computed=done)
            self._runs.append(run)
            self._entries += run.held
            self._resident += done
            self._ever += run.ever
            if done + 1 == tokens:
                run.first = 0
                self._decode(w, done, 0, limit - tokens)
            else:
                self._partial, self._done = w, done
                self._coming.update(seq.hashes[done // self._size :])
        return True

    def _look_at_blocks(self) -> Sharing | None:
        """Look at what the rows hold, once; None if that is not plain."""
        if self._sharing is None:
            self._sharing = Sharing(self._manager, self._rows, self._runs)
        return self._sharing if self._sharing.is_plain else None

    # A step

    def step(self) -> bool:
        """Go through the next step; False, and nothing of it counts, if it is not plain."""
        step, decoding = len(self.steps.ends), self._decoding
        if not self._let_come(step) or self._clock >= self._until or decoding > self._budget:
            return False
        tokens, taken, revived, found = decoding, self._phase[-step % self._size], 0, 0
        chunks: list[Chunk] = []
        if self._partial >= 0 and tokens < self._budget:
            chunks.append(self._goes_on(self._budget - tokens))
            tokens, taken = tokens + chunks[0].tokens, taken + chunks[0].blocks
        ends = step in self._ends_at or self._partial >= 0
        if taken > self._supply.available or (ends and self._look_at_blocks() is None):
            return False
        ratio = decayed(self._ratio)
        if self._queue and tokens < self._budget and self._free:
            entering = self._enter(self._budget - tokens, taken, ratio)
            if entering is None:
                return False
            for chunk in entering:
                tokens, taken = tokens + chunk.tokens, taken + chunk.blocks
                revived, found = revived + chunk.revived, found + chunk.run.held
            chunks += entering
        if not tokens or taken + revived > self._supply.room:
            return False
        context = self._context + decoding
        pairs = context - decoding / 2
        for chunk in chunks:
            after = chunk.before + chunk.tokens
            context += after
            pairs += after * chunk.tokens - chunk.tokens * chunk.tokens / 2
        self._ratio = ratio
        self._supply.take(taken, revived)
        self._entries += taken + found
        self._resident += tokens + found * self._size
        self._note(tokens, decoding, self._pace(tokens, float(context), pairs))
        over = self._ends_at.pop(step, [])
        self.steps.running.append(decoding + len(chunks) + (self._partial >= 0 and not chunks))
        self.steps.drawn.append(decoding + self._count(step, chunks, over))
        self.steps.waiting.append(len(self._queue))
        self._end(step, over)
        return True

    def _note(self, tokens: int, decoding: int, seconds: float) -> None:
        """Note what a step is like, once its blocks are taken."""
        steps = self.steps
        self._clock += seconds
        self._context += decoding
        steps.ends.append(self._clock)
        steps.seconds.append(seconds)
        steps.tokens.append(tokens)
        steps.decoding.append(decoding)
        steps.available.append(self._supply.available)
        steps.blank.append(self._supply.blank)
        steps.entries.append(self._entries)
        steps.resident.append(self._resident)

    def coast(self, most: int) -> None:
        """Go through steps, up to so many in all, in which everybody draws and nobody comes, enters
        or ends: what `step` would do, in a third of the time.
        """
        steps, supply, phase, pace = self.steps, self._supply, self._phase, self._pace
        many = self._decoding
        if self._queue or self._partial >= 0 or not 0 < many <= self._budget:
            return
        first, last, until = len(steps.ends), min(self._ends_at), self._until
        if len(self._came) < len(self._arrivals):
            until = min(until, self._arrivals[len(self._came)].time)
        for step in range(first, min(last, most)):
            taken = phase[-step % self._size]
            if self._clock >= until or taken > min(supply.available, supply.room):
                break
            supply.take(taken)
            self._entries += taken
            self._resident += many
            self._ratio = decayed(self._ratio)
            context = float(self._context + many)
            self._note(many, many, pace(many, context, context - many / 2))
        count = len(steps.ends) - first
        steps.running += [many] * count
        steps.drawn += [many] * count
        steps.waiting += [0] * count

    def _let_come(self, step: int) -> bool:
        """Let those come whose time it is; return whether there is anything to do."""
        while len(self._came) < len(self._arrivals):
            time, group = self._arrivals[len(self._came)]
            if time > self._clock:
                break
            if group and not self._scheduler._intake.foresees(group[0]):
                return False
            self._came.append(step)
            self._queue.extend(group)
        return bool(self._decoding or self._partial >= 0 or self._queue)

    def _goes_on(self, budget: int) -> Chunk:
        """Return what the prompt that goes on computes."""
        run, size = self._runs[self._partial], self._size
        count = min(run.known - self._done, budget)
        blocks = -(-(self._done + count) // size) - -(-self._done // size)
        return Chunk(run, self._done, count, blocks)

    def _enter(self, budget: int, taken: int, ratio: float) -> list[Chunk] | None:
        """Return what they compute who enter in a step, after those that run have got their blocks;
        None if that is not plain.

        Whoever runs has all its known tokens' blocks then, or has used up the budget.

        Args:
            budget: Tokens that are left.
            taken: Blocks that those that run take.
        """
        size, reserve = self._size, self._reserve
        entering: list[Chunk] = []
        adopted: set[int] = set()
        available, entries = self._supply.available - taken, self._entries + taken
        runs, ever = self._decoding + (self._partial >= 0), self._ever
        for seq in self._queue:
            if not budget or len(entering) == len(self._free):
                break
            hits = self._found(seq, taken)
            if hits is None:
                return None
            fresh = [block for block in hits if block not in adopted]
            adopted.update(fresh)
            revived = self._sharing.num_free(fresh) if self._sharing and fresh else 0
            limit, known = length_limit(seq.request, seq.num_prompt, seq.max_len), seq.num_prompt
            run = Run(seq, NEVER, limit, size, known=known, computed=len(hits) * size)
            run.hits = hits
            need = -(-known // size) - len(hits) + revived
            fits = need <= available
            if runs:
                most = run.ever - (len(hits) - revived)
                need = reserve(need, most, ratio) + reserve(0, ever - entries, ratio)
                fits = need + self._spare <= available
            if not fits:
                if self._may_pass or hits:
                    return None
                break
            count = min(known - run.computed, budget)
            blocks = -(-(run.computed + count) // size) - len(hits)
            entering.append(Chunk(run, run.computed, count, blocks, revived))
            self._coming.update(seq.hashes[len(hits) :])
            budget, taken = budget - count, taken + blocks
            available, entries = available - blocks - revived, entries + blocks + len(hits)
            runs, ever = runs + 1, ever + run.ever
        return entering

    def _found(self, seq: Sequence, taken: int) -> list[int] | None:
        """Return the blocks that a sequence will find; None if that is not sure.

        Args:
            taken: Blocks that are taken before, in the same step.
        """
        if not self._caches:
            return []
        hashes, index = self._manager.usable_hashes(seq), self._manager.index
        hits: list[int] = []
        if index.knows_any(hashes[:1]):
            hits = index.match(hashes)[:, 0].tolist()
        if hashes[len(hits) :] and hashes[len(hits)] in self._coming:
            return None
        if hits:
            sharing = self._look_at_blocks()
            # What comes back into the order is reclaimed after all that is in it now.
            if sharing is None or self._supply.reach(taken) > sharing.num_before(hits):
                return None
        return hits

    def _count(self, step: int, chunks: list[Chunk], over: list[int]) -> int:
        """Count what prompts have computed in a step; return how many came to their end."""
        many = 0
        for run, before, tokens, _, _ in chunks:
            w = self._partial
            if run.row < 0:
                self._queue.popleft()
                w, run.row, run.entered = len(self._runs), heappop(self._free), step
                self._runs.append(run)
                self._ever += run.ever
                if self._sharing is not None:
                    self._sharing.enter(w, run.hits)
            self._pieces.append((w, step, before, tokens, 0))
            self._partial, self._done = w, before + tokens
            if self._done == run.known:
                self._partial = NEVER
                self._draw_first(w, step, over)
                many += 1
        return many

    def _draw_first(self, w: int, step: int, over: list[int]) -> None:
        """A sequence draws its first token; it may be its last, and it over with the step."""
        run = self._runs[w]
        run.first, self._base[w] = step, run.known - step - 1
        draws = run.limit - run.known - 1
        if draws:
            self._decode(w, run.known, step + 1, draws)
        else:
            over.append(w)

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
        for w in over:
            run, base = self._runs[w], self._base[w]
            run.end, resident = step, base + step + 1
            if w in self._since:
                self._decoding -= 1
                self._context -= resident
                self._phase[base % size] -= 1
            blocks = -(-resident // size)
            still_held = self._sharing.leave(w) if self._sharing is not None else 0
            blank = blocks - (resident // size if self._caches else 0)
            self._supply.give_back(blocks - still_held, blank)
            self._entries -= blocks
            self._resident -= resident
            self._ever -= run.ever
            heappush(self._free, run.row)

    def foreseen(self) -> Foreseen | None:
        """Return what was seen; None if it was not plain."""
        sharing, many = self._look_at_blocks(), len(self.steps.ends)
        if sharing is None or not many:
            return None
        for w, since in self._since.items():
            end = self._runs[w].end
            draws = (end + 1 if end >= 0 else many) - since
            if draws:
                self._pieces.append((w, since, self._base[w] + since, draws, 1))
        return Foreseen(
            steps=self.steps,
            runs=self._runs,
            pieces=sorted(self._pieces),
            shared=sharing.of,
            came=self._came,
            ratio=self._ratio,
        )
