"""Who may enter: what can never fit is refused, what does not fit now waits.

How much must stay free for those who run already is one of three small functions, from careless to
careful: `greedy`, `optimistic`, `guaranteed`.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Bool, Int32, Int64
from pagedkv.core.bounds import least_again, most_again
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import UNBOUNDED, Request, Sequence
from pagedkv.core.table import FREE
from pagedkv.core.tenants import NO_QUOTA, Tenants
from pagedkv.errors import InvalidRequest, NeverFits
from pagedkv.eviction import Policy

__all__ = ["Admission", "decayed", "footprint", "length_limit", "reserved_ratio"]

NO_HITS = np.empty(0, np.int32)
FIRST_RATIO = 0.7
LEAST_RATIO = 0.1
DECAY_STEPS = 600
LOOK_AHEAD = 20


class Need(NamedTuple):
    """Blocks over all tables: for the tokens that are known, and the most there can ever be."""

    now: int
    ever: int


def greedy(now: int, ever: int, ratio: float) -> int:
    """Reserve what the known tokens need."""
    return now


def optimistic(now: int, ever: int, ratio: float) -> int:
    """Reserve that and a share of what may come, which falls while all goes well."""
    return now + int(ratio * max(0, ever - now))


def guaranteed(now: int, ever: int, ratio: float) -> int:
    """Reserve all there can ever be: nobody admitted is ever preempted for blocks."""
    return max(now, ever)


RESERVES = {"greedy": greedy, "optimistic": optimistic, "guaranteed": guaranteed}


def footprint(tokens: Int32, max_blocks: Int32, block_size: int) -> Int32:
    """Return the most blocks per table that sequences of so many computed tokens ever hold: [N]."""
    blocks: Int32 = np.minimum(-(-tokens // block_size), max_blocks)
    return blocks


def reserved_ratio(num_generated: Int32, num_left: Int32) -> float:
    """Return the share of the tokens still to come to reserve, after a preemption (SGLang's).

    As if all running sequences went on for `LOOK_AHEAD` tokens and then ended in proportion.
    """
    total = int(num_generated.sum()) + int(num_left.sum())
    done = int(num_generated.sum()) + LOOK_AHEAD * len(num_generated)
    return min(1.0, done / (total + 1))


def decayed(ratio: float) -> float:
    """Return the share after a step without a preemption."""
    return max(LEAST_RATIO, ratio - (FIRST_RATIO - LEAST_RATIO) / DECAY_STEPS)


def length_limit(request: Request, num_prompt: int, max_len: int) -> int:
    """Return the number of known tokens at which a request's sequences end."""
    most = request.sampling.max_tokens
    return max_len if most is None else min(num_prompt + most, max_len)


class Admission:
    """The rules of admission over one pool; reads the state and changes nothing but its ratio.

    Attributes:
        ratio: The share that ``optimistic`` reserves.
        reserve: The function of `RESERVES` that is configured.
    """

    def __init__(self, config: EngineConfig, manager: BlockManager, tenants: Tenants) -> None:
        self._config = config
        self._manager = manager
        self._table = manager.table
        self._tenants = tenants
        self.reserve = RESERVES[config.scheduler.admission]
        self._guaranteed = config.scheduler.admission == "guaranteed"
        self.ratio = FIRST_RATIO

    # At `add`

    def max_len(self, request: Request, policy: Policy) -> int:
        """Return the most tokens a request's sequences may know.

        A stream whose cache is bounded and whose positions close up may go on past the model's
        length, if it says how far.
        """
        endless = policy.most_tokens is not None and policy.positions == "cache"
        limited = request.sampling.max_tokens is not None
        return UNBOUNDED if endless and limited else self._config.model.max_model_len

    def check(self, request: Request, num_prompt: int, max_blocks: int, max_len: int) -> None:
        """Refuse a request that an empty pool could not serve.

        Args:
            max_blocks: The most blocks per table that its policy lets it hold.
            max_len: The most tokens it may know.

        Raises:
            InvalidRequest: It wants more sequences than ever run at once.
            NeverFits: The pool, or its tenant's part of it, is too small for the prompt; or, where
                admission is guaranteed, for its whole footprint.
        """
        where = f"request {request.request_id!r}"
        rows = self._config.scheduler.max_num_seqs
        width = request.sampling.width
        if width > rows:
            name = "n" if request.sampling.beam_width is None else "beam_width"
            raise InvalidRequest(
                f"{name} is {width} and {rows} sequences run at once",
                where=where,
                remedy=f"lower {name} or raise scheduler.max_num_seqs",
            )
        self._check_vocabulary(request)
        size, what, need = self._manager.block_size, "prompt", self._blocks(num_prompt, max_blocks)
        if self._guaranteed:
            most = length_limit(request, num_prompt, max_len) - 1
            what, need = "request", self._blocks(most, max_blocks) * width
        if need > self._tenants.most_blocks(request.tenant):
            owner, remedy = self._tenants.bound(request.tenant)
            raise NeverFits(
                f"the {what} needs {need} blocks of {size} tokens and {owner}",
                where=where,
                remedy=f"shorten the prompt or {remedy}",
            )

    def _check_vocabulary(self, request: Request) -> None:
        model, sampling = self._config.model, request.sampling
        for field in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            largest = max(getattr(sampling, field) or (), default=0)
            if largest >= model.vocab_size:
                raise InvalidRequest(
                    f"token {largest} is outside the vocabulary",
                    where=f"request {request.request_id!r} {field}",
                    remedy=f"give ids from 0 to {model.vocab_size - 1}",
                )
        named = sampling.num_candidates(len(sampling.ends_at(model)))
        if named is not None and named > model.vocab_size:
            raise InvalidRequest(
                f"beam_width is {sampling.beam_width}, for which each beam names {named} tokens, "
                f"and the vocabulary has {model.vocab_size}",
                where=f"request {request.request_id!r}",
                remedy="lower beam_width",
            )

    # While it waits

    def has_outgrown(self, seq: Sequence) -> bool:
        """Return whether a waiting sequence has come to need more than it could ever get."""
        least = least_again(seq, self._manager.num_groups, self._manager.block_size)
        return min(self._known(seq), least) > self._tenants.most_blocks(seq.request.tenant)

    def within_quota(self, seq: Sequence) -> bool:
        """Return whether a sequence's tenant may hold the blocks that admission reserves for it.

        One that has not outgrown the quota may enter if nothing else of its tenant's runs.
        """
        groups, table = self._manager.num_groups, self._table
        quota = self._tenants.quota_of(seq.request.tenant)
        if quota == NO_QUOTA:
            return True
        rows = np.flatnonzero((table.seq_id != FREE) & (table.tenant == seq.tenant_id))
        if not len(rows):
            return True
        running = table.running[table.tenant[table.running] == seq.tenant_id]
        held = self._manager.num_distinct(rows) + self._manager.pledged_blocks(running)
        most = footprint(table.limit[rows] - 1, table.max_blocks[rows], self._manager.block_size)
        now = held + self._known(seq)
        ever = length_limit(seq.request, seq.num_prompt, seq.max_len) - 1
        own = self._blocks(ever, seq.max_blocks) * len(seq.group)
        return self.reserve(now, int(most.sum()) * groups + own, self.ratio) <= quota

    def can_admit(self, seq: Sequence, hits: Int32) -> bool:
        """Return whether a sequence fits beside what running ones have reserved.

        One that was preempted needs a block more for each that runs, so that it is not pushed
        back at the next boundary that any of them crosses.
        """
        if len(seq.group) > self._table.num_free_rows:
            return False
        available = self._manager.pool.num_available
        mine = self._need(seq, hits)
        if not len(self._table.running):
            return mine.now <= available
        spare = int(self._config.scheduler.watermark * self._manager.pool.num_blocks)
        if seq.num_preemptions:
            spare += len(self._table.running) * self._manager.num_groups
        theirs = self.reserved()
        need = self.reserve(mine.now, mine.ever, self.ratio)
        return need + self.reserve(theirs.now, theirs.ever, self.ratio) + spare <= available

    def over_quota(self) -> tuple[int, Int32]:
        """Return by how many blocks a tenant's running sequences exceed its quota, and their rows.

        Counted as of the end of the next step; the first tenant over its quota, 0 if there is none.
        """
        rows = self._table.running
        if not self._tenants.limited:
            return 0, rows
        for tenant in np.unique(self._table.tenant[rows]).tolist():
            mine = rows[self._table.tenant[rows] == tenant]
            quota, pledged = int(self._tenants.quota[tenant]), self._manager.pledged_blocks(mine)
            if int(self._table.num_blocks[:, mine].sum()) + pledged <= quota:
                continue  # even if no block is shared
            held = self._manager.num_distinct(mine) + pledged
            if held > quota:
                return held - quota, mine
        return 0, rows

    def num_to_push_back(self, seq: Sequence, hits: Int32, rows: Int32) -> int:
        """Return how many of the rows must go, in order, for a sequence to be admitted.

        0 if even all of them would not do.
        """
        running, mine = len(self._table.running), self._need(seq, hits)
        spare = int(self._config.scheduler.watermark * self._manager.pool.num_blocks)
        if seq.num_preemptions:
            spare += running * self._manager.num_groups
        need = self.reserve(mine.now, mine.ever, self.ratio) + spare
        owned = np.append(0, np.cumsum(self._kept_alone(rows)))

        def fits(count: int) -> bool:
            available = self._manager.pool.num_available + int(owned[count])
            if count == running:
                return mine.now <= available
            theirs = self.reserved(without=rows[:count])
            return need + self.reserve(theirs.now, theirs.ever, self.ratio) <= available

        counts = range(max(1, len(seq.group) - len(self._table.free_rows)), len(rows) + 1)
        at = bisect_left(counts, True, key=fits)
        return counts[at] if at < len(counts) else 0

    def _kept_alone(self, rows: Int32) -> Int64:
        """Return how many blocks each row is the only holder of: [N]."""
        table = self._table
        held = table.num_blocks[:, rows]
        width = int(held.max(initial=1))
        ids = table.block_table[:, rows, :width]
        alone = (np.arange(width) < held[:, :, None]) & (self._manager.pool.references(ids) == 1)
        counts: Int64 = alone.sum(axis=(0, 2))
        return counts

    def _need(self, seq: Sequence, hits: Int32) -> Need:
        groups, size = self._manager.num_groups, self._manager.block_size
        if seq.swapped is not None:
            left = len(seq.token_ids) - seq.num_computed
            known = -(-(seq.swapped.progress["num_resident"] + left) // size)
            blocks = np.maximum(np.minimum(known, seq.max_blocks), seq.swapped.num_blocks)
            now = int(blocks.sum())
        else:
            now = self._manager.missing_blocks(seq, hits) + self._own_blocks(seq)
            now = min(now, most_again(seq, groups, size))
            if seq.num_preemptions:  # it has not outgrown all that there is, so that is enough
                now = min(now, self._tenants.most_blocks(seq.request.tenant))
        if self._config.scheduler.admission == "greedy":
            return Need(now, now)
        most = length_limit(seq.request, seq.num_prompt, seq.max_len) - 1
        ever = self._blocks(most, seq.max_blocks)
        own = ever * len(seq.group)
        if not (seq.policy.evicts or len(hits) == 0 or self._table.evicts.any()):
            # A block that was found and is in use costs nothing, as long as nobody can forget it.
            in_use = int((self._manager.pool.references(hits) > 0).sum())
            own -= in_use
        if len(seq.group) > 1 and not seq.policy.evicts:
            own -= (len(seq.group) - 1) * (seq.num_prompt // size) * groups
        return Need(now, own)

    def _known(self, seq: Sequence) -> int:
        """Return how many blocks a waiting sequence needs for what it knows, if none is found."""
        if seq.swapped is not None:
            return self._need(seq, NO_HITS).now
        known = self._blocks(len(seq.token_ids), seq.max_blocks) + self._own_blocks(seq)
        return min(known, most_again(seq, self._manager.num_groups, self._manager.block_size))

    def _own_blocks(self, seq: Sequence) -> int:
        """Return the blocks that siblings need at once after they fork, beside the leader's.

        Only beams that come back have gone on by themselves before.
        """
        known = len(seq.token_ids)
        if not seq.siblings or seq.fork_at == known:
            return 0
        shared = 0 if seq.policy.evicts else self._blocks_full(seq.fork_at)
        return len(seq.siblings) * (self._blocks(known, seq.max_blocks) - shared)

    def _blocks_full(self, num_tokens: int) -> int:
        return num_tokens // self._manager.block_size * self._manager.num_groups

    def reserved(self, without: Int32 | None = None) -> Need:
        """Return what sequences in rows may still take: for known tokens, and at the most.

        Args:
            without: [N] Rows that are not counted.
        """
        table, manager = self._table, self._manager
        running, is_greedy = table.running, self._config.scheduler.admission == "greedy"
        if is_greedy and without is None and len(running) + table.num_free_rows == table.num_rows:
            now = manager.pledged_blocks(running)
            return Need(now, now)
        taken = table.seq_id != FREE
        if without is not None:
            taken[without] = False
            running = running[taken[running]]
        now = manager.pledged_blocks(running)
        waits = taken & ~table.runs & (table.num_known > table.num_prompt)
        if waits.any():  # beams that come back and have not forked yet
            size, groups = manager.block_size, manager.num_groups
            own = np.minimum(-(-table.num_known[waits] // size), table.max_blocks[waits])
            # What they share of the prompt they may forget, and take as much of their own.
            shared = np.where(table.evicts[waits], 0, table.num_prompt[waits] // size)
            now += int((own - shared).sum()) * groups
        if is_greedy:
            return Need(now, now)
        rows = np.flatnonzero(taken).astype(np.int32)
        most = footprint(table.limit[rows] - 1, table.max_blocks[rows], manager.block_size)
        held = self._kept(rows)
        return Need(now, int(np.maximum(most - held, 0).sum()) + manager.num_copies(rows))

    def _kept(self, rows: Int32) -> Int32:
        """Return how many blocks of each table its sequence need not take again: [groups, N].

        A sequence that evicts may forget a shared block, which frees nothing, and take another.
        """
        table = self._table
        held = table.num_blocks[:, rows].copy()
        forgets: Bool = table.evicts[rows]
        if forgets.any():
            width = int(held.max(initial=1))
            used = np.arange(width) < held[:, forgets, None]
            ids = table.block_table[:, rows[forgets], :width]
            held[:, forgets] = (used & (self._manager.pool.references(ids) == 1)).sum(axis=2)
        return held

    # As time passes

    def step(self) -> None:
        """A step passed without a preemption."""
        self.ratio = decayed(self.ratio)

    def preempted(self) -> None:
        """A sequence was preempted: estimate anew how far the running ones will go."""
        rows = self._table.running
        generated = self._table.num_known[rows] - self._table.num_prompt[rows]
        left = self._table.limit[rows] - self._table.num_known[rows]
        self.ratio = max(LEAST_RATIO, reserved_ratio(generated, left))

    def _blocks(self, num_tokens: int, max_blocks: int) -> int:
        per_table = min(-(-num_tokens // self._manager.block_size), max_blocks)
        return per_table * self._manager.num_groups
