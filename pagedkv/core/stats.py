"""How a scheduler is doing, in counts."""

from msgspec import Struct
from msgspec.structs import asdict

from pagedkv.core.pool import BlockPool

__all__ = ["SchedulerStats", "Totals"]


class Totals(Struct, kw_only=True):
    """What has happened since a scheduler was made; the words are `SchedulerStats`'."""

    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    blocks_shrunk: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    num_failed: int = 0
    num_rungs: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    recomputed_tokens: int = 0
    resumed_tokens: int = 0
    resumed_tokens_cached: int = 0
    tokens_moved: int = 0


class SchedulerStats(Struct, frozen=True, kw_only=True):
    """Counts: gauges of now, then totals since the scheduler was made.

    Each rung of the pressure ladder has its count: `blocks_reclaimed`, `blocks_shrunk`,
    `num_swapped_out`, `num_preemptions` less those (recomputed), `num_failed`.

    Attributes:
        host_blocks_held: Blocks of host memory that swapped sequences hold.
        num_preemptions: Sequences pushed back to waiting, swapped or not.
        blocks_reclaimed: Cached blocks reused for something else.
        blocks_shrunk: Blocks that elastic sequences had to forget because others lacked them.
        num_swapped_out, num_swapped_in: Sequences moved to host memory, and back.
        num_rungs: How often anything dearer than reclaiming was done, the two priorities apart.
        num_failed: Sequences ended because all of the pool, or of a quota, was not enough.
        prompt_tokens: Prompt tokens of admitted sequences, cached ones included.
        prompt_tokens_cached: Those that the prefix cache spared at the first admission.
        recomputed_tokens: Tokens computed again because their sequence had been preempted.
        resumed_tokens: Known tokens of sequences admitted again after a preemption.
        resumed_tokens_cached: Those that the prefix cache spared; never part of its hits above.
        tokens_moved: Tokens copied to other slots by compaction, counted once per group.
    """

    num_running: int
    num_waiting: int
    blocks_held: int
    blocks_cached: int
    blocks_free: int
    host_blocks_held: int
    num_steps: int
    num_finished: int
    num_preemptions: int
    blocks_reclaimed: int
    blocks_shrunk: int
    num_swapped_out: int
    num_swapped_in: int
    num_failed: int
    num_rungs: int
    prompt_tokens: int
    prompt_tokens_cached: int
    generation_tokens: int
    recomputed_tokens: int
    resumed_tokens: int
    resumed_tokens_cached: int
    tokens_moved: int

    @classmethod
    def of(cls, pool: BlockPool, totals: Totals, **gauges: int) -> "SchedulerStats":
        """Count a pool now; the gauges of anything else are given."""
        return cls(
            **gauges,
            blocks_held=pool.num_held,
            blocks_cached=pool.num_cached,
            blocks_free=pool.num_available - pool.num_cached,
            blocks_reclaimed=pool.num_reclaimed,
            **asdict(totals),
        )

    @property
    def kv_cache_usage(self) -> float:
        """The fraction of the pool that sequences hold."""
        return self.blocks_held / (self.blocks_held + self.blocks_cached + self.blocks_free)
