"""Who is in work: every sequence from its request to its end, waiting or running."""

from collections import Counter
from typing import Any

import numpy as np

from pagedkv.core.arrays import Bool, Int32, Int64
from pagedkv.core.beams import Beams, Search
from pagedkv.core.bounds import most_again
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.core.queues import WaitingQueue
from pagedkv.core.request import Certificate, FinishedSequence, Sequence, Status
from pagedkv.core.retention import Retention
from pagedkv.core.stats import Totals
from pagedkv.core.tenants import Tenants
from pagedkv.core.tiers import HostTier
from pagedkv.errors import NeverFits

__all__ = ["Roster"]

NOTHING_FORGOTTEN = Certificate(0.0, 0.0, None)


class Roster:
    """Moves sequences between waiting, running and finished, with their rows and blocks.

    A request's sequences are one entry of the queue until its prompt is computed: the first, the
    leader, takes rows for all of them, and the siblings fork from it. Beams stay together: they
    are preempted and end as one, and come back as they came, forking where they began to differ.

    Attributes:
        beams: The searches that run.
        waiting: The queue.
        requests: Per request id, its sequences that have not finished.
        sequences: The same by sequence id.
        at_work: How many of them each tenant has, by its number; who has none is not listed.
        unforeseen: Those that `bounds.foreseeable` does not vouch for, by sequence id.
        unforked: Running leaders whose siblings have not forked yet, by sequence id.
        finished: Ends that were not reported yet.
    """

    def __init__(
        self,
        retention: Retention,
        tier: HostTier,
        waiting: WaitingQueue,
        tenants: Tenants,
        totals: Totals,
    ) -> None:
        self._manager = retention.manager
        self._retention = retention
        self._tier = tier
        self._tenants = tenants
        self._totals = totals
        self._table = retention.table
        self.beams = Beams(retention.manager, retention.certificate)
        self.waiting = waiting
        self.requests: dict[str, list[Sequence]] = {}
        self.sequences: dict[int, Sequence] = {}
        self.at_work: Counter[int] = Counter()
        self.unforeseen: set[int] = set()
        self.unforked: dict[int, Sequence] = {}
        self.finished: list[FinishedSequence] = []

    def enlist(self, group: list[Sequence], *, foreseeable: bool) -> None:
        """Queue the sequences of a new request."""
        if not foreseeable:
            self.unforeseen.update(seq.seq_id for seq in group)
        group[0].siblings = group[1:]
        self.requests[group[0].request.request_id] = group
        self.sequences.update((seq.seq_id, seq) for seq in group)
        self.at_work[group[0].tenant_id] += len(group)
        self.waiting.push(group[0])

    def admit(self, seq: Sequence, hits: Int32, stop_ids: list[int]) -> None:
        """Take a waiting sequence into rows, starting from cached blocks or what was swapped."""
        self.waiting.remove(seq)
        group = seq.group
        for member, row in zip(group, self._table.free_rows[: len(group)].tolist(), strict=True):
            member.row = row
            member.move(Status.RUNNING)
            self._table.bind(member, row, stop_ids)
            self._retention.bind(member)
        if seq.swapped is None:
            self._manager.admit(seq, hits)
            self._retention.resume(seq)
        else:
            self._tier.swap_in(self._manager, seq)
            self._totals.num_swapped_in += 1
        self._table.start(seq.row)
        if seq.siblings:
            self.unforked[seq.seq_id] = seq
        if seq.beams:
            self.beams.enter(seq)
        if seq.swapped is None:
            self._count_hits(seq, len(hits) * self._manager.block_size)

    def _count_hits(self, seq: Sequence, cached: int) -> None:
        if seq.num_preemptions:
            self._totals.resumed_tokens += len(seq.token_ids)
            self._totals.resumed_tokens_cached += cached
            self._totals.recomputed_tokens += max(0, seq.num_computed - cached)
            for member in seq.siblings:
                self._totals.recomputed_tokens += max(0, member.num_computed - seq.fork_at)
        else:
            self._totals.prompt_tokens += seq.num_prompt
            self._totals.prompt_tokens_cached += cached

    def enter(self, seq: Sequence, row: int, cached: int) -> None:
        """Take a sequence that waits for the first time out of the queue for a row, and count what
        it found cached: `admit`, without the row itself.
        """
        self.waiting.remove(seq)
        seq.row, seq.num_cached_tokens = row, cached
        seq.move(Status.RUNNING)
        self._count_hits(seq, cached)

    def leave(self, seq: Sequence, token_ids: list[int]) -> FinishedSequence:
        """Let a sequence that forgot nothing go, whose row and blocks are free; it is full."""
        seq.row = -1
        self._strike(seq)
        return self._ending(seq, NOTHING_FORGOTTEN, token_ids=token_ids, finish_reason="length")

    def sibling_rows(self) -> dict[int, Int32]:
        """Return the rows that fork from a row once what they share is computed, by that row."""
        return {
            seq.row: np.array([member.row for member in seq.siblings], np.int32)
            for seq in self.unforked.values()
        }

    def until_forks(self, rows: Int32, need: Int32) -> Int32:
        """Return ``need`` cut so that no row computes past the fork of siblings: [B] each."""
        if self.unforked:
            need = need.copy()
            for seq in self.unforked.values():
                left = seq.fork_at - int(self._table.num_computed[seq.row])
                need[rows == seq.row] = np.minimum(need[rows == seq.row], left)
        return need

    def fork_siblings(self) -> None:
        """Let siblings run whose leader has computed what they share; they share its blocks."""
        for seq in list(self.unforked.values()):
            if self._table.num_computed[seq.row] < seq.fork_at:
                continue
            del self.unforked[seq.seq_id]
            siblings, seq.siblings = seq.siblings, []
            rows = np.array([member.row for member in siblings], np.int32)
            self._manager.fork(seq.row, rows)
            for member in siblings:
                member.num_cached_tokens = seq.num_cached_tokens
                member.num_preemptions = seq.num_preemptions
                member.num_swaps = seq.num_swaps
                if len(member.token_ids) == seq.fork_at:
                    member.follow(seq)
                else:  # it has gone on by itself before
                    self._retention.resume(member)
                self._table.start(member.row)

    def preempt(self, seq: Sequence, *, swap: bool = False) -> None:
        """Take a sequence's blocks and put it back to waiting.

        Args:
            swap: Keep its state in host memory. Otherwise its tokens are computed again; if it had
                evicted, the same rounds are held again.
        """
        seq, party = seq.leader, seq.party
        started = self._started(party)
        for member in started:
            self._retention.save(member)
        self._note_held(seq, started)
        if swap:
            self._tier.swap_out(self._manager, seq)
            self._totals.num_swapped_out += 1
        self._vacate(seq)
        for member in party:
            member.move(Status.PREEMPTED)
            member.num_preemptions += 1
            member.num_swaps += swap
        if not seq.siblings:
            seq.siblings, seq.fork_at = party[1:], _num_shared(party)
        self._totals.num_preemptions += 1
        self.waiting.push(seq)

    def _note_held(self, leader: Sequence, started: list[Sequence]) -> None:
        """Remember how many blocks a party held, if it had computed all that it knew."""
        table, rows = self._table, np.array([member.row for member in started], np.int32)
        left = table.num_known[rows] - table.num_computed[rows]
        if (left <= 1).all():
            held = table.num_blocks[:, rows]
            leader.held = int(held.sum())
            then = -(-(table.num_resident[:, rows] + left) // table.block_size)
            leader.next_held = int(np.maximum(held, then).sum())
            if self._retention.slides:  # what is found is held until it slides
                groups, size = table.num_groups, table.block_size
                found = most_again(leader, groups, size) // groups - 1
                leader.max_prefix = min(leader.max_prefix, found * size)

    def _started(self, party: list[Sequence]) -> list[Sequence]:
        """Return those that run, and do not wait for their leader."""
        return [member for member in party if self._table.runs[member.row]]

    def _vacate(self, seq: Sequence, *, ends: bool = False) -> None:
        """Free the rows and blocks of a running leader and of all that move with it."""
        party, table = seq.party, self._table
        for member in self._started(party):
            row = member.row
            member.token_ids = table.token_ids[row, : table.num_known[row]].copy()
            member.num_computed = int(table.num_computed[row])
            member.cumulative = float(table.cumulative[row])
            member.num_scored = max(member.num_scored, member.num_computed)
        if seq.beams:
            self.beams.leave(seq, ends=ends)
        self._manager.release(np.array([member.row for member in party], np.int32))
        self.unforked.pop(seq.seq_id, None)
        for member in party:
            member.row = -1

    def preempt_rows(self, rows: Int32) -> None:
        """Let rows go back to waiting, in their order."""
        for row in rows[::-1].tolist():
            seq = self._table.sequences[row]
            if seq is not None:  # not gone already with the beam it moves with
                self.preempt(seq)

    def fail_outgrown(self, seq: Sequence) -> None:
        """End a sequence that the whole pool, or its tenant's part of it, can no longer hold."""
        self._totals.num_failed += 1
        owner, remedy = self._tenants.bound(seq.request.tenant)
        error = NeverFits(
            f"it has outgrown the pool: {owner} blocks of {self._manager.block_size}",
            where=f"request {seq.request.request_id!r}",
            remedy=f"lower max_tokens or {remedy}",
        )
        self.finished += self.end(seq, "error", error=str(error))

    def end_failed(self, rows: Int32, failed: Bool, why: str) -> None:
        """End the failed of rows, [N] each, that still run, for a fault of the model."""
        if not np.count_nonzero(failed):
            return
        for row in rows[failed & self._table.runs[rows]].tolist():
            seq = self._table.sequences[row]
            if seq is not None:  # not gone already with the beam it moves with
                error = f"request {seq.request.request_id!r}: {why}"
                self._manager.disown(row)  # whoever begins alike computes its own
                self.finished += self.end(seq, "error", error=error)

    def end_faulty(self) -> bool:
        """End whoever's own score failed in eviction; return whether anybody's did."""
        faults, self._retention.faults = self._retention.faults, []
        for rows, fault in faults:
            self.end_failed(rows, np.ones(len(rows), np.bool_), str(fault))
        return bool(faults)

    def end(
        self,
        seq: Sequence,
        reason: str,
        *,
        stop_reason: int | str | None = None,
        error: str = "",
    ) -> list[FinishedSequence]:
        """Take a sequence, and all that move with it, out of the scheduler."""
        told, sampling = seq.told, seq.request.sampling
        certificates = [
            self._retention.certificate(member) if member.policy.evicts else NOTHING_FORGOTTEN
            for member in told
        ]
        self._take_out(seq.leader)
        return [
            self._ending(
                member,
                certificate,
                token_ids=member.token_ids[member.num_prompt :].tolist(),
                finish_reason=reason,
                stop_reason=stop_reason,
                error=error,
                cumulative_logprob=member.cumulative if sampling.ranks else None,
            )
            for member, certificate in zip(told, certificates, strict=True)
        ]

    def search(
        self, plan: StepPlan, result: StepResult, sample: Int64, eos_token_ids: tuple[int, ...]
    ) -> Int64:
        """Extend the beams among the samples of a step; return the other samples."""
        rest = self.beams.take(plan, result, sample)
        rows, over = self.beams.advance()
        self._totals.generation_tokens += len(rows)
        self._tenants.charge(self._table.tenant[rows], 1)
        for search in over:
            self.finished += self.end_search(search, eos_token_ids)
        return rest

    def end_search(self, search: Search, eos_token_ids: tuple[int, ...]) -> list[FinishedSequence]:
        """Take a search that is over out of the scheduler; its best sequences are its answer."""
        leader = search.beams[0]
        sampling = leader.request.sampling
        self._take_out(leader)
        return [
            self._ending(
                member,
                found.forgotten,
                token_ids=found.token_ids,
                finish_reason="length" if found.stop_id is None else "stop",
                stop_reason=sampling.named_stop(found.stop_id, eos_token_ids),
                cumulative_logprob=found.cumulative,
            )
            for member, found in zip(leader.told, search.found, strict=False)
        ]

    def _take_out(self, leader: Sequence) -> None:
        if leader.status is Status.RUNNING:
            self._vacate(leader, ends=True)
        else:
            self.waiting.remove(leader)
            self.beams.leave(leader, ends=True)
        self._tier.drop(leader)
        for member in leader.party:
            self._strike(member)

    def _ending(self, seq: Sequence, forgotten: Certificate, **facts: Any) -> FinishedSequence:
        return FinishedSequence(
            request_id=seq.request.request_id,
            seq_id=seq.seq_id,
            index=seq.index,
            num_cached_tokens=seq.num_cached_tokens,
            num_preemptions=seq.num_preemptions,
            num_swaps=seq.num_swaps,
            num_shrinks=seq.num_shrinks,
            **forgotten._asdict(),
            **facts,
        )

    def _strike(self, seq: Sequence) -> None:
        seq.move(Status.FINISHED)
        del self.sequences[seq.seq_id]
        self.unforeseen.discard(seq.seq_id)
        self.at_work[seq.tenant_id] -= 1
        if not self.at_work[seq.tenant_id]:
            del self.at_work[seq.tenant_id]
        group = self.requests[seq.request.request_id]
        group.remove(seq)
        if not group:
            del self.requests[seq.request.request_id]
        self._totals.num_finished += 1

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold."""
        for seq_id, seq in self.sequences.items():
            assert seq.seq_id == seq_id, "a sequence is filed under another's id"
            running = seq.status is Status.RUNNING
            assert running == (seq.row >= 0), f"sequence {seq_id} and its row disagree"
            if running:
                assert self._table.sequences[seq.row] is seq, f"row {seq.row} is another's"
        tenants = Counter(seq.tenant_id for seq in self.sequences.values())
        assert self.at_work == tenants, "a tenant's sequences are miscounted"
        assert self.unforeseen <= self.sequences.keys(), "a sequence that ended is remembered"
        taken = sum(s is not None for s in self._table.sequences)
        in_rows = sum(s.row >= 0 for s in self.sequences.values())
        assert taken == in_rows, "a row is held by nobody in work"
        self.beams.audit()
        waiting = sum(len(seq.group) for seq in self.waiting)
        assert waiting + in_rows == len(self.sequences), "a sequence neither waits nor runs"


def _num_shared(party: list[Sequence]) -> int:
    """Return how many tokens equally long sequences begin with in common."""
    tokens = np.stack([seq.token_ids for seq in party])
    differs = (tokens != tokens[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else len(differs)
