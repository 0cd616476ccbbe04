"""What a user asks for, and the life of each sequence that answers it.

Everything that affects the lifecycle lives in this file: `TRANSITIONS` is the whole of it.
"""

import enum
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import force_setattr

from pagedkv.core.arrays import Bool, Float32, Int32
from pagedkv.core.params import SamplingParams
from pagedkv.errors import InvalidRequest, InvalidTransition, is_text, shown
from pagedkv.eviction import Policy

__all__ = [
    "TRANSITIONS",
    "UNBOUNDED",
    "FinishedSequence",
    "Request",
    "SamplingParams",
    "Sequence",
    "Status",
]

FULL = Policy()
UNBOUNDED = 2**30
LARGEST_PRIORITY = 2**20


class Request(Struct, frozen=True, kw_only=True):
    """One prompt and what to do with it.

    Attributes:
        request_id: The caller's name for it; unique among the requests of a scheduler.
        prompt_token_ids: The prompt.
        sampling: How to draw.
        priority: Lower is sooner, where the scheduler or the cache goes by priority.
        tenant: On whose account it runs, where the scheduler shares fairly or holds quotas.
        arrival: When it came, in seconds of the caller's clock; only its order counts, and only
            between requests of equal rank. The order of `Scheduler.add` decides what is left.
        cache_salt: Prompts share cached blocks only with prompts of the same salt.
        eviction: What its sequences may forget: a policy, a preset or an expression; None takes
            the cache's.

    Raises:
        InvalidRequest: A field is of another type; the prompt is checked by `Scheduler.add`.
    """

    request_id: str
    prompt_token_ids: Ids[int] | Int32
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    arrival: float = 0.0
    cache_salt: str = ""
    eviction: str | Policy | None = None

    def __post_init__(self) -> None:
        for name, kinds in (
            ("request_id", (str,)),
            ("sampling", (SamplingParams,)),
            ("priority", (int,)),
            ("tenant", (str,)),
            ("arrival", (int, float)),
            ("cache_salt", (str,)),
            ("eviction", (str, Policy, type(None))),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise self._refusal(name, f"give {' or '.join(kind.__name__ for kind in kinds)}")
            if isinstance(value, str) and not is_text(value):
                raise self._refusal(name, "give text that can be encoded as UTF-8")
        self._check_rank()
        force_setattr(self, "arrival", float(self.arrival))
        if isinstance(self.prompt_token_ids, Iterator):  # it can be read once, and several do
            force_setattr(self, "prompt_token_ids", list(self.prompt_token_ids))

    def _check_rank(self) -> None:
        if abs(self.priority) > LARGEST_PRIORITY:
            raise self._refusal(
                "priority",
                f"give a number from {-LARGEST_PRIORITY} to {LARGEST_PRIORITY}",
            )
        if not abs(self.arrival) <= sys.float_info.max:  # NaN, infinity, or an integer beyond
            raise self._refusal("arrival", "give seconds as a finite number")

    def _refusal(self, field: str, remedy: str) -> InvalidRequest:
        what, where = f"{field} is {shown(getattr(self, field))}", shown(self.request_id)
        return InvalidRequest(what, where=f"request {where}", remedy=remedy)


class Status(enum.IntEnum):
    """Where a sequence is in its life."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.PREEMPTED, Status.FINISHED}),
    Status.PREEMPTED: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


class FinishedSequence(Struct, frozen=True, kw_only=True):
    """A sequence that has ended, and how.

    Attributes:
        request_id: The request it answers.
        seq_id: Its own id.
        index: Which of the request's sequences: ``n``, or ``best_of`` to choose ``n`` from.
        token_ids: The generated tokens, a stop token included.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``.
        stop_reason: The stop token's id or the stop string, if one ended it and it was not eos.
        error: What went wrong, if ``finish_reason`` is ``error``.
        cumulative_logprob: Of its tokens, if its request ranks sequences by it.
        num_cached_tokens: Prompt tokens that the prefix cache spared at the first admission.
        num_preemptions: How often it was pushed back to waiting.
        num_swaps: How often its blocks were kept in host memory meanwhile.
        num_shrinks: How often it had to forget blocks because others lacked them.
        num_evicted_tokens: Tokens it has forgotten, mean over groups; 0 says that its policy, if
            it has one, never fired.
        forfeited_mass: The attention mass that they got from the last query before they went,
            summed, mean over groups.
        leave_one_out_error: How far leaving them out moves the attention output: the mean over
            the queries that saw each block, or token, before it went, summed over those that
            went, mean over groups. None unless the policy scores by it (``lobo``).
    """

    request_id: str
    seq_id: int
    index: int
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    error: str = ""
    cumulative_logprob: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    num_shrinks: int = 0
    num_evicted_tokens: float = 0.0
    forfeited_mass: float = 0.0
    leave_one_out_error: float | None = None


class Certificate(NamedTuple):
    """What a sequence has forgotten; the words are `FinishedSequence`'s."""

    num_evicted_tokens: float
    forfeited_mass: float
    leave_one_out_error: float | None


class Eviction(NamedTuple):
    """A round of eviction that was held.

    Attributes:
        bits: Which table entries stayed, packed: as many bytes for each group, ceil(width / 8) at
            least.
        groups: How many there are.
        width: Blocks, or tokens, of the longest table.
    """

    bits: bytes
    groups: int
    width: int

    @classmethod
    def of(cls, keep: Bool) -> "Eviction":
        """Pack ``keep``: [groups, width]."""
        return cls(np.packbits(keep, axis=1).tobytes(), *keep.shape)

    @property
    def keep(self) -> Bool:
        """[groups, width] Which table entries stayed."""
        bits = np.frombuffer(self.bits, np.uint8).reshape(self.groups, -1)
        return np.unpackbits(bits, axis=1, count=self.width).view(np.bool_)

    def after(self, before: "Eviction | None") -> "Eviction":
        """Return both as one: this round was held on what ``before`` left of the same table."""
        if before is None:
            return self
        both = before.keep.copy()
        for table, left in zip(both, self.keep, strict=True):
            stayed = np.flatnonzero(table)
            table[stayed] = left[: len(stayed)]
        return Eviction.of(both)


class SavedScores(NamedTuple):
    """What eviction knew of a sequence when it was preempted.

    Attributes:
        computed: Its computed tokens.
        columns: [groups, blocks or tokens] per column of scores, by name.
        num_evicted: Tokens it had forgotten, summed over groups.
        forfeited: The mass they had, summed over groups.
        left_out: Their leave-one-out error, summed over groups.
    """

    computed: int
    columns: dict[str, Float32]
    num_evicted: int
    forfeited: float
    left_out: float


class SwappedSequence(NamedTuple):
    """All of a sequence's rows in the table while its blocks are in host memory.

    Attributes:
        blocks: [N] Host blocks, table after table.
        num_blocks: [groups] Blocks of each table; they add up to N.
        columns: [groups, widest table] per column that stands beside the block table.
        progress: The sequence's other columns by name: [groups] or one number.
    """

    blocks: Int32
    num_blocks: Int32
    columns: dict[str, npt.NDArray[Any]]
    progress: dict[str, npt.NDArray[Any]]


class Sequence:
    """One sequence of tokens on its way from prompt to end.

    While it runs, its tokens live in the sequence table at `row`; otherwise in `token_ids`.

    Attributes:
        seq_id: Unique, counts up in order of creation.
        tenant_id: Its request's tenant as a number.
        arrived: The step before which it was added.
        urgency: Its priority and age as one number; lower is more urgent.
        num_passed: How many later ones were admitted before it while it lacked blocks or rows.
        swapped: Where its blocks are while they are in host memory.
        num_swaps: How often they went there.
        siblings: The request's other sequences while they wait for this one to compute what they
            have in common; empty once they have forked from it.
        fork_at: How many tokens that is: the prompt, or more for beams that come back.
        beams: All beams of its request's search, itself among them; empty for a sequence that
            goes its own way.
        hashes: The hash chain of its full blocks, as far as it was needed.
        row: Its table row while it runs, else -1.
        policy: What it may forget.
        max_blocks: The most blocks per table that the policy lets it hold at once.
        max_len: The most tokens it may know.
        max_prefix: The most tokens it may take from the prefix cache.
        evictions: The rounds that cost it blocks, by the tokens computed at that time.
        saved: Its scores at the last preemption, if it was evicting.
        held: The blocks, over all tables, that it and all that moves with it held when it was
            preempted with all its tokens computed.
        next_held: Those, and what the step that was to come would have added.
        num_computed: The tokens that were computed when it last left its row.
        cumulative: Its log-probability as of then, if its request ranks by that.
        num_scored: The most that were ever computed when it left: the prompt tokens up to there
            have had their log-probabilities.
    """

    __slots__ = (
        "arrived",
        "beams",
        "cumulative",
        "evictions",
        "fork_at",
        "hashes",
        "held",
        "index",
        "max_blocks",
        "max_len",
        "max_prefix",
        "next_held",
        "num_cached_tokens",
        "num_computed",
        "num_passed",
        "num_preemptions",
        "num_prompt",
        "num_scored",
        "num_shrinks",
        "num_swaps",
        "policy",
        "request",
        "row",
        "saved",
        "seed",
        "seq_id",
        "siblings",
        "status",
        "swapped",
        "tenant_id",
        "token_ids",
        "urgency",
    )

    def __init__(
        self, seq_id: int, request: Request, token_ids: Int32, *, index: int, seed: int
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        self.token_ids = token_ids
        self.index = index
        self.seed = seed
        self.num_prompt = len(token_ids)
        self.status = Status.WAITING
        self.row = -1
        self.siblings: list[Sequence] = []
        self.fork_at = len(token_ids)
        self.beams: list[Sequence] = []
        self.policy = FULL
        self.max_blocks = UNBOUNDED
        self.max_len = UNBOUNDED
        self.max_prefix = UNBOUNDED
        self.evictions: dict[int, Eviction] = {}
        self.saved: SavedScores | None = None
        self.hashes: list[bytes] = []
        self.num_cached_tokens = 0
        self.held = UNBOUNDED
        self.next_held = UNBOUNDED
        self.num_computed = 0
        self.num_preemptions = 0
        self.num_scored = 0
        self.cumulative = 0.0
        self.num_swaps = 0
        self.num_shrinks = 0
        self.num_passed = 0
        self.tenant_id = 0
        self.arrived = 0
        self.urgency = 0
        self.swapped: SwappedSequence | None = None

    @property
    def group(self) -> "list[Sequence]":
        """Itself and the siblings that wait on it."""
        return [self, *self.siblings]

    @property
    def leader(self) -> "Sequence":
        """The one that stands for it in the queue."""
        return self.beams[0] if self.beams else self

    @property
    def told(self) -> "list[Sequence]":
        """Those of its party that are answered: of beams, as many as the request wants back."""
        return self.party[: self.request.sampling.n] if self.beams else self.party

    @property
    def party(self) -> "list[Sequence]":
        """Whoever runs, waits and ends together with it: its beams, or its group."""
        return self.beams or self.group

    def follow(self, other: "Sequence") -> None:
        """Go on as another sequence did: with its hashes and with what it has forgotten."""
        self.hashes = other.hashes.copy()
        self.evictions = other.evictions.copy()
        self.num_shrinks = other.num_shrinks

    def next_digest(self, num_hits: int) -> bytes | None:
        """Return the hash of the first block that it did not find, if that is known."""
        return self.hashes[num_hits] if num_hits < len(self.hashes) else None

    def move(self, status: Status) -> None:
        """Change the status.

        Raises:
            InvalidTransition: `TRANSITIONS` has no such arrow.
        """
        if status not in TRANSITIONS[self.status]:
            raise InvalidTransition(
                f"{self.status.name} cannot become {status.name}",
                where=f"request {self.request.request_id!r}",
            )
        self.status = status
