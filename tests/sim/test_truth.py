"""Against the world: the vLLM paper's arithmetic, a real vLLM run, published replay curves.

Whole traces are read where the variable PAGEDKV_TRACES names their folder.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

import pagedkv
from pagedkv import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagedkv.sim.generators import Lengths, random_requests
from pagedkv.sim.readers import read_trace
from pagedkv.sim.replay import replay

DATA = Path(__file__).parent / "data"
TRACES = os.environ.get("PAGEDKV_TRACES")


def test_the_vllm_papers_pool_of_983_blocks():
    """OPT-13B on an A100-40GB (SOSP'23): what Orca's reservations make of the same slots."""
    slots = 12 * 2**30 // (800 * 1024)  # 12 GiB of cache at 800 KiB a token
    assert slots == 15_728 == 983 * 16
    reserved = 15_728 // 2048  # Orca (Max) reserves the model's length for each
    assert reserved == 7
    assert 1 - reserved * 2048 / 15_728 == pytest.approx(0.0885, abs=5e-5)


def test_a_full_pool_wastes_under_four_percent_and_batches_what_the_paper_batched():
    """ShareGPT's lengths, far more than the pool takes: who runs, and how full are the blocks?"""
    setup = EngineConfig(
        model=ModelConfig(max_model_len=2048),
        cache=CacheConfig(num_blocks=983, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=256),
    )
    asked = random_requests(
        num_prompts=250,
        rate=20.0,
        input_len=Lengths(161.31, "lognormal", 0.8, most=1024),
        output_len=Lengths(337.99, "lognormal", 0.8, most=1000),
    )
    found = pagedkv.simulate(setup, asked)
    assert found.summary["completed"] == 250
    assert found.summary["internal_fragmentation"] < 0.04
    assert found.summary["mean_running"] > 4 * 7


def test_a_real_vllm_run_under_memory_pressure():
    """vLLM 0.19, Llama-3.1-8B, RTX 4090, 300 requests: memory, makespan, TTFT, preemptions."""
    setup = EngineConfig(
        model=ModelConfig(max_model_len=32768),
        cache=CacheConfig(num_blocks=2588),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048),
    )
    asked = read_trace(DATA / "rtx4090_requests.jsonl", "timed_trace", block_size=16)
    found = pagedkv.simulate(setup, asked, cost="rtx4090-llama3-8b")
    with (DATA / "rtx4090_times.csv").open() as text:
        real = np.array([[float(v) for v in row.values()] for row in csv.DictReader(text)])
    with (DATA / "rtx4090_kv.csv").open() as text:
        kv = np.array([[float(v) for v in row.values()] for row in csv.DictReader(text)])
    occupancy = found.occupancy.table()
    held = np.interp(kv[:, 0], occupancy["time"], np.array(occupancy["held"]) / 25.88)
    assert found.summary["completed"] == 300
    assert np.abs(held - kv[:, 1]).mean() < 5
    assert found.summary["duration"] == pytest.approx(real[:, 2].max(), rel=0.05)
    median = float(np.median(real[:, 1] - real[:, 0])) * 1000
    assert found.summary["median_ttft_ms"] == pytest.approx(median, rel=0.1)
    assert 100 < found.summary["num_preemptions"] < 400, "LLMServingSim counts 194"


if TRACES is not None:
    CURVES = {
        "lru": (0.0543, 0.0865, 0.1387, 0.2111, 0.2908),
        "fifo": (0.0530, 0.0818, 0.1274, 0.1826, 0.2611),
        "lfu": (0.0600, 0.0863, 0.0984, 0.1328, 0.2107),
    }
    BOUND = (0.2577, 0.3266, 0.3601, 0.3736)
    CAPACITIES = (1953, 3906, 5859, 9765, 19531)

    def conversation():
        return read_trace(Path(TRACES) / "mooncake/conversation_trace.jsonl", "mooncake")

    @pytest.mark.slow
    @pytest.mark.parametrize("order", CURVES)
    def test_the_replayed_conversation_trace(order):
        for capacity, want in zip(CAPACITIES, CURVES[order], strict=True):
            assert replay(conversation(), capacity, order).token_hit_ratio == pytest.approx(
                want, abs=0.002
            )

    @pytest.mark.slow
    def test_the_conversation_traces_bounds():
        assert replay(conversation(), None).token_hit_ratio == pytest.approx(0.3736, abs=1e-4)
        for capacity, want in zip(CAPACITIES, BOUND, strict=False):
            found = replay(conversation(), capacity, "clairvoyant").token_hit_ratio
            assert found >= want - 5e-5, "the table has four digits"
