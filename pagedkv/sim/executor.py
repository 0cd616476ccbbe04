"""Carries out plans by saying how long they would take, and what they would say."""

from collections.abc import Callable

import numpy as np

from pagedkv.core.arrays import Float64, Int32, Int64, UInt64
from pagedkv.core.foreseen import Pace
from pagedkv.core.leap import Leap
from pagedkv.core.plan import Observed, StepPlan, StepResult
from pagedkv.core.request import Sequence
from pagedkv.core.table import SequenceTable
from pagedkv.sim.content import first_tokens, lane_tokens, stream_lanes, stream_tokens
from pagedkv.sim.cost import CostModel, leap_work, step_work

__all__ = ["CostExecutor"]


class CostExecutor:
    """A device that is a formula and a clock.

    A request's generated tokens are its output stream: `SamplingParams.seed` names it. Eviction
    policies that want attention are shown a **synthetic score process**, declared as such in every
    result: each block's share of attention is drawn by its id from a heavy-tailed law (Pareto,
    shape 1), and the first and the newest blocks get more. No model was asked.

    Attributes:
        clock: Seconds of virtual time that have passed.
        last: Seconds that the last step took.
        swapped_tokens: Tokens that moved to host memory or back.
        num_synthetic: Answers it made up for eviction policies.
        on_plan: Is told of every plan, when it begins and how long it takes.
    """

    def __init__(self, cost: CostModel, block_size: int) -> None:
        self.cost = cost
        self.clock = 0.0
        self.last = 0.0
        self.num_synthetic = 0
        self.swapped_tokens = 0
        self.on_plan: Callable[[StepPlan, float, float], None] | None = None
        self._block_size = block_size
        self._streams: UInt64 = np.empty(0, np.uint64)  # of whom the last plan asked
        self._lanes = stream_lanes(self._streams)
        self._seq_ids: Int64 = np.empty(0, np.int64)  # by row, whose answer stands in the row
        self._answers: Int32 = np.empty((0, 0), np.int32)

    def execute(self, plan: StepPlan) -> StepResult:
        """Let the clock run by what the plan costs, and answer it."""
        work = step_work(plan, self._block_size)
        self.last = float(self.cost.seconds(work))
        self.swapped_tokens += int(work.swapped_tokens)
        if self.on_plan is not None:
            self.on_plan(plan, self.clock, self.last)
        self.clock += self.last
        if plan.sampling.seed is not self._streams:  # as long as the same decode it is the same
            self._streams = plan.sampling.seed
            self._lanes = stream_lanes(self._streams)
        tokens = lane_tokens(self._lanes, plan.sampling.position.astype(np.int64))
        return StepResult(token_ids=tokens, observed=self._observed(plan))

    def _observed(self, plan: StepPlan) -> list[Observed]:
        found = []
        for wanted in plan.observations:
            self.num_synthetic += 1
            size = 1 if wanted.unit == "token" else self._block_size
            used = -(-plan.num_resident[:, wanted.members] // size)
            place = np.arange(wanted.width)
            # An entry keeps its draw wherever it stands in the table: a block goes by its id, a
            # token by its slot.
            block, offset = np.divmod(place, self._block_size // size)
            blocks = plan.block_table[:, wanted.members].astype(np.int64)[..., block]
            blocks = blocks * (self._block_size // size) + offset
            uniform = (stream_tokens(blocks, np.zeros(1, np.int64)) + 1.0) / 2.0**30
            share = 1.0 / np.maximum(uniform, 1e-6)
            share[..., 0] += share.max()
            share = share + 4.0 * (place >= used[..., None] - 2)
            share = np.where(place < used[..., None], share, 0.0)
            mass = (share / share.sum(axis=-1, keepdims=True)).astype(np.float32)
            found.append(Observed(values=mass, mass=mass.copy()))
        return found

    # Many steps at once

    def pace(self, step: int) -> Pace:
        """Return how long steps take, from one on."""
        del step
        return self.cost.pace()

    def answers(self, seq: Sequence, first: int, count: int) -> Int32:
        """Return what a sequence draws: [count] tokens, from its draw ``first`` on."""
        return first_tokens(seq.seed, first + count)[first:]

    def leap_seconds(self, leap: Leap) -> Float64:
        """Return how long each step of a leap takes: [steps]."""
        seconds: Float64 = self.cost.seconds(leap_work(leap, self._block_size))
        return seconds

    def leap_tokens(self, table: SequenceTable, leap: Leap, num_steps: int) -> Int32:
        """Return what the rows that draw do in the first steps of a leap: [K, S]."""
        rows, seq_ids = leap.drawing, table.seq_id[leap.drawing]
        if len(self._seq_ids) < table.num_rows:
            self._seq_ids = np.full(table.num_rows, -1, np.int64)
        for row in rows[self._seq_ids[rows] != seq_ids].tolist():
            self._seq_ids[row] = table.seq_id[row]
            self._prepare(row, int(table.sampling["seed"][row]), table)
        first = rows * self._answers.shape[1] + table.num_known[rows] - table.num_prompt[rows]
        tokens: Int32 = self._answers.reshape(-1)[first + np.arange(num_steps)[:, None]]
        return tokens

    def _prepare(self, row: int, stream: int, table: SequenceTable) -> None:
        """Write down all that a row's sequence will generate."""
        length = int(table.limit[row] - table.num_prompt[row])
        if length > self._answers.shape[1]:
            wider = np.zeros((table.num_rows, length), np.int32)
            wider[: len(self._answers), : self._answers.shape[1]] = self._answers
            self._answers = wider
        self._answers[row, :length] = first_tokens(stream, length)

    def land(self, leap: Leap, end: float) -> None:
        """Set the clock to the end of a leap, and count what it moved."""
        self.clock = end
        moved = len(leap.decision.swaps[0]) + len(leap.decision.swaps[1])
        self.swapped_tokens += moved * self._block_size // len(leap.resident)
