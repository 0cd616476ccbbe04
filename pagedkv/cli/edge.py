"""Where a promise is just kept: the highest rate, the fewest blocks."""

import argparse
from typing import Any, NamedTuple

from pagedkv.cli.scenario import config_of, cost_of, simulated
from pagedkv.errors import ConfigError
from pagedkv.sim.result import blocks_that_fit
from pagedkv.sim.search import BLOCKS_WITHIN, RATE_WITHIN, highest_rate, least_blocks
from pagedkv.sim.slo import objective

__all__ = ["Edge", "check_search", "edge"]


class Edge(NamedTuple):
    """What a search found: the flag's value at the edge, how near it is, and how to say it."""

    flag: str
    value: float
    within: float
    text: str


def check_search(args: argparse.Namespace) -> None:
    """Refuse a search for nothing.

    Raises:
        ConfigError: No latency is bounded, or the share is none.
    """
    if not objective(args.goodput).bounds:
        raise ConfigError("nothing is bounded", where="--find", remedy="give --goodput ttft:1000")
    if not 0 < args.good_share <= 1:
        raise ConfigError(
            f"{args.good_share:g}", where="--good-share", remedy="give a share above 0, at most 1"
        )


def edge(args: argparse.Namespace) -> Edge:
    """Search what ``--find`` names, by simulating some 15 times.

    Raises:
        Unattainable: There is no edge within the bounds of the search.
    """

    def share(**changed: Any) -> float:
        tried = argparse.Namespace(**(vars(args) | changed | {"perfetto": None}))
        good: float = simulated(tried)[0].summary["good_fraction"]
        return good

    head = f"{args.good_share:.0%} of requests are good"
    if args.find == "capacity":
        flag = "speedup" if args.trace else "request_rate"
        rate = highest_rate(lambda rate: share(**{flag: rate}), args.good_share)
        unit = "conversations/s" if args.workload == "sessions" else "requests/s"
        unit = "times the trace's arrivals" if args.trace else unit
        text = f"{head} up to {rate:.3g} {unit} (within {RATE_WITHIN:.0%})"
        return Edge(flag, rate, RATE_WITHIN, text)
    flag = "cache.num_blocks"
    most = blocks_that_fit(config_of(args), cost_of(args))
    blocks = least_blocks(lambda blocks: share(**{flag: blocks}), args.good_share, most)
    text = f"{head} from {blocks} blocks on (within {BLOCKS_WITHIN:.0%})"
    return Edge(flag, blocks, BLOCKS_WITHIN, text)
