"""What a simulated engine leaves behind when all is served: plain data, wherever it ran."""

from collections import Counter

import numpy as np
from msgspec import Struct

from pagedkv.core.stats import SchedulerStats
from pagedkv.sim.accounts import Accounts
from pagedkv.sim.detail import Detail
from pagedkv.sim.recorder import Phase
from pagedkv.sim.simulator import Replica
from pagedkv.sim.sketch import Distribution, Series

__all__ = ["Served"]


class Served(Struct, frozen=True, kw_only=True, eq=False):
    """One replica's share of a result.

    Attributes:
        stats: What its scheduler counted.
        latency: Distributions by name of `recorder.LATENCIES`, in seconds.
        occupancy: Series of its pool.
        accounts: Of its tenants.
        ends: Requests that ended, by reason.
        refused: Requests that it did not take, by reason.
        num_unsent: Follow-ups that were not sent.
        num_good: Requests that kept the bounds.
        last_end: When its last request ended.
    """

    stats: SchedulerStats
    latency: dict[str, Distribution]
    occupancy: Series
    accounts: Accounts
    ends: Counter[str]
    refused: Counter[str]
    num_unsent: int
    input_tokens: int
    output_tokens: int
    num_good: int
    last_end: float
    most_in_flight: int
    most_tokens_per_second: int
    num_leaps: int
    swapped_tokens: int
    num_synthetic: int
    phases: list[Phase]
    num_unwatched: int
    detail: Detail | None

    @classmethod
    def by(cls, replica: Replica) -> "Served":
        """Return what a replica has served so far."""
        recorder, executor = replica.recorder, replica.executor
        return cls(
            stats=replica.scheduler.stats(),
            latency=recorder.latency,
            occupancy=recorder.occupancy.series,
            accounts=recorder.tenants.accounts,
            ends=recorder.num_ended,
            refused=recorder.refused,
            num_unsent=recorder.num_unsent,
            input_tokens=recorder.input_tokens,
            output_tokens=recorder.output_tokens,
            num_good=recorder.num_good,
            last_end=recorder.last_end,
            most_in_flight=recorder.most_in_flight,
            most_tokens_per_second=recorder.occupancy.most_tokens_per_second,
            num_leaps=replica.num_leaps,
            swapped_tokens=executor.swapped_tokens,
            num_synthetic=executor.num_synthetic,
            phases=recorder.phases,
            num_unwatched=recorder.num_unwatched,
            detail=recorder.detail,
        )

    def idle_until(self, end: float) -> None:
        """Let time go on until the last replica has ended: what is there is cached blocks."""
        held = {"cached": float(self.stats.blocks_cached)}
        self.occupancy.close(end, np.array([held.get(name, 0.0) for name in self.occupancy.names]))
