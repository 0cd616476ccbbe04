"""The runs behind ``pagedkv simulate``: one, many, or a search."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.cli.flags import given
from pagedkv.cli.grid import expand
from pagedkv.cli.results import SCHEMA_VERSION, check_writable, write_result
from pagedkv.cli.workloads import workload
from pagedkv.config import EngineConfig, load_config, with_fields
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import ConfigError, Unattainable
from pagedkv.sim.cost import CostModel
from pagedkv.sim.presets import cost_preset
from pagedkv.sim.replay import CLAIRVOYANT, Oracle
from pagedkv.sim.report import cdf_table, write_perfetto, write_report
from pagedkv.sim.result import SimResult, simulate, spread
from pagedkv.sim.search import highest_rate, least_blocks
from pagedkv.sim.slo import objective

__all__ = ["run"]

Run = dict[str, Any]
Point = tuple[dict[str, Any], argparse.Namespace]


def run(args: argparse.Namespace) -> int:
    """Do what the flags say and show it; 1 if a request failed."""
    for path in (args.output_json, args.html, args.perfetto):
        check_writable(path)
    if args.calibrate:
        from pagedkv.cli.calibrate import calibrate

        return calibrate(args)
    if args.find:
        return _find(args)
    points = list(expand(args))
    if args.perfetto and len(points) > 1:
        raise ConfigError(
            f"{len(points)} runs", where="--perfetto", remedy="trace a single run, without commas"
        )
    runs = _all_runs(points, args.jobs)
    out = sys.stderr if args.output_json == "-" else sys.stdout
    for each in runs:
        print(_line(each), file=out)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "runs": [_slim(each) for each in runs],
    }
    if any("seed" in each["varied"] for each in runs):
        document["over_seeds"] = over_seeds = _over_seeds(runs)
        for group in over_seeds:
            print(_interval(group), file=out)
    write_result(document, args.output_json)
    if args.html:
        write_report(runs, Path(args.html))
    return 1 if any(each["summary"]["failed"] for each in runs) else 0


def _slim(run: Run) -> Run:
    return {name: value for name, value in run.items() if name != "cdf"}


# One run


def cost_of(args: argparse.Namespace) -> CostModel:
    """Return the cost model that the flags name.

    Raises:
        ConfigError: The file is not a cost model.
    """
    if args.cost_json is None:
        return cost_preset(args.hardware)
    try:
        return msgspec.json.decode(Path(args.cost_json).read_bytes(), type=CostModel)
    except (OSError, msgspec.DecodeError) as fault:
        raise ConfigError(
            f"it is not a cost model: {fault}",
            where=args.cost_json,
            remedy="write one with `pagedkv simulate --calibrate --cost-json FILE`",
        ) from None


def config_of(args: argparse.Namespace) -> EngineConfig:
    """Return the engine's configuration; a simulated model takes as much text as traces hold."""
    config = load_config(args.config, overrides=given(args))
    if "model.max_model_len" not in given(args):
        config = with_fields(config, max_model_len=2**21)
    order = "lru" if args.reclaim == CLAIRVOYANT else args.reclaim
    return with_fields(config, seed=args.seed, reclaim=order)


def simulated(args: argparse.Namespace, processes: int = 1) -> tuple[SimResult, EngineConfig]:
    """Run one simulation as the flags say."""
    config, source = config_of(args), workload(args)
    prepare: Callable[[Scheduler], None] | None = None
    if args.reclaim == CLAIRVOYANT:
        if args.replicas > 1:
            raise ConfigError(
                "the oracle foresees one queue",
                where="--reclaim clairvoyant",
                remedy="use one replica",
            )
        prepare = Oracle(source, config.cache.block_size).prepare
    found = simulate(
        config,
        source,
        cost=cost_of(args),
        slo=objective(args.goodput),
        replicas=args.replicas,
        routing=args.routing,
        max_concurrency=args.max_concurrency,
        leap=not args.no_leap,
        watch=args.perfetto is not None,
        processes=processes,
        prepare=prepare,
    )
    return found, config


def one_run(varied: dict[str, Any], args: argparse.Namespace, processes: int = 1) -> Run:
    """Simulate once and return plain data, for this process or another."""
    found, config = simulated(args, processes)
    if args.perfetto:
        write_perfetto(found, Path(args.perfetto))
    return {
        "varied": varied,
        "workload": args.trace or args.workload,
        "hardware": args.cost_json or args.hardware,
        "seed": args.seed,
        "config": msgspec.to_builtins(config),
        "summary": found.summary,
        "tenants": found.tenants,
        "occupancy": found.occupancy.table(),
        "cdf": cdf_table(found),
    }


# Many


def _all_runs(
    points: list[tuple[dict[str, Any], argparse.Namespace]], jobs: int | None
) -> list[Run]:
    most = jobs or os.cpu_count() or 1
    if len(points) == 1:
        return [one_run(*points[0], processes=most)]
    from rich.console import Console
    from rich.progress import Progress

    workers = min(len(points), most)
    done: dict[int, Run] = {}
    with (
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
        ProcessPoolExecutor(workers) as pool,
    ):
        task = bar.add_task("simulating", total=len(points))
        futures = {pool.submit(one_run, *point): i for i, point in enumerate(points)}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            bar.advance(task)
    return [done[i] for i in range(len(points))]


def _line(run: Run) -> str:
    varied = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in run["varied"].items())
    summary = run["summary"]
    parts = [
        f"{summary['completed']} served in {summary['duration']:,.1f} s",
        f"{summary['request_throughput']:.2f} req/s",
        f"TTFT p50 {summary['median_ttft_ms']:,.0f} p99 {summary['p99_ttft_ms']:,.0f} ms",
        f"TPOT p50 {summary['median_tpot_ms']:.1f} ms",
        f"hits {summary['prefix_cache_hit_rate']:.1%}",
        f"KV {summary['mean_kv_cache_usage']:.0%}",
        f"{summary['num_preemptions']} preemptions",
    ]
    if summary["request_goodput"] is not None:
        parts.insert(2, f"good {summary['good_fraction']:.1%}")
    if summary["failed"]:
        parts.append(f"{summary['failed']} FAILED ({_reasons(summary)})")
    if skipped := summary["skipped_rows"]:
        parts.append("skipped " + ", ".join(f"{n} ({why})" for why, n in skipped.items()))
    return f"{varied + ': ' if varied else ''}{'  '.join(parts)}"


def _reasons(summary: dict[str, Any]) -> str:
    """Return why requests failed, and how many for each reason."""
    unsent = summary["unsent_follow_ups"]
    outgrew = summary["failed"] - unsent - sum(summary["refused"].values())
    counts = summary["refused"] | {"outgrew the pool": outgrew, "follow-ups not sent": unsent}
    return ", ".join(f"{count} {why}" for why, count in counts.items() if count)


def _over_seeds(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return mean and 95 % half-width over seeds of every number, per combination of the rest."""
    groups: dict[str, list[Run]] = {}
    for each in runs:
        rest = {k: v for k, v in each["varied"].items() if k != "seed"}
        groups.setdefault(" ".join(f"{k}={v}" for k, v in rest.items()), []).append(each)
    return [
        {
            "varied": label,
            "num_seeds": len(members),
            "summary": {
                name: spread([float(each["summary"][name]) for each in members])
                for name, value in members[0]["summary"].items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            },
        }
        for label, members in groups.items()
    ]


def _interval(group: dict[str, Any]) -> str:
    texts = [f"{group['num_seeds']} seeds:"]
    for name in ("median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "request_throughput"):
        found = group["summary"][name]
        texts.append(f"{name} {found['mean']:,.2f} ± {found['ci95']:,.2f} ")
    return f"{group['varied'] + ': ' if group['varied'] else ''}{' '.join(texts)}".rstrip()


# A search


def _find(args: argparse.Namespace) -> int:
    if not objective(args.goodput).bounds:
        raise ConfigError("nothing is bounded", where="--find", remedy="give --goodput ttft:1000")
    if not 0 < args.good_share <= 1:
        raise ConfigError(
            f"{args.good_share:g}", where="--good-share", remedy="give a share above 0, at most 1"
        )
    for point, each in expand(args):
        label = " ".join(f"{name}={value}" for name, value in point.items())
        print(f"{label + ': ' if label else ''}{_found(each)}")
    return 0


def _found(args: argparse.Namespace) -> str:
    def share(**changed: Any) -> float:
        found, _ = simulated(argparse.Namespace(**(vars(args) | changed)))
        good: float = found.summary["good_fraction"]
        return good

    if args.find == "capacity":
        flag = "speedup" if args.trace else "request_rate"
        rate = highest_rate(lambda rate: share(**{flag: rate}), args.good_share)
        unit = "times the trace's arrivals" if args.trace else "requests/s"
        return f"{args.good_share:.0%} of requests are good up to {rate:.3g} {unit}"
    most = cost_of(args).num_blocks(config_of(args).cache.block_size)
    blocks = least_blocks(
        lambda blocks: share(**{"cache.num_blocks": blocks}), args.good_share, most
    )
    if blocks > most:
        raise Unattainable(f"not with {most} blocks", where="--find blocks")
    return f"{args.good_share:.0%} of requests are good from {blocks} blocks on"
