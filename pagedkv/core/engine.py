"""The loop that serves: schedule, execute, commit."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np

from pagedkv.core.plan import Executor, StepOutput, StepPlan, StepResult
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import InvalidTransition
from pagedkv.interrupts import Uninterrupted

__all__ = ["Engine", "Observer"]

Observer = Callable[[StepPlan, StepResult, StepOutput], None]
"""Is told of every step after it was committed."""


class Engine:
    """A scheduler and an executor, run in step.

    The executor is whatever carries out plans: the torch executor serves, a cost model simulates.

    Args:
        observers: Called after each step with its plan, result and output.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, observers: tuple[Observer, ...] = ()
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.observers = list(observers)

    def step(self) -> tuple[StepPlan, StepResult, StepOutput]:
        """Make, carry out and commit one plan.

        If the executor raises, or its result is refused, the plan is discarded and the error goes
        on: nothing is lost, and the next step computes again. An error of an observer goes on as
        well; the step is taken then, and those after it are not told. Ctrl-C interrupts the
        executor at once, and the scheduler when it has decided or taken in the step: in the middle
        of either, what it holds would not fit together.
        """
        plan: StepPlan | None = None
        try:
            with Uninterrupted():
                plan = self.scheduler.schedule()
            result = self.executor.execute(plan) if plan.num_tokens else EMPTY_RESULT
            with Uninterrupted():
                output = self.scheduler.commit(plan, result)
        except BaseException:
            if plan is not None:
                with suppress(InvalidTransition):  # interrupted when it was taken in already
                    self.scheduler.discard(plan)
            raise
        for observer in self.observers:
            observer(plan, result, output)
        return plan, result, output

    def run(self) -> Iterator[tuple[StepPlan, StepResult, StepOutput]]:
        """Step until no request is left; requests may be added between steps."""
        while self.scheduler.has_unfinished():
            yield self.step()


EMPTY_RESULT = StepResult(token_ids=np.empty(0, np.int32))
