"""Who is in work: every sequence from its request to its end, waiting or running."""

from collections import Counter

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.queues import WaitingQueue
from pagedkv.core.request import FinishedSequence, Sequence, Status
from pagedkv.core.retention import Retention
from pagedkv.core.stats import Totals
from pagedkv.core.tiers import HostTier
from pagedkv.errors import NeverFits

__all__ = ["Roster"]


class Roster:
    """Moves sequences between waiting, running and finished, with their rows and blocks.

    A request's sequences are one entry of the queue until its prompt is computed: the first, the
    leader, takes rows for all of them, and the siblings fork from it.

    Attributes:
        waiting: The queue.
        requests: Per request id, its sequences that have not finished.
        sequences: The same by sequence id.
        at_work: How many of them each tenant has, by its number; who has none is not listed.
        unforeseen: Those that `bounds.foreseeable` does not vouch for, by sequence id.
        unforked: Running leaders whose siblings have not forked yet, by sequence id.
        finished: Ends that were not reported yet.
    """

    def __init__(
        self, retention: Retention, tier: HostTier, waiting: WaitingQueue, totals: Totals
    ) -> None:
        self._manager = retention.manager
        self._retention = retention
        self._tier = tier
        self._totals = totals
        self._table = retention.table
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
        for member, row in zip(seq.group, self._table.free_rows.tolist(), strict=False):
            member.row = row
            member.move(Status.RUNNING)
            self._table.bind(member, row, stop_ids)
            self._retention.bind(member)
        if seq.swapped is None:
            self._manager.admit(seq, hits)
        else:
            self._tier.swap_in(self._manager, seq)
            self._totals.num_swapped_in += 1
        self._table.start(seq.row)
        if seq.siblings:
            self.unforked[seq.seq_id] = seq
        if seq.swapped is None:
            self._count_hits(seq, len(hits) * self._manager.block_size)

    def _count_hits(self, seq: Sequence, cached: int) -> None:
        if seq.num_preemptions:
            self._totals.resumed_tokens += len(seq.token_ids)
            self._totals.resumed_tokens_cached += cached
            self._totals.recomputed_tokens += max(0, seq.num_computed - cached)
        else:
            self._totals.prompt_tokens += seq.num_prompt
            self._totals.prompt_tokens_cached += cached

    def sibling_rows(self) -> dict[int, Int32]:
        """Return the rows that fork from a row once its prompt is computed, by that row."""
        return {
            seq.row: np.array([member.row for member in seq.siblings], np.int32)
            for seq in self.unforked.values()
        }

    def fork_finished_prompts(self) -> None:
        """Let siblings run whose leader has computed the prompt; they share its blocks."""
        for seq in list(self.unforked.values()):
            if self._table.num_computed[seq.row] < self._table.num_known[seq.row]:
                continue
            del self.unforked[seq.seq_id]
            siblings, seq.siblings = seq.siblings, []
            rows = np.array([member.row for member in siblings], np.int32)
            self._manager.fork(seq.row, rows)
            for member in siblings:
                member.hashes = seq.hashes.copy()
                member.num_cached_tokens = seq.num_cached_tokens
                member.num_preemptions = seq.num_preemptions
                member.num_swaps = seq.num_swaps
                member.num_shrinks = seq.num_shrinks
                member.evictions = seq.evictions.copy()
                self._table.start(member.row)

    def preempt(self, seq: Sequence, *, swap: bool = False) -> None:
        """Take a sequence's blocks and put it back to waiting.

        Args:
            swap: Keep its state in host memory. Otherwise its tokens are computed again; if it had
                evicted, the same rounds are held again.
        """
        self._retention.save(seq)
        if swap:
            self._tier.swap_out(self._manager, seq)
            self._totals.num_swapped_out += 1
        self._vacate(seq)
        for member in seq.group:
            member.move(Status.PREEMPTED)
            member.num_preemptions += 1
            member.num_swaps += swap
        self._totals.num_preemptions += 1
        self.waiting.push(seq)

    def _vacate(self, seq: Sequence) -> None:
        """Free the rows and blocks of a running sequence and of the siblings that wait on it."""
        known = self._table.num_known[seq.row]
        seq.token_ids = self._table.token_ids[seq.row, :known].copy()
        seq.num_computed = int(self._table.num_computed[seq.row])
        seq.cumulative = float(self._table.cumulative[seq.row])
        seq.num_scored = max(seq.num_scored, seq.num_computed)
        self._manager.release(np.array([member.row for member in seq.group], np.int32))
        self.unforked.pop(seq.seq_id, None)
        for member in seq.group:
            member.row = -1

    def fail_outgrown(self, seq: Sequence) -> None:
        """End a sequence that the whole pool can no longer hold."""
        pool = self._manager.pool
        self._totals.num_failed += 1
        error = NeverFits(
            f"it has outgrown the pool of {pool.num_blocks} blocks of {self._manager.block_size}",
            where=f"request {seq.request.request_id!r}",
            remedy="lower max_tokens or raise cache.num_blocks",
        )
        self.finished += self.end(seq, "error", error=str(error))

    def end(
        self,
        seq: Sequence,
        reason: str,
        *,
        stop_reason: int | str | None = None,
        error: str = "",
    ) -> list[FinishedSequence]:
        """Take a sequence, and the siblings that wait on it, out of the scheduler."""
        forgotten = self._retention.certificate(seq)._asdict()
        if seq.status is Status.RUNNING:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
        self._tier.drop(seq)
        ended = [
            FinishedSequence(
                request_id=member.request.request_id,
                seq_id=member.seq_id,
                index=member.index,
                token_ids=member.token_ids[member.num_prompt :].tolist(),
                finish_reason=reason,
                stop_reason=stop_reason,
                error=error,
                cumulative_logprob=member.cumulative if member.request.sampling.ranks else None,
                num_cached_tokens=member.num_cached_tokens,
                num_preemptions=member.num_preemptions,
                num_swaps=member.num_swaps,
                num_shrinks=member.num_shrinks,
                **forgotten,
            )
            for member in seq.group
        ]
        for member in seq.group:
            self._strike(member)
        return ended

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
        waiting = sum(len(seq.group) for seq in self.waiting)
        assert waiting + in_rows == len(self.sequences), "a sequence neither waits nor runs"
