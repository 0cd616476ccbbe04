"""A real run played again: its step times and its tokens, in place of formula and streams."""

from collections.abc import Mapping
from collections.abc import Sequence as Ids
from itertools import count

import numpy as np

from pagedkv.core.arrays import Float64, Int32
from pagedkv.core.foreseen import Pace
from pagedkv.core.leap import Leap
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.core.request import Sequence
from pagedkv.core.table import SequenceTable
from pagedkv.errors import InvalidTransition
from pagedkv.sim.cost import CostModel
from pagedkv.sim.executor import CostExecutor

__all__ = ["Recording"]


class Recording(CostExecutor):
    """Answers plans with what was recorded of a run of a real model.

    Args:
        cost: Of nothing here; the recorded times are taken.
        seconds: How long each step took, in order.
        tokens: The tokens that each request generated, by the seed it was given.
    """

    def __init__(
        self,
        cost: CostModel,
        block_size: int,
        seconds: Ids[float],
        tokens: Mapping[int, Int32],
    ) -> None:
        super().__init__(cost, block_size)
        self._seconds = np.asarray(seconds, np.float64)
        self._tokens = tokens

    def execute(self, plan: StepPlan) -> StepResult:
        """Let the clock run by what the step took, and answer with the tokens it gave.

        Raises:
            InvalidTransition: The plan goes on beyond what was recorded.
        """
        self.last = float(self._times(plan.step, 1)[0])
        if self.on_plan is not None:
            self.on_plan(plan, self.clock, self.last)
        self.clock += self.last
        drawn = zip(plan.sampling.seed.tolist(), plan.sampling.position.tolist(), strict=True)
        tokens = np.array([self._token(seed, at) for seed, at in drawn], np.int32)
        return StepResult(token_ids=tokens, observed=self._observed(plan))

    def _times(self, step: int, count: int) -> Float64:
        found = self._seconds[step : step + count]
        if len(found) < count:
            raise InvalidTransition(
                f"{len(self._seconds)} steps were recorded",
                where=f"step {step + count - 1}",
                remedy="replay the same requests on the same configuration",
            )
        return found

    def _token(self, seed: int, position: int) -> int:
        known = self._tokens.get(seed)
        if known is None or position >= len(known):
            raise InvalidTransition(
                f"no token {position} was recorded of seed {seed}",
                where="recording",
                remedy="replay the same requests on the same configuration",
            )
        return int(known[position])

    def pace(self, step: int) -> Pace:
        """Return how long steps took, from one on, however often and of whatever it is asked."""
        numbers = count(step)
        return lambda *_: float(self._times(next(numbers), 1)[0])

    def answers(self, seq: Sequence, first: int, count: int) -> Int32:
        """Return what a sequence drew."""
        drawn = [self._token(seq.seed, at) for at in range(first, first + count)]
        return np.array(drawn, np.int32)

    def leap_seconds(self, leap: Leap) -> Float64:
        """Return how long the steps took: [steps]."""
        return self._times(leap.decision.step, leap.steps)

    def leap_tokens(self, table: SequenceTable, leap: Leap, num_steps: int) -> Int32:
        """Return what rows drew in the coming steps: [K, S]."""
        rows = leap.drawing
        position = (table.num_known[rows] - table.num_prompt[rows]).tolist()
        seeds = table.sampling["seed"][rows].tolist()
        drawn = [
            [self._token(seed, at + i) for i in range(num_steps)]
            for seed, at in zip(seeds, position, strict=True)
        ]
        return np.array(drawn, np.int32).reshape(len(rows), num_steps).T
