"""Small workloads and configurations for the simulator's tests."""

from pagedkv import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagedkv.sim.content import text
from pagedkv.sim.workload import SimRequest, Workload


def config(num_blocks=200, block_size=4, *, reclaim="lru", eviction="full", **scheduler):
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 64} | scheduler
    return EngineConfig(
        model=ModelConfig(max_model_len=2**20),
        cache=CacheConfig(
            block_size=block_size, num_blocks=num_blocks, reclaim=reclaim, eviction=eviction
        ),
        scheduler=SchedulerConfig(**scheduler),
    )


def request(arrival, inputs, outputs, key, **fields):
    return SimRequest(
        arrival=arrival,
        prompt=text(2 * key + 1, inputs),
        output_len=outputs,
        output_stream=2 * key + 2,
        **fields,
    )


def listed(*requests, closed_loop=False):
    return Workload("listed", lambda: requests, closed_loop=closed_loop)
