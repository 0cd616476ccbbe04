"""What was foreseen, as plain data: steps in a row, and whose tokens they compute in which rows."""

from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from pagedkv.core.request import Sequence

__all__ = ["Arrival", "Chunk", "Foreseen", "Pace", "Piece", "Run", "Steps"]

Pace = Callable[[int, float, float], float]
"""Seconds of a step by its tokens, their context and their query-key pairs, as in `sim.cost`."""

Piece = tuple[int, int, int, int, int]
"""Tokens that a run computes: whose, from which step on, after how many of its own, how many, and
how many in each step; 0 for all of them in one.
"""

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
        known, computed: Its tokens before the first step; of one that enters, the prompt's, and
            those that the prefix cache had.
        held: The blocks of those that are computed.
        hits: If it enters, the ids of those blocks.
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
        "hits",
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
        self.hits: list[int] = []
        self.entered = self.first = self.end = NEVER

    @property
    def last(self) -> int:
        """The last step that it takes part in, be it one of these or not."""
        return self.end if self.end >= 0 else FAR


class Chunk(NamedTuple):
    """What a prompt computes in a step: whose, after how many tokens, how many, in how many blocks
    that it takes; and if it enters, how many of those that it found nobody held.
    """

    run: Run
    before: int
    tokens: int
    blocks: int
    revived: int = 0


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
        pieces: What they compute, run after run and in order.
        shared: Of runs, the blocks that others hold as well, or may.
        came: Per arrival, the step before which it comes.
        ratio: What the admission's will be.
    """

    steps: Steps
    runs: list[Run]
    pieces: list[Piece]
    shared: dict[int, list[int]]
    came: list[int]
    ratio: float

    def __len__(self) -> int:
        return len(self.steps.ends)
