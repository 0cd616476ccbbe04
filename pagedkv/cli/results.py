"""What a benchmark measured, as plain data with vLLM's keys, and the files it goes to."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from pagedkv.cli.machine import machine, versions
from pagedkv.config import EngineConfig
from pagedkv.core.stats import SchedulerStats
from pagedkv.files import check_outputs, check_writable, replacing

__all__ = [
    "SCHEMA_VERSION",
    "check_outputs",
    "check_writable",
    "latency_result",
    "provenance",
    "throughput_result",
    "totals_between",
    "write_result",
]

SCHEMA_VERSION = 1
_PERCENTAGES = (10, 25, 50, 75, 90, 99)
_GAUGES = ("num_running", "num_waiting", "blocks_held", "blocks_cached", "blocks_free")


def totals_between(before: SchedulerStats, after: SchedulerStats) -> dict[str, int]:
    """Return what a scheduler counted between two looks at it."""
    first, last = msgspec.structs.asdict(before), msgspec.structs.asdict(after)
    return {name: last[name] - first[name] for name in last if name not in _GAUGES}


def throughput_result(
    elapsed: float, lengths: Sequence[tuple[int, int]], totals: Mapping[str, int]
) -> dict[str, Any]:
    """Return the rates of a run.

    Args:
        elapsed: Seconds from the first prompt in to the last text out.
        lengths: Per sequence, its prompt's tokens (0 beyond a request's first) and its output's.
        totals: What `totals_between` gave.
    """
    inputs, outputs = sum(pair[0] for pair in lengths), sum(pair[1] for pair in lengths)
    requests = sum(pair[0] > 0 for pair in lengths)
    prompt_tokens = totals["prompt_tokens"]
    return {
        "elapsed_time": elapsed,
        "num_requests": requests,
        "total_num_tokens": inputs + outputs,
        "requests_per_second": requests / elapsed,
        "tokens_per_second": (inputs + outputs) / elapsed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "output_tokens_per_second": outputs / elapsed,
        "prefix_cache_hit_rate": totals["prompt_tokens_cached"] / max(1, prompt_tokens),
        **totals,
    }


def latency_result(latencies: Sequence[float]) -> dict[str, Any]:
    """Return mean, spread and percentiles of the seconds that each run of a batch took."""
    seconds = np.asarray(latencies, np.float64)
    percentiles = np.percentile(seconds, _PERCENTAGES).tolist()
    return {
        "avg_latency": float(seconds.mean()),
        "std_latency": float(seconds.std()),
        "latencies": seconds.tolist(),
        "percentiles": dict(zip(map(str, _PERCENTAGES), percentiles, strict=True)),
    }


def provenance(
    model: str, dtype: str, config: EngineConfig, seed: int, workload: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is needed to run a benchmark again and to judge its numbers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "dtype": dtype,
        "seed": seed,
        "workload": dict(workload),
        "config": msgspec.to_builtins(config),
        "versions": versions(),
        "machine": machine(),
    }


def write_result(result: Any, path: str | None) -> None:
    """Write a result as JSON to a file, to standard output for ``-``, or nowhere.

    Raises:
        ConfigError: It cannot be written; what was there is as it was.
    """
    if path is None:
        return
    with replacing(path) as out:
        out.write(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
