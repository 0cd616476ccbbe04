"""What a simulation found, with vLLM's serving keys, and how it is asked for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.config import EngineConfig
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import ConfigError
from pagedkv.sim.cluster import Cluster
from pagedkv.sim.cost import CostModel
from pagedkv.sim.presets import cost_preset
from pagedkv.sim.processes import in_processes, most_processes
from pagedkv.sim.recorder import LATENCIES, Phase
from pagedkv.sim.served import Served
from pagedkv.sim.simulator import Replica
from pagedkv.sim.sketch import Distribution, Series
from pagedkv.sim.slo import Objective
from pagedkv.sim.workload import Workload

__all__ = ["DEFAULT_HARDWARE", "PERCENTILES", "SimResult", "blocks_that_fit", "simulate"]

DEFAULT_HARDWARE = "a100-llama3-8b"
PERCENTILES = (25.0, 75.0, 90.0, 95.0, 99.0)
_GAUGES = (
    "num_running",
    "num_waiting",
    "blocks_held",
    "blocks_cached",
    "blocks_free",
    "host_blocks_held",
)


class SimResult(Struct, frozen=True, kw_only=True, eq=False):
    """What came of a workload.

    Attributes:
        summary: Counts, rates and latencies in milliseconds, under vLLM's serving keys where it
            has the word.
        latency: The distributions behind it, in seconds.
        occupancy: Blocks held and cached, sequences running and waiting, empty slots in held
            blocks and tokens per step, over all of the run, idle time included; several replicas
            summed.
        tenants: Per tenant, what it asked for, got and cost others.
        phases: Stretches of requests' lives per replica, if they were watched.
        num_unwatched: How many more there were, per replica.
    """

    summary: dict[str, Any]
    latency: dict[str, Distribution]
    occupancy: Series
    tenants: dict[str, dict[str, Any]]
    phases: list[list[Phase]] = []
    num_unwatched: list[int] = []

    def to_json(self) -> dict[str, Any]:
        """Return the summary, tenants and occupancy as plain data."""
        return {
            **self.summary,
            "tenants": self.tenants,
            "occupancy": self.occupancy.table(),
        }


def simulate(
    config: EngineConfig | None,
    workload: Workload,
    *,
    cost: CostModel | str = DEFAULT_HARDWARE,
    slo: Objective | None = None,
    replicas: int = 1,
    routing: str = "round_robin",
    max_concurrency: int | None = None,
    leap: bool = True,
    watch: bool = False,
    detail: bool = False,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
    prepare: Callable[[Scheduler], None] | None = None,
) -> SimResult:
    """Serve a workload with the real scheduler under a virtual clock.

    Args:
        config: As for an engine. Without a number of blocks, a replica has as many as fit beside
            the weights of the cost model's hardware.
        cost: What steps take: a model of it, or a name of `presets.COSTS`.
        slo: What counts as good.
        replicas: Engines side by side, each with a pool of its own.
        routing: How requests are dealt to them: a name of `cluster.ROUTES`.
        max_concurrency: Users that wait for an answer before they ask again.
        leap: Take quiet steps as one; changes how long it takes, and nothing else.
        watch: Keep the phases of requests for a trace viewer.
        detail: Add vLLM's arrays of every served request's times to the summary, in seconds.
        processes: The most that may share the replicas' work, if no replica depends on another:
            in turns, without follow-ups, limits or phases to keep. Changes nothing but the time.
        progress: Is told how many requests have ended in this process.
        prepare: Is given each replica's scheduler before it starts.

    Raises:
        ConfigError: A value is out of range or unknown.
        TraceError: The workload cannot be read.
    """
    config = config or EngineConfig()
    model = (cost_preset(cost) if isinstance(cost, str) else cost).storing(config.cache)
    config = _with_blocks(config, model)
    apart = routing == "round_robin" and not workload.closed_loop and max_concurrency is None
    if not apart or watch or detail or prepare is not None:
        processes = 1
    shares = max(1, min(most_processes(processes), replicas))

    def serve(number: int) -> tuple[list[Served], float]:
        count = len(range(number, replicas, shares))
        engines = [
            Replica(config, model, slo=slo, leap=leap, watch=watch, detail=detail)
            for _ in range(count)
        ]
        if prepare is not None:
            for engine in engines:
                prepare(engine.scheduler)
        cluster = Cluster(engines, route=routing, max_concurrency=max_concurrency)
        mine = workload if shares == 1 else workload.dealt(number, shares, replicas)
        cluster.run(mine, None if number else progress)
        return [Served.by(engine) for engine in engines], cluster.began

    found = in_processes(serve, shares)
    served = [found[i % shares][0][i // shares] for i in range(replicas)]
    return _gather(served, found[0][1], workload, config, slo or Objective())


def _with_blocks(config: EngineConfig, model: CostModel) -> EngineConfig:
    """Return a configuration that says how many blocks there are: as many as fit, if it did not."""
    if config.cache.num_blocks is not None:
        return config
    return _sized(config, blocks_that_fit(config, model))


def _sized(config: EngineConfig, blocks: int) -> EngineConfig:
    cache = msgspec.structs.replace(
        config.cache,
        num_blocks=blocks,
        kv_cache_memory_bytes=None,
        kv_cache_memory_fraction=None,
    )
    return msgspec.structs.replace(config, cache=cache)


def blocks_that_fit(config: EngineConfig, model: CostModel) -> int:
    """Return how many blocks a device holds: of as many bytes as the cache may have, if that is
    given, or beside the weights. Where layers or heads have tables of their own, a block is as
    much smaller as there are more of them; stored narrow, as much smaller as that makes it.

    Raises:
        ConfigError: The weights alone do not fit, or the bytes hold no block.
    """
    cache = config.cache
    model = model.storing(cache)
    groups = Scheduler(_sized(config, 1)).layout.num_groups
    if cache.kv_cache_memory_bytes is None:
        fraction = cache.kv_cache_memory_fraction
        return groups * model.num_blocks(cache.block_size, fraction=fraction)
    size = model.shape.kv_bytes_per_token / model.tensor_parallel * cache.block_size / groups
    if (blocks := int(cache.kv_cache_memory_bytes // size)) < 1:
        raise ConfigError(
            f"{cache.kv_cache_memory_bytes} bytes hold no block of {size:.0f}",
            where="cache.kv_cache_memory_bytes",
            remedy="give more",
        )
    return blocks


def _gather(
    served: list[Served], began: float, workload: Workload, config: EngineConfig, slo: Objective
) -> SimResult:
    latency = {name: _merged([each.latency[name] for each in served]) for name in LATENCIES}
    occupancy, accounts = served[0].occupancy, served[0].accounts
    for each in served:
        each.idle_until(max(other.last_end for other in served))
    for each in served[1:]:
        occupancy.merge(each.occupancy)
        accounts.merge(each.accounts)
    summary = _summary(served, began, latency, slo)
    summary |= _pool(served, occupancy, config)
    summary |= accounts.fairness()
    summary["skipped_rows"] = dict(workload.skipped)
    # Whether any policy may have judged by attention that no model computed.
    summary["synthetic_scores"] = any(each.num_synthetic for each in served)
    details = [each.detail for each in served if each.detail is not None]
    if details:
        for detail in details[1:]:
            details[0].merge(detail)
        summary |= details[0].table()
    return SimResult(
        summary=summary,
        latency=latency,
        occupancy=occupancy,
        tenants=accounts.table(summary["duration"]),
        phases=[each.phases for each in served],
        num_unwatched=[each.num_unwatched for each in served],
    )


def _merged(parts: list[Distribution]) -> Distribution:
    whole = Distribution()
    for part in parts:
        whole.merge(part)
    return whole


def _summary(
    served: list[Served], began: float, latency: dict[str, Distribution], slo: Objective
) -> dict[str, Any]:
    duration = max(max(each.last_end for each in served) - began, 1e-9)
    ends: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for each in served:
        ends.update(each.ends)
        refused.update(each.refused)
    completed = ends["length"] + ends["stop"]
    unsent = sum(each.num_unsent for each in served)
    failed = ends["error"] + refused.total() + unsent
    good = sum(each.num_good for each in served)
    inputs = sum(each.input_tokens for each in served)
    outputs = sum(each.output_tokens for each in served)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": completed,
        "failed": failed,
        "refused": dict(refused),
        "unsent_follow_ups": unsent,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": completed / duration,
        "request_goodput": good / duration if slo.bounds else None,
        "good_fraction": good / max(1, completed + failed),
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_concurrent_requests": sum(each.most_in_flight for each in served),
        "max_output_tokens_per_s": sum(each.most_tokens_per_second for each in served),
    }
    for name in LATENCIES:
        found |= latency[name].summary(f"{name}_ms", PERCENTILES, 1000.0)
    return found


def _pool(served: list[Served], occupancy: Series, config: EngineConfig) -> dict[str, Any]:
    """Return what the schedulers counted, and how full their pools were."""
    stats = [msgspec.structs.asdict(each.stats) for each in served]
    totals = {name: sum(s[name] for s in stats) for name in stats[0] if name not in _GAUGES}
    blocks = (config.cache.num_blocks or 1) * len(stats)
    means, peaks = occupancy.means, occupancy.peaks
    held_slots = max(means["held"] * config.cache.block_size, 1e-9)
    swapped = totals["num_swapped_out"]
    return {
        **totals,
        "rungs": {
            "reclaimed": totals["blocks_reclaimed"],
            "shrunk": totals["blocks_shrunk"],
            "swapped": swapped,
            "recomputed": totals["num_preemptions"] - swapped,
            "failed": totals["num_failed"],
        },
        "swapped_tokens": sum(each.swapped_tokens for each in served),
        "num_leaps": sum(each.num_leaps for each in served),
        "prefix_cache_hit_rate": totals["prompt_tokens_cached"] / max(1, totals["prompt_tokens"]),
        "num_blocks": blocks,
        "mean_kv_cache_usage": means["held"] / blocks,
        "peak_kv_cache_usage": min(1.0, peaks["held"] / blocks),
        "mean_running": means["running"],
        "mean_waiting": means["waiting"],
        "internal_fragmentation": means["wasted_slots"] / held_slots,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and 95 % confidence half-width over seeds (Student's t)."""
    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return {"mean": float(found.mean()), "ci95": float("nan")}
    error = float(found.std(ddof=1)) / np.sqrt(len(found))
    return {"mean": float(found.mean()), "ci95": float(_student(len(found) - 1) * error)}


def _student(freedom: int) -> float:
    """Return the 97.5 % point of Student's t: exact table to 10, then an expansion to 1e-3."""
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
