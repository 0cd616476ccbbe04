"""``pagedkv simulate``: many users on hardware that is not here."""

import argparse
from typing import Any

from pagedkv.cli.flags import add_config_flags
from pagedkv.cli.grid import let_sweep
from pagedkv.cli.workloads import add_generator_flags, add_reader_flags
from pagedkv.sim.cluster import ROUTES
from pagedkv.sim.generators import GENERATORS
from pagedkv.sim.presets import COSTS
from pagedkv.sim.replay import ORDERS
from pagedkv.sim.result import DEFAULT_HARDWARE

__all__ = ["add_parser", "run"]

_UNUSED = ("seed", "reclaim")
_DESCRIPTION = """\
Serve a workload under a virtual clock: the engine's own scheduler and block pool decide, a cost
model says how long each step takes. Any flag with one value takes several by comma: every
combination is run, and compared.
"""
_EXAMPLES = """\
examples:
  pagedkv simulate --num-prompts 500 --request-rate 4
  pagedkv simulate --trace conversation_trace.jsonl --num-prompts 2000 --replicas 8
  pagedkv simulate --trace azure.csv --format azure --hardware h100-llama3-8b --html report.html
  pagedkv simulate --workload tenants --num-blocks 2000,4000 --reclaim lru,lfu --html policies.html
  pagedkv simulate --workload sessions --goodput ttft:1000 tpot:50 --find capacity
  pagedkv simulate --workload random --seed 0,1,2,3,4 --output-json five-seeds.json
  pagedkv simulate --calibrate --model smollm2-135m --cost-json this-machine.json

With --find capacity the highest rate that meets the goodput bounds is searched; with
--find blocks, the fewest blocks that do.
"""
_NOT_SWEPT = ("trace", "config", "output_json", "html", "perfetto", "cost_json", "find", "jobs")


def _help(text: str) -> str:
    return f"{text} [default: %(default)s]"


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "simulate",
        usage="pagedkv simulate [flags]",
        help="serve many simulated users under a virtual clock",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    group = parser.add_argument_group("workload")
    group.add_argument("--trace", metavar="FILE", help="replay a trace file")
    group.add_argument(
        "--workload", choices=list(GENERATORS), default="random", help=_help("or make one up")
    )
    group.add_argument(
        "--speedup", type=float, default=1.0, metavar="X", help=_help("of a trace's arrivals")
    )
    add_reader_flags(group)
    add_generator_flags(group)
    _add_machine_flags(parser)
    _add_run_flags(parser)
    add_config_flags(parser, skip=_UNUSED, max_model_len=2**21)
    let_sweep(parser, but=_NOT_SWEPT)


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--hardware", choices=list(COSTS), default=DEFAULT_HARDWARE, help=_help("fitted cost model")
    )
    group.add_argument(
        "--cost-json", metavar="FILE", help="a cost model of your own; --calibrate writes one"
    )
    group.add_argument(
        "--replicas", type=int, default=1, metavar="N", help=_help("engines side by side")
    )
    group.add_argument(
        "--routing",
        choices=list(ROUTES),
        default="round_robin",
        help=_help("of requests to replicas"),
    )
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="users that wait before they ask again"
    )
    group.add_argument(
        "--reclaim",
        choices=ORDERS,
        help="which cached blocks are reused first; clairvoyant knows what will be asked "
        "[default: lru]",
    )


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, metavar="N", help="of what is drawn [default: 0]")
    group.add_argument(
        "--goodput",
        nargs="+",
        action="extend",
        metavar="NAME:MS",
        default=[],
        help="what counts as good: ttft, tpot and e2el in milliseconds",
    )
    group.add_argument(
        "--find",
        choices=("capacity", "blocks"),
        help="search the highest rate, or the fewest blocks, at which --good-share are good",
    )
    group.add_argument(
        "--good-share",
        type=float,
        default=0.9,
        metavar="X",
        help=_help("of requests, for --find"),
    )
    group.add_argument("--no-leap", action="store_true", help="take every step singly; slower")
    group.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes that share a sweep's runs, or one run's replicas [default: cores]",
    )
    group.add_argument(
        "--calibrate", action="store_true", help="fit a cost model to --model on this machine"
    )
    group.add_argument(
        "--model", default="tiny-random", metavar="NAME", help=_help("for --calibrate")
    )
    group.add_argument(
        "--save-detailed",
        action="store_true",
        help="add every request's ttfts, itls and e2els, in seconds, to --output-json",
    )
    group.add_argument("--output-json", metavar="FILE", help="write results; - is standard output")
    group.add_argument("--html", metavar="FILE", help="write a report to read in a browser")
    group.add_argument(
        "--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )


def run(args: argparse.Namespace) -> int:
    """Simulate; 1 if a request failed."""
    from pagedkv.cli import simulation

    return simulation.run(args)
