"""Small workloads and configurations for the simulator's tests."""

import numpy as np

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


def quoting(seed, rate, block_size, num_tenants=1, count=60):
    """Return requests whose prompts go on from few shared texts, some from others' whole prompts
    and answers, and some of which are asked twice.
    """
    rng = np.random.default_rng(seed)
    asks, now = [], 0.0
    for number in range(count):
        now += float(rng.exponential(1 / rate)) if rate < np.inf else 0.0
        own = text(1000 + number, int(rng.integers(1, 30)))
        shared, depth, name = None, int(rng.integers(0, 4)), 1
        for _ in range(depth):
            name = 3 * name + int(rng.integers(0, 3))
            piece = text(name, (name % 3 + 1) * block_size)
            shared = piece if shared is None else shared + piece
        prompt = own if shared is None else shared + own
        if asks and rng.random() < 0.2:
            before = asks[int(rng.integers(0, len(asks)))]
            prompt = before.prompt
            if rng.random() < 0.7:
                prompt = prompt + text(before.output_stream, before.output_len) + own
        asks.append(
            SimRequest(
                arrival=now,
                prompt=prompt,
                output_len=int(rng.integers(1, 40)),
                output_stream=5000 + (number if rng.random() < 0.9 else 0),
                tenant=str(rng.integers(0, num_tenants)) if num_tenants > 1 else "",
            )
        )
    return listed(*asks)
