"""The pass of a step that lets waiting sequences in."""

import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.admission import Admission
from pagedkv.core.arrays import Int32
from pagedkv.core.batch import Batch
from pagedkv.core.beams import NO_BEAM
from pagedkv.core.bounds import foreseeable, most_blocks, usable_prefix
from pagedkv.core.positions import place
from pagedkv.core.pressure import Pressure
from pagedkv.core.prompt import prompt_array
from pagedkv.core.queues import urgency
from pagedkv.core.request import Request, Sequence
from pagedkv.core.retention import Retention
from pagedkv.core.roster import Roster
from pagedkv.core.tenants import Tenants
from pagedkv.errors import InvalidRequest, shown

__all__ = ["Intake"]

NOT_YET = -1
NOBODY = np.empty(0, np.int32), np.empty(0, np.int32)


class Intake:
    """Tries waiting sequences in their queue's order until tokens, rows or blocks run out."""

    def __init__(
        self,
        config: EngineConfig,
        roster: Roster,
        retention: Retention,
        admission: Admission,
        pressure: Pressure,
        tenants: Tenants,
    ) -> None:
        self._config = config
        self._tenants = tenants
        self._limits = config.scheduler
        self._roster = roster
        self._retention = retention
        self._manager = retention.manager
        self._table = retention.table
        self._admission = admission
        self._pressure = pressure

    def sequences(self, request: Request) -> list[Sequence]:
        """Return the sequences of a request that can be served, without their numbers.

        Raises:
            InvalidRequest: The prompt or the parameters are wrong, or the tenant is not one of
                this scheduler's.
            PolicyError: Its eviction policy cannot be read or held.
            NeverFits: An empty pool, or the tenant's part of it, would be too small.
        """
        if not isinstance(request, Request):
            raise InvalidRequest(
                f"it is {shown(request)}", where="request", remedy="give a pagedkv.Request"
            )
        self._tenants.check(request.tenant, request.request_id)
        sampling, size = request.sampling, self._manager.block_size
        policy = self._retention.resolve(request.eviction)
        max_blocks = most_blocks(policy, size, self._retention.windows.tolist())
        max_len = self._admission.max_len(request, policy)
        prompt = prompt_array(request, self._config.model.vocab_size, max_len)
        self._admission.check(request, len(prompt), max_blocks, max_len)
        group = [
            Sequence(NOT_YET, request, prompt, index=i, seed=(sampling.seed or 0) + i)
            for i in range(sampling.width)
        ]
        beams = group.copy() if sampling.beam_width is not None else []
        for seq in group:
            seq.policy, seq.max_blocks, seq.max_len = policy, max_blocks, max_len
            seq.max_prefix = usable_prefix(policy, size)
            if sampling.prompt_logprobs is not None:
                seq.max_prefix = 0  # a token that is not computed has no log-probability
            if beams:
                seq.beams, seq.cumulative = beams, NO_BEAM if seq.index else 0.0
        return group

    def enlist(
        self, group: list[Sequence], first_id: int, seeds: np.random.Generator, now: int
    ) -> None:
        """Queue what `sequences` returned.

        Args:
            first_id: The number of the first; the others' follow on, and so do their seeds.
            seeds: Where that of a request is drawn from that brings none.
            now: The number of the step before which it comes.

        Raises:
            InvalidRequest: The request's id is in use.
        """
        request = group[0].request
        if request.request_id in self._roster.requests:
            raise InvalidRequest(
                "the id is in use by a request that has not finished",
                where=f"request {request.request_id!r}",
                remedy="give every request its own id",
            )
        seed = request.sampling.seed
        if seed is None:
            seed = int(seeds.integers(2**62))
        tenant = self._tenants.welcome(request.tenant, self._roster.at_work)
        aged = urgency(request.priority, now, self._limits.ageing_steps)
        for i, seq in enumerate(group):
            seq.seq_id, seq.seed, seq.tenant_id = first_id + i, seed + i, tenant
            seq.arrived, seq.urgency = now, aged
        self._roster.enlist(group, foreseeable=self.foresees(group[0]))

    def foresees(self, seq: Sequence) -> bool:
        """Return whether it is known from the start when a sequence ends."""
        return foreseeable(seq.request, seq.policy, self._config.model)

    def make_way(self, now: int) -> None:
        """Push back running sequences for a waiting one that is more urgent, if that lets it in.

        It is the first whose tenant's quota lets it in as it is: pushing others back for one that
        its own tenant's hold up would help nobody. Call it before the running ones are given their
        tokens.
        """
        if self._limits.scheduling_policy != "priority" or not self._roster.waiting:
            return
        admission, waiting = self._admission, self._roster.waiting.order(now)
        seq = next((each for each in waiting if admission.within_quota(each)), None)
        if seq is None or admission.has_outgrown(seq):
            return
        hits = self._manager.find_prefix(seq)
        if admission.can_admit(seq, hits):
            return
        rows = self._table.running
        later = self._table.urgency[rows] > seq.urgency
        less = [self.sequence(row).request.priority > seq.request.priority for row in rows.tolist()]
        rows = rows[later & np.array(less, np.bool_)]
        order = rows[np.argsort(-self._table.urgency[rows], kind="stable")]
        for row in order[: admission.num_to_push_back(seq, hits, order)].tolist():
            if self._table.runs[row]:  # not gone already with the beam it moves with
                self._pressure.push_back(self.sequence(row))

    def admit(self, budget: int, now: int) -> tuple[Int32, Int32]:
        """Admit from the queue, and give each sequence its first chunk: [N] rows, [N] tokens.

        A sequence that does not fit is passed by at most ``max_skips`` later ones; one whose
        tenant's quota is used up, or whose prefix another is just computing, holds up nobody.

        Args:
            budget: Tokens that the step has left.
            now: The step's number.
        """
        if not self._roster.waiting or budget <= 0 or not self._table.num_free_rows:
            return NOBODY
        rows: list[int] = []
        counts: list[int] = []
        alone = len(self._roster.waiting) == 1 and not len(self._table.running)
        chunk = (0 if alone else self._limits.long_prefill_token_threshold) or budget
        passed: list[Sequence] = []
        over_quota: set[int] = set()
        computing = self._digests_in_work()
        for seq in self._roster.waiting.order(now):
            if budget <= 0 or not self._may_pass(passed):
                break
            if seq.tenant_id in over_quota or self._failed(seq):
                continue
            hits = self._manager.find_prefix(seq)
            if not self._admission.within_quota(seq):
                over_quota.add(seq.tenant_id)
            elif computing is not None and seq.next_digest(len(hits)) in computing:
                continue
            elif not self._admission.can_admit(seq, hits):
                passed.append(seq)
            else:
                count = self._enter(seq, hits, min(budget, chunk))
                for other in passed:
                    other.num_passed += 1
                if computing is not None:
                    computing.update(seq.hashes[len(hits) :])
                rows.append(seq.row)
                counts.append(count)
                budget -= count
        return (np.array(rows, np.int32), np.array(counts, np.int32)) if rows else NOBODY

    def _may_pass(self, passed: list[Sequence]) -> bool:
        """Return whether one more may be admitted before those that did not fit."""
        most = self._limits.max_skips
        return len(passed) <= most and all(seq.num_passed < most for seq in passed)

    def _failed(self, seq: Sequence) -> bool:
        """End a sequence that has outgrown all it could ever get; return whether it had."""
        if not self._admission.has_outgrown(seq):
            return False
        self._roster.fail_outgrown(seq)
        return True

    def _enter(self, seq: Sequence, hits: Int32, most: int) -> int:
        """Admit a sequence and return how many of its tokens it computes in this step."""
        stop_ids = seq.request.sampling.ends_at(self._config.model)
        self._roster.admit(seq, hits, stop_ids)
        table, row = self._table, seq.row
        end = seq.fork_at if seq.siblings else int(table.num_known[row])
        left = end - int(table.num_computed[row])
        if not (table.keeps_scores or self._retention.slides):
            count = min(left, most)
        else:
            rows = np.array([row], np.int32)
            count = min(int(self._retention.limit(rows, np.array([left], np.int32))[0]), most)
            place(Batch(table, rows, np.array([count], np.int32)))
        self._manager.grow_one(row, count)
        return count

    def _digests_in_work(self) -> set[bytes | None] | None:
        """Return the hashes of the blocks that running prompts are yet to compute; for ``lpm``."""
        if self._limits.scheduling_policy != "lpm":
            return None
        rows = self._table.running
        computed = self._table.num_computed[rows]
        prefilling = np.flatnonzero(computed < self._table.num_prompt[rows])
        digests: set[bytes | None] = set()
        for i in prefilling.tolist():
            first = int(computed[i]) // self._manager.block_size
            digests.update(self.sequence(int(rows[i])).hashes[first:])
        return digests

    def sequence(self, row: int) -> Sequence:
        """Return the sequence in a row that is taken."""
        seq = self._table.sequences[row]
        assert seq is not None
        return seq
