"""A device that only answers: tokens from seeds, made-up masses, no memory of blocks."""

import msgspec
import numpy as np

from pagedkv import Scheduler, StepResult
from pagedkv.core.plan import Observed
from pagedkv.errors import NeverFits


def answer(plan, vocab=61):
    """The same plan always gets the same answer."""
    seed, position = plan.sampling.seed.astype(np.int64), plan.sampling.position.astype(np.int64)
    groups = len(plan.block_table)
    noise = np.random.default_rng(plan.step)
    observed = [
        Observed(
            values=noise.random((groups, len(each.members), each.width), np.float32),
            mass=noise.random((groups, len(each.members), each.width), np.float32),
        )
        for each in plan.observations
    ]
    tokens = (seed * 7919 + position * 104729) % vocab
    result = StepResult(token_ids=tokens.astype(np.int32), observed=observed)
    wanted = plan.sampling.num_logprobs
    if not (wanted >= 0).any():
        return result
    rank = np.arange(max(0, int(wanted.max())))
    named = rank < wanted[:, None]
    return msgspec.structs.replace(
        result,
        logprobs=-noise.random(len(tokens), np.float32),
        top_ids=np.where(named, (tokens[:, None] + rank) % vocab, -1).astype(np.int32),
        top_logprobs=np.where(named, -1 - rank, np.nan).astype(np.float32),
    )


def step(scheduler):
    """One step; returns its plan and output."""
    plan = scheduler.schedule()
    return plan, scheduler.commit(plan, answer(plan))


class Service:
    """A scheduler, the requests it took, and what became of them."""

    def __init__(self, config, **options):
        self.scheduler = Scheduler(config, **options)
        self.finished = {}
        self.ended_at = {}
        self.refused = []
        self.peak = 0

    def add(self, *requests):
        for request in requests:
            try:
                self.scheduler.add(request)
            except NeverFits:
                self.refused.append(request.request_id)
        return self

    def step(self):
        plan, output = step(self.scheduler)
        self.scheduler.audit()
        self.peak = max(self.peak, len(plan.rows))
        for end in output.finished:
            self.finished[end.request_id, end.index] = end
            self.ended_at[end.request_id] = plan.step
        return plan

    def run(self, max_steps=3000):
        while self.scheduler.has_unfinished():
            assert self.step().step < max_steps, "no progress"
        return self

    @property
    def stats(self):
        return self.scheduler.stats()
