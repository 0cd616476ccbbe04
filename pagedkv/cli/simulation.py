"""The runs behind ``pagedkv simulate``: one, many, or a search."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from pagedkv.cli.grid import expand
from pagedkv.cli.results import SCHEMA_VERSION, check_outputs, write_result
from pagedkv.cli.scenario import Run, one_run, rehearse, settled
from pagedkv.cli.turns import InTurn
from pagedkv.cli.workers import answers
from pagedkv.cli.workloads import check_flags
from pagedkv.errors import ConfigError, Unattainable
from pagedkv.sim.report import write_report
from pagedkv.sim.result import spread

__all__ = ["run"]

_MOST_REASONS = 10  # that are told in a line; the JSON has all

Point = tuple[dict[str, Any], argparse.Namespace]


def run(args: argparse.Namespace) -> int:
    """Do what the flags say and show it; 1 if a request failed, or a search found nothing."""
    check_outputs(
        {"--output-json": args.output_json, "--html": args.html, "--perfetto": args.perfetto},
        (args.trace, args.cost_json, args.config),
    )
    if args.calibrate:
        from pagedkv.cli.calibrate import calibrate

        return calibrate(args)
    points = _points(args)
    out = sys.stderr if args.output_json == "-" else sys.stdout
    if args.find:
        runs = _edges(points, out)
        bad = len(runs) < len(points)
    else:
        runs = _all_runs(points, args.jobs, out)
        bad = any(each["summary"]["failed"] for each in runs)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "runs": [_slim(each) for each in runs],
    }
    if any("seed" in each["varied"] for each in runs):
        document["over_seeds"] = over_seeds = _over_seeds(runs)
        for group in over_seeds:
            print(_interval(group), file=out)
    write_result(document, args.output_json)
    if args.html and runs:
        write_report(runs, Path(args.html))
    return int(bad)


def _points(args: argparse.Namespace) -> list[Point]:
    """Return the runs that the flags ask for, all of them seen to be possible."""
    check_flags(args)
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"{args.jobs} processes", where="--jobs", remedy="give 1 or more")
    points = [(varied, settled(each)) for varied, each in expand(args)]
    if args.perfetto and len(points) > 1:
        raise ConfigError(
            f"{len(points)} runs", where="--perfetto", remedy="trace a single run, without commas"
        )
    for point in points:
        rehearse(*point)
    return points


def _slim(run: Run) -> Run:
    return {name: value for name, value in run.items() if name != "cdf"}


def _edges(points: list[Point], out: TextIO) -> list[Run]:
    """Search each point's edge and say it; return the runs there, of those that have one."""
    from pagedkv.cli.edge import check_search, edge

    for _, args in points:
        check_search(args)
    runs: list[Run] = []
    for varied, args in points:
        label = " ".join(f"{name}={value}" for name, value in varied.items())
        label += ": " if label else ""
        try:
            found = edge(args)
        except Unattainable as fault:
            if len(points) == 1:
                raise
            print(f"{label}{fault}", file=out)
            continue
        print(f"{label}{found.text}", file=out)
        there = argparse.Namespace(**(vars(args) | {found.flag: found.value}))
        run = one_run(varied | {found.flag: found.value}, there)
        runs.append(run | {"found": {"find": args.find, "within": found.within}})
    return runs


def _all_runs(points: list[Point], jobs: int | None, out: TextIO) -> list[Run]:
    """Do the runs and print a line for each, in their order; those that are done when the rest is
    interrupted as well.
    """
    most = jobs or os.cpu_count() or 1
    if len(points) == 1:
        run = one_run(*points[0], processes=most)
        print(_line(run), file=out)
        return [run]
    from rich.console import Console
    from rich.progress import Progress

    def show(_: int, run: Run) -> None:
        if out.isatty() and not hidden:  # above the bar
            bar.console.print(_line(run), highlight=False, markup=False, soft_wrap=True)
        else:
            print(_line(run), file=out, flush=True)

    def done(number: int, run: Run) -> None:
        bar.advance(task)
        turns.add(number, run)

    turns, hidden = InTurn(show), not sys.stderr.isatty()
    with Progress(
        console=Console(stderr=True), disable=hidden, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task("simulating", total=len(points))
        try:
            return answers(one_run, points, most, done)
        except BaseException:
            turns.show_rest()
            raise


def _line(run: Run) -> str:
    varied = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in run["varied"].items())
    summary = run["summary"]
    parts = [
        f"{summary['completed']} served in {summary['duration']:,.1f} s",
        f"{summary['request_throughput']:.2f} req/s",
        f"TTFT p50 {_ms(summary['median_ttft_ms'])} p99 {_ms(summary['p99_ttft_ms'])} ms",
        f"TPOT p50 {_ms(summary['median_tpot_ms'], 1)} ms",
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


def _ms(value: float | None, digits: int = 0) -> str:
    """Return milliseconds as text: a dash if nothing was measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _reasons(summary: dict[str, Any]) -> str:
    """Return why requests failed, and how many for each reason."""
    unsent = summary["unsent_follow_ups"]
    outgrew = summary["failed"] - unsent - sum(summary["refused"].values())
    counts = summary["refused"] | {"outgrew the pool": outgrew, "follow-ups not sent": unsent}
    told = [f"{count} {why}" for why, count in counts.items() if count]
    rest = (
        [f"and for {len(told) - _MOST_REASONS} more reasons"] if len(told) > _MOST_REASONS else []
    )
    return ", ".join(told[:_MOST_REASONS] + rest)


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
                name: spread([float(value) for value in values if value is not None])
                for name, values in _columns(members).items()
            },
        }
        for label, members in groups.items()
    ]


def _columns(runs: list[Run]) -> dict[str, list[float | None]]:
    """Return the numbers of runs by name, None where one has none; those that any of them has."""
    names = {
        name: None
        for run in runs
        for name, value in run["summary"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {name: [run["summary"][name] for run in runs] for name in names}


def _interval(group: dict[str, Any]) -> str:
    texts = [f"{group['num_seeds']} seeds:"]
    for name in ("median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "request_throughput"):
        found = group["summary"].get(name)
        if found is None:
            texts.append(f"{name} - ")
        else:
            texts.append(f"{name} {found['mean']:,.2f} ± {found['ci95']:,.2f} ")
    return f"{group['varied'] + ': ' if group['varied'] else ''}{' '.join(texts)}".rstrip()
