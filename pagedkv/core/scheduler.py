"""Requests in, step plans out: continuous batching with chunked prefill under a token budget."""

from collections.abc import KeysView

import numpy as np

from pagedkv.config import EngineConfig, as_config
from pagedkv.core.admission import Admission
from pagedkv.core.arrays import Bool, Int32, Int64
from pagedkv.core.batch import Batch
from pagedkv.core.groups import group_layout
from pagedkv.core.intake import Intake
from pagedkv.core.manager import NO_MOVES, BlockManager
from pagedkv.core.plan import StepOutput, StepPlan, StepResult
from pagedkv.core.planner import Decision, build_plan, drawing
from pagedkv.core.positions import place
from pagedkv.core.pressure import Pressure
from pagedkv.core.queues import make_queue
from pagedkv.core.request import FinishedSequence, Request, Sequence
from pagedkv.core.result import checked_result, not_finite
from pagedkv.core.retention import Retention
from pagedkv.core.roster import Roster
from pagedkv.core.stats import SchedulerStats, Totals
from pagedkv.core.tenants import Tenants
from pagedkv.core.tiers import HostTier
from pagedkv.core.victims import Victim, last_admitted, least_urgent
from pagedkv.environment import audit_enabled
from pagedkv.errors import InvalidTransition, is_text, shown
from pagedkv.events import KVEvent

__all__ = ["Scheduler"]


class Scheduler:
    """Decides, step by step, who computes how many tokens in which blocks.

    It does no I/O, reads no clock and knows no tensor: `schedule` returns a plan, whoever embeds
    it carries the plan out, `commit` takes the result. Equal calls give equal plans.

    Args:
        config: Model facts, pool and limits.
        victim: Chooses whom to push back when blocks lack: a function of `victims.VICTIMS` or
            alike. If omitted, the least urgent where priority rules, else the last admitted.
    """

    def __init__(self, config: EngineConfig | None = None, *, victim: Victim | None = None) -> None:
        self.config = as_config(config)
        limits = self.config.scheduler
        self.layout = group_layout(self.config.model, self.config.cache)
        self.manager = BlockManager(self.config.cache, limits.max_num_seqs, self.layout.num_groups)
        self.table = self.manager.table
        self.retention = Retention(self.config, self.layout, self.manager)
        self.tenants = Tenants(limits.tenants, self.manager.pool.num_blocks)
        self.admission = Admission(self.config, self.manager, self.tenants)
        self.tier = HostTier(self.config.cache.num_cpu_blocks)
        self._totals = Totals()
        waiting = make_queue(limits, self.manager, self.tenants)
        self._roster = Roster(self.retention, self.tier, waiting, self.tenants, self._totals)
        self._beams = self._roster.beams
        usual = least_urgent if limits.scheduling_policy == "priority" else last_admitted
        self._pressure = Pressure(
            self._roster, self.retention, self.tier, self._totals, victim or usual, limits.swap_cost
        )
        self._intake = Intake(
            self.config, self._roster, self.retention, self.admission, self._pressure, self.tenants
        )
        self._outstanding: StepPlan | Decision | None = None
        self._decoding = Batch.decoding(self.table)
        self._batch = self._decoding
        self._draws = self._decoding.draws
        self._seeds = np.random.default_rng(self.config.scheduler.seed)
        self._next_seq_id = 0
        self._audits = audit_enabled()

    # Requests

    def add(self, request: Request) -> list[int]:
        """Queue a request.

        Returns:
            The ids of the sequences that are answered: of all that are drawn, ``best_of`` or
            ``n``, for whoever ranks them has to see them all; of a beam search ``n``.

        Raises:
            InvalidRequest: The prompt or the parameters are wrong, the id is in use, or the tenant
                is not one of this scheduler's.
            NeverFits: An empty pool, or the tenant's part of it, would be too small.
        """
        return self.enlist(self.prepare(request))

    def prepare(self, request: Request) -> list[Sequence]:
        """Return what `enlist` takes, of which nobody knows yet; raises what `add` does, but for
        an id that is in use.
        """
        return self._intake.sequences(request)

    def enlist(self, group: list[Sequence], step: int | None = None) -> list[int]:
        """Queue what `prepare` returned, once; raises and returns as `add` does.

        Args:
            step: The step before which it comes, if that is not the next.
        """
        now = self._totals.num_steps if step is None else step
        self._intake.enlist(group, self._next_seq_id, self._seeds, now)
        self._next_seq_id += len(group)
        return [seq.seq_id for seq in group[0].told]

    def abort(self, request_id: str) -> list[FinishedSequence]:
        """End a request now, in whatever state it is; its blocks are free at once.

        Raises:
            InvalidTransition: No such request is queued or running.
        """
        group = self._roster.requests.get(request_id) if isinstance(request_id, str) else None
        if group is None:
            raise InvalidTransition(
                "it has finished or was never added",
                where=f"request {shown(request_id)}",
                remedy="abort each request at most once, by its id",
            )
        ended: list[FinishedSequence] = []
        for seq in list(group):
            if seq.seq_id in self._roster.sequences:  # not gone with the sibling it waited on
                ended += self._roster.end(seq, "abort")
        return ended

    def stop(self, seq_id: int, stop_reason: str) -> list[FinishedSequence]:
        """End one sequence because its text holds a stop string.

        Returns:
            All that end: beams do so together, and each of the search's ``n`` answers is told.

        Raises:
            InvalidTransition: The sequence has finished or never was, or the reason is no text.
        """
        known = isinstance(seq_id, int | np.integer) and seq_id in self._roster.sequences
        seq = self._roster.sequences[seq_id] if known else None
        if seq is None or self._num_known(seq) == seq.num_prompt:
            raise InvalidTransition(
                "it has finished, has no text yet, or never was",
                where=f"sequence {shown(seq_id)}",
                remedy="stop a sequence that has generated tokens, by its id",
            )
        if not is_text(stop_reason):
            raise InvalidTransition(
                f"the reason is {shown(stop_reason)}",
                where=f"sequence {seq_id}",
                remedy="give the stop string, as text that can be encoded as UTF-8",
            )
        return self._roster.end(seq, "stop", stop_reason=stop_reason)

    def _num_known(self, seq: Sequence) -> int:
        return int(self.table.num_known[seq.row]) if seq.row >= 0 else len(seq.token_ids)

    @property
    def in_work(self) -> KeysView[str]:
        """The ids of the requests that are waiting or running."""
        return self._roster.requests.keys()

    def has_unfinished(self) -> bool:
        """Return whether any request is waiting or running, or an end was not reported yet."""
        return bool(self._roster.requests) or bool(self._roster.finished)

    # A step: schedule

    def schedule(self) -> StepPlan:
        """Decide the next step. The plan may be empty if nothing can run.

        Raises:
            InvalidTransition: The plan before was not committed; nothing changes.
        """
        if self._outstanding is not None:
            raise InvalidTransition(
                f"plan {self._outstanding.step} is outstanding",
                where="schedule",
                remedy="commit it first",
            )
        decision = self._decide()
        self._batch = decision.batch
        self._draws = drawing(decision.batch, self._roster.sibling_rows())
        plan = self._outstanding = build_plan(self.retention, decision, self._draws)
        return plan

    def _decide(self) -> Decision:
        """Hold the passes of a step: who computes how much, in blocks that are theirs after."""
        now = self._totals.num_steps
        self._intake.make_way(now)
        rungs = self._totals.num_rungs
        batch = self._continue_running()
        place(batch)
        copies = self.manager.grow(batch)
        if rungs == self._totals.num_rungs:
            self.admission.step()
            budget = self.config.scheduler.max_num_batched_tokens - batch.num_tokens
            rows, counts = self._intake.admit(budget, now)
            if len(rows):
                rows = np.concatenate((batch.rows, rows))
                batch = Batch(self.table, rows, np.concatenate((batch.counts, counts)))
        else:
            self.admission.preempted()
        # A plan without tokens is not carried out, and must not take the moves with it.
        carried_out = batch.num_tokens > 0
        moves = self.manager.take_moves() if carried_out else NO_MOVES
        swaps = self.tier.take_moves(carried_out=carried_out)
        self._totals.num_steps += 1
        self._totals.tokens_moved += len(moves)
        return Decision(now, batch, moves, swaps, copies)

    def _continue_running(self) -> Batch:
        """Share the token budget among running sequences, first admitted first served.

        If blocks are lacking, the ladder is climbed rung by rung until the rest fits.
        """
        while True:
            batch = self._grants()
            lacking, givers = self.manager.shortfall(batch), self.table.running
            if not lacking:
                lacking, givers = self.admission.over_quota()
            if not lacking:
                return batch
            self._totals.num_rungs += 1
            self._pressure.relieve(lacking, givers)

    def _grants(self) -> Batch:
        """Return the running rows that compute, and how many tokens each."""
        limits, budget = self.config.scheduler, self.config.scheduler.max_num_batched_tokens
        if not self._decoding.holds:
            self._decoding = Batch.decoding(self.table)
        decoding = self._decoding
        need = self.table.num_known[decoding.at] - self.table.num_computed[decoding.at]
        # Each has one at least, but for beams that wait for others.
        if int(need.sum()) == len(need) <= budget and not (self._beams and need.min() == 0):
            return decoding
        need = self._roster.until_forks(decoding.rows, need)
        need = self.retention.limit(decoding.rows, need)
        if limits.long_prefill_token_threshold and len(need) + len(self._roster.waiting) > 1:
            need = np.minimum(need, limits.long_prefill_token_threshold)
        counts = need.astype(np.int32)
        if need.sum() > budget:
            counts = np.clip(budget - (np.cumsum(need) - need), 0, need).astype(np.int32)
        granted = counts > 0
        return Batch(self.table, decoding.rows[granted], counts[granted])

    # A step: commit

    def commit(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Take in what a plan's execution gave; sequences aborted meanwhile are passed over.

        A drawn token outside the vocabulary, such as -1, says that the draw failed: that sequence
        ends with an error. So does one that was observed to attend to no finite numbers, and one
        whose policy's own score fails.

        Raises:
            InvalidTransition: The plan is not the outstanding one, or the result does not answer
                all of it (`checked_result`); nothing changes.
            BaseException: It was interrupted half way; the plan then counts as discarded. Tokens
                stay right, scores may count the step twice: hold Ctrl-C back, as `Engine` does.
        """
        self._check_outstanding(plan, "commit")
        result = checked_result(plan, result, self.config.model.vocab_size)
        try:
            return self._take_in(plan, result)
        except BaseException:
            if self._outstanding is plan:
                self.discard(plan)
            raise

    def _take_in(self, plan: StepPlan, result: StepResult) -> StepOutput:
        vocab_size, drawn = self.config.model.vocab_size, result.token_ids
        self.tier.commit()
        alive = self.table.seq_id[self._batch.at] == plan.seq_ids
        live = self._batch.where(alive)
        self.tenants.charge(live.tenants, live.first_time)
        sound = alive & ~not_finite(plan, result)
        heard = self.retention.observe(plan, result, sound)
        self.manager.advance(live)
        # Who is about to be failed holds no round: what it would forget is not known.
        self._roster.preempt_rows(self.retention.evict(self._batch.where(sound), heard))
        self._roster.fork_siblings()
        failed = (drawn < 0) | (drawn >= vocab_size)
        if self._beams:
            failed |= self._beams.faulty(plan, result, vocab_size)
        why = "nothing could be drawn: logits were not finite, or no token was allowed"
        self._roster.end_failed(plan.sample_rows, failed, why)
        self._roster.end_failed(plan.rows, alive & ~sound, "what it attended to was not finite")
        self._roster.end_faulty()
        sample = self.table.runs[plan.sample_rows].nonzero()[0]
        if self._beams:
            sample = self._roster.search(plan, result, sample, self.config.model.eos_token_ids)
        draws, token_ids = self._draws.only(sample), drawn[sample].astype(np.int32)
        rows, seq_ids = draws.rows, self.table.seq_id[draws.rows]
        stopped, full = draws.append(token_ids)
        if result.logprobs is not None:
            self.table.cumulative[rows] += result.logprobs[sample]
        self._totals.generation_tokens += len(rows)
        self.tenants.charge(draws.tenants, 1)
        self._finish_ended(rows, token_ids, stopped, full)
        finished, self._roster.finished = self._roster.finished, []
        self._outstanding = None
        if self._audits:
            self.audit()
        return StepOutput(
            rows=rows, seq_ids=seq_ids, token_ids=token_ids, sample=sample, finished=finished
        )

    def discard(self, plan: StepPlan) -> None:
        """Give up a plan that could not be carried out.

        What its blocks hold is unknown, and so is what the blocks hold that it was to move tokens
        into; so their sequences go back to waiting, in their order, and compute them again.

        Raises:
            InvalidTransition: The plan is not the outstanding one; nothing changes.
        """
        self._check_outstanding(plan, "discard")
        self._outstanding = None
        self.retention.faults.clear()
        self.tier.discard()
        running = self.table.running
        rows = np.append(plan.rows, plan.sample_rows)  # siblings may run, if it was interrupted
        moved = self.manager.holders(plan.moves[:, 1] // self.manager.block_size)
        self._roster.preempt_rows(running[np.isin(running, rows) | moved])

    def _check_outstanding(self, plan: StepPlan, where: str) -> None:
        if self._outstanding is None or plan is not self._outstanding:
            raise InvalidTransition(
                f"plan {shown(getattr(plan, 'step', plan))} is not the outstanding plan",
                where=where,
                remedy="commit every plan once, in order, to the scheduler that made it",
            )

    def _finish_ended(
        self, rows: Int32 | Int64, token_ids: Int32, stopped: Bool, full: Bool
    ) -> None:
        for i in (stopped | full).nonzero()[0].tolist():
            seq = self.table.sequences[int(rows[i])]
            assert seq is not None
            token = int(token_ids[i])
            eos = self.config.model.eos_token_ids
            reason = seq.request.sampling.named_stop(token, eos) if stopped[i] else None
            how = "stop" if stopped[i] else "length"
            self._roster.finished += self._roster.end(seq, how, stop_reason=reason)

    # Reading the state

    def sequence(self, seq_id: int) -> Sequence:
        """Return a sequence in work; KeyError if it has finished."""
        return self._roster.sequences[seq_id]

    @property
    def totals(self) -> Totals:
        """What was counted so far; changes from step to step."""
        return self._totals

    @property
    def num_added(self) -> int:
        """Sequences that were ever queued."""
        return self._next_seq_id

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._roster.waiting)

    def stats(self) -> SchedulerStats:
        """Return the counts of now and the totals so far."""
        return SchedulerStats.of(
            self.manager.pool,
            self._totals,
            num_running=len(self.table.running),
            num_waiting=len(self._roster.waiting),
            host_blocks_held=self.tier.num_blocks - self.tier.num_free,
        )

    def take_events(self) -> list[KVEvent]:
        """Return the KV events since the last call; needs ``cache.enable_kv_cache_events``."""
        return self.manager.take_events()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences are not disturbed.

        Nothing that was computed before, and nothing computed from it, is ever found again.
        """
        self.manager.reset_prefix_cache()
        for seq in self._roster.waiting:
            if seq.swapped is not None:
                seq.swapped.progress["publishes"][...] = False

    def audit(self) -> None:
        """Check every invariant of every owner of state; AssertionError names the broken one."""
        self.manager.audit()
        self._decoding.check()
        self._roster.audit()
        self.tier.audit()
