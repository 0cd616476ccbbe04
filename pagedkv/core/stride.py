"""Takes the steps that `foresight` saw, all at once: the state is as after as many plans.

Blocks are given out and taken back in the very order of the steps; none that they make findable is
reclaimed by them. All else is written as it stands in the end, whatever it was on the way. Whoever
knows the tokens beforehand (a simulator, a replay) need not plan each step. Like `leap`, this is a
part of the scheduler in a file of its own, and knows its insides.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Int32, Int64
from pagedkv.core.foreseen import Arrival, Foreseen, Run
from pagedkv.core.prefix import extend_chain
from pagedkv.core.request import FinishedSequence, Sequence
from pagedkv.core.scheduler import Scheduler

__all__ = ["Answers", "Stride", "take_stride"]

Answers = Callable[[Sequence, int, int], Int32]
"""The tokens that a sequence draws, from one of its draws on and so many."""


class Stride(Struct, frozen=True, kw_only=True, eq=False):
    """Steps that were taken.

    Attributes:
        foreseen: As they were foreseen.
        seq_ids: Per arrival, its sequence; -1 for one that was refused.
        finished: Who ended, in order, and in which run.
        blocks, taken_by, taken_at: [N] The blocks that were taken, in order: which, by which run
            and in which step. Some come again, if they became blank meanwhile.
    """

    foreseen: Foreseen
    seq_ids: list[int]
    finished: list[tuple[int, FinishedSequence]]
    blocks: Int32
    taken_by: Int64
    taken_at: Int64


class _Tokens(NamedTuple):
    """Of a run: all tokens it knows in the end, and how many of them it drew in these steps."""

    known: Int32
    drawn: int


def take_stride(
    scheduler: Scheduler, foreseen: Foreseen, arrivals: Ids[Arrival], answers: Answers
) -> Stride | None:
    """Take steps that were foreseen from the state as it is.

    Args:
        arrivals: As they were given to `foresee`.
        answers: What sequences draw.

    Returns:
        None, and nothing changed, if the steps depend on each other's order, because a block would
        be sealed whose content is cached elsewhere.
    """
    runs, size = foreseen.runs, scheduler.manager.block_size
    tokens = [_tokens(scheduler, run, len(foreseen), answers) for run in runs]
    pieces: Int64 = np.array(foreseen.pieces, np.int64).reshape(-1, 5)
    before: Int64 = np.array([run.computed for run in runs])
    computed = before.copy()
    np.add.at(computed, pieces[:, 0], pieces[:, 3])
    sealed: list[bytes] = []
    if scheduler.manager.enable_prefix_caching:
        missed, lengths = [], [len(run.seq.hashes) for run in runs]
        for run, (known, _), first, end in zip(
            runs, tokens, (before // size).tolist(), (computed // size).tolist(), strict=True
        ):
            salt, hashes = run.seq.request.cache_salt, run.seq.hashes
            extend_chain(hashes, known, end, size, salt)
            sealed += hashes[first:end]
            if end <= first:  # looked up perhaps, and not sealed yet
                missed += hashes[first : first + 1]
        new = sealed + missed
        if len(set(new)) < len(new) or scheduler.manager.index.knows_any(new):
            for run, length in zip(runs, lengths, strict=True):
                del run.seq.hashes[length:]
            return None
    return _Taking(scheduler, foreseen, arrivals).take(tokens, pieces, before, computed, sealed)


def _tokens(scheduler: Scheduler, run: Run, steps: int, answers: Answers) -> _Tokens:
    """Return what a run knows in the end."""
    seq, known = run.seq, run.seq.token_ids
    if run.entered < 0:
        known = scheduler.table.token_ids[run.row, : run.known]
    if run.first < 0:
        return _Tokens(known, 0)
    drawn = (run.end if run.end >= 0 else steps - 1) - run.first + 1
    new = answers(seq, run.known - seq.num_prompt, drawn)
    return _Tokens(np.concatenate((known, new)), drawn)


class _Taking:
    """The passes of taking a stride, in their order."""

    def __init__(self, scheduler: Scheduler, foreseen: Foreseen, arrivals: Ids[Arrival]) -> None:
        self._scheduler = scheduler
        self._foreseen = foreseen
        self._runs = foreseen.runs
        self._arrivals = arrivals[: len(foreseen.came)]
        self._manager = scheduler.manager
        self._table = scheduler.table
        self._size = scheduler.manager.block_size
        ended = [(run.end, w) for w, run in enumerate(foreseen.runs) if run.end >= 0]
        self._ended = sorted(ended)

    def take(
        self,
        tokens: list[_Tokens],
        pieces: Int64,
        before: Int64,
        computed: Int64,
        sealed: list[bytes],
    ) -> Stride:
        """Take the steps.

        Args:
            tokens: Of each run.
            pieces: [P, 5] `Foreseen.pieces`.
            before, computed: [runs] Tokens that are computed before and after.
            sealed: The hashes of the blocks that become full, run after run.
        """
        seq_ids = self._enlist()
        who, at, order = self._growth(pieces)
        first: Int64 = np.searchsorted(who, np.arange(len(self._runs) + 1))
        taken, ids = self._give_and_take(at[order], order, first, computed)
        self._publish(ids, first, before // self._size, computed // self._size, sealed)
        finished = self._leave(tokens)
        self._stay(tokens, ids, first, computed)
        self._count(tokens, before, computed)
        if self._scheduler._audits:
            self._scheduler.audit()
        return Stride(
            foreseen=self._foreseen,
            seq_ids=seq_ids,
            finished=finished,
            blocks=taken,
            taken_by=who[order],
            taken_at=at[order],
        )

    def _enlist(self) -> list[int]:
        """Let all come who did, and those enter who could."""
        scheduler, first_step = self._scheduler, self._scheduler.totals.num_steps
        seq_ids = [
            scheduler.enlist(group, first_step + step)[0] if group else -1
            for step, (_, group) in zip(self._foreseen.came, self._arrivals, strict=True)
        ]
        for run in self._runs:
            if run.entered >= 0:
                scheduler._roster.enter(run.seq, run.row, run.computed)
        return seq_ids

    def _growth(self, pieces: Int64) -> tuple[Int64, Int64, Int64]:
        """Return of each block that is taken the run and the step, run after run, and in which
        order they are: [N] each.
        """
        size = self._size
        run, step, resident, many, slope = pieces.T
        held = -(-resident // size)
        fresh = -(-(resident + many) // size) - held
        who, piece = np.repeat(run, fresh), np.repeat(np.arange(len(fresh)), fresh)
        entry = np.arange(len(piece)) + (held - (np.cumsum(fresh) - fresh))[piece]
        at = step[piece] + slope[piece] * (entry * size - resident[piece])
        # In a step, whoever was admitted earlier takes its blocks first.
        return who, at, np.argsort(at * len(self._runs) + who, kind="stable")

    def _give_and_take(
        self, at: Int64, order: Int64, first: Int64, computed: Int64
    ) -> tuple[Int32, Int32]:
        """Give out blocks and take back those of whoever ends, as if step by step.

        What comes back blank is given out next, the last first, before anything else; what comes
        back cached, or is found, is not among what is given out.

        Args:
            at: [N] The steps in which blocks are taken, in order.
            order: [N] Which of them, run after run, comes when.

        Returns:
            [N] The blocks as they were taken, and the same run after run.
        """
        manager, count = self._manager, len(at)
        hits = [block for run in self._runs for block in run.hits]
        if hits:
            manager.pool.share(np.array(hits, np.int32))
        findable = manager.enable_prefix_caching
        full: list[int] = (computed // self._size if findable else np.zeros_like(computed)).tolist()
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        upto = np.searchsorted(at, [step for step, _ in self._ended], side="right").tolist()
        spare: list[int] = []  # blank blocks: when each was taken before, or else -1 - its id
        again: list[tuple[int, int]] = []  # when which of them is given out
        done = 0
        for (_, w), end in zip(self._ended, upto, strict=True):
            again += [(i, spare.pop()) for i in range(done, min(end, done + len(spare)))]
            done = end
            spare += self._blank_after(w, full[w], place[first[w] : first[w + 1]])
        again += [(i, spare.pop()) for i in range(done, min(count, done + len(spare)))]
        fresh = np.ones(count, np.bool_)
        fresh[[i for i, _ in again]] = False
        taken = np.empty(count, np.int32)
        taken[fresh] = manager.allocate(count - len(again))
        for i, what in again:
            taken[i] = taken[what] if what >= 0 else -1 - what
        ids = np.empty(count, np.int32)
        ids[order] = taken
        cached = [self._blocks(w, ids, first)[: full[w]][::-1] for _, w in self._ended]
        blank = np.array([taken[i] if i >= 0 else -1 - i for i in spare], np.int32)
        back = np.concatenate((*cached, blank))
        manager.pool.release(back, np.arange(len(back)) < len(back) - len(blank))
        return taken, ids

    def _blank_after(self, w: int, full: int, places: Int64) -> list[int]:
        """Return the blocks of a run that ends that cannot be found, its tail first: when each was
        taken, or else -1 - its id.
        """
        run = self._runs[w]
        taken: list[int] = places[max(0, full - run.held) :][::-1].tolist()
        if full >= run.held:
            return taken
        held = self._table.block_table[0, run.row, full : run.held][::-1].tolist()
        return taken + [-1 - block for block in held]

    def _blocks(self, w: int, ids: Int32, first: Int64) -> Int32:
        """Return all blocks of a run, in order: those it had, and those it has taken so far."""
        run, taken = self._runs[w], ids[first[w] : first[w + 1]]
        if run.entered < 0:
            return np.concatenate((self._table.block_table[0, run.row, : run.held], taken))
        return np.concatenate((np.array(run.hits, np.int32), taken)) if run.hits else taken

    def _publish(
        self, ids: Int32, first: Int64, before: Int64, after: Int64, sealed: list[bytes]
    ) -> None:
        """Make findable what was sealed: the blocks ``before`` to ``after`` of each run."""
        if not sealed:
            return
        many = after - before
        who = np.repeat(np.arange(len(many)), many)
        entry = np.arange(len(who)) + (before - (np.cumsum(many) - many))[who]
        held: Int64 = np.array([run.held for run in self._runs])
        taken = entry >= held[who]
        blocks = np.empty(len(who), np.int32)
        blocks[taken] = ids[(first[who] + entry - held[who])[taken]]
        # Of who ran before, the last block may have been begun then.
        rows = np.array([run.row for run in self._runs])
        blocks[~taken] = self._table.block_table[0, rows[who[~taken]], entry[~taken]]
        self._manager.publisher.publish(sealed, blocks)

    def _leave(self, tokens: list[_Tokens]) -> list[tuple[int, FinishedSequence]]:
        """Let those go who have ended; return them."""
        roster, runs = self._scheduler._roster, self._runs
        ran = [runs[w].row for _, w in self._ended if runs[w].entered < 0]
        self._table.release(np.array(ran, np.int32))
        return [
            (w, roster.leave(runs[w].seq, tokens[w].known[runs[w].seq.num_prompt :].tolist()))
            for _, w in self._ended
        ]

    def _stay(self, tokens: list[_Tokens], ids: Int32, first: Int64, computed: Int64) -> None:
        """Write down how far those are who go on."""
        table, scheduler = self._table, self._scheduler
        stay = [w for w, run in enumerate(self._runs) if run.end < 0]
        if not stay:
            return
        for w in stay:
            run = self._runs[w]
            if run.entered >= 0:
                sampling = run.seq.request.sampling
                stop_ids = sampling.ends_at(scheduler.config.model)
                table.bind(run.seq, run.row, stop_ids)
                scheduler.retention.bind(run.seq)
                table.start(run.row)
            known, drawn = tokens[w]
            if drawn:
                table.reserve_tokens(len(known) + 1)
                table.token_ids[run.row, len(known) - drawn : len(known)] = known[-drawn:]
                table.num_known[run.row] = len(known)
        rows = np.array([self._runs[w].row for w in stay], np.int32)
        new = [
            ids[first[w] : first[w + 1]]
            if self._runs[w].entered < 0
            else self._blocks(w, ids, first)
            for w in stay
        ]
        counts = np.array([len(each) for each in new], np.int32)
        table.append_blocks(rows, counts[None], np.concatenate(new))
        table.num_computed[rows] = table.next_position[rows] = computed[stay]
        table.num_resident[0, rows] = computed[stay]

    def _count(self, tokens: list[_Tokens], before: Int64, computed: Int64) -> None:
        """Count what was computed and drawn: for each tenant as a sum, whenever it was. Only the
        order of ``fair`` looks at it step by step, and that is not foreseen.
        """
        scheduler, runs = self._scheduler, self._runs
        drawn: Int64 = np.array([each.drawn for each in tokens], np.int64)
        scored: Int64 = np.array([run.seq.num_scored for run in runs], np.int64)
        new = np.maximum(computed, scored) - np.maximum(before, scored)
        tenants = np.array([run.seq.tenant_id for run in runs], np.int32)
        scheduler.tenants.charge(tenants, (new + drawn).astype(np.int32))
        scheduler.totals.num_steps += len(self._foreseen)
        scheduler.totals.generation_tokens += int(drawn.sum())
        scheduler.admission.ratio = self._foreseen.ratio
