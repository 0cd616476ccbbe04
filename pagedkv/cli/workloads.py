"""The flags that say what is simulated, and the workload they make."""

import argparse
from collections.abc import Iterable
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sim.generators import GENERATORS, Lengths, random_requests, sessions, tenants
from pagedkv.sim.generators import tool_agent as make_tool_agent
from pagedkv.sim.readers import READERS, read_trace
from pagedkv.sim.workload import Workload

__all__ = [
    "add_generator_flags",
    "add_reader_flags",
    "check_flags",
    "check_kind",
    "generated",
    "read",
    "workload",
]

_LAWS = ("fixed", "uniform", "lognormal", "zipf")
_NUMBERS = (
    ("--request-rate", 4.0, "arrivals per second, of conversations for sessions; inf is all"),
    ("--burstiness", 1.0, "shape of the Gamma gaps: 1 is Poisson, inf a steady beat"),
    ("--input-len", 512.0, "mean tokens of a prompt, without what is shared"),
    ("--output-len", 128.0, "mean tokens of an answer"),
    ("--input-spread", 0.5, "how far lengths spread, by the law"),
    ("--output-spread", 0.5, "the same of answers"),
    ("--tenant-skew", 1.0, "tenant k asks (k+1)^-X as often"),
    ("--turns", 4.18, "mean turns of a conversation"),
    ("--think-time", 60.0, "mean seconds before a user's next turn"),
)
# What says nothing about a trace, and what says nothing without one, with their defaults.
_MADE_UP = {flag: default for flag, default, _ in _NUMBERS} | {
    "--length-law": "lognormal",
    "--prefix-len": None,
    "--num-prefixes": 1,
    "--num-tenants": 8,
}
_OF_TRACES = {
    "--speedup": 1.0,
    "--format": "mooncake",
    "--on-error": "raise",
    "--hash-block-size": None,
    "--session-rate": 1.0,
    "--open-loop": False,
    "--trace-start": 0.0,
    "--trace-duration": 3600.0,
}
# What only some kinds of workload, or some formats, have a use for; what all have is not here.
_LENGTHS = ("--input-len", "--output-len", "--input-spread", "--output-spread", "--length-law")
_USERS = dict.fromkeys((*_LENGTHS, "--prefix-len"), ("random", "sessions", "tenants")) | {
    "--num-prefixes": ("random",),
    "--turns": ("sessions",),
    "--think-time": ("sessions",),
    "--num-tenants": ("tenants",),
    "--tenant-skew": ("tenants",),
    "--hash-block-size": ("mooncake", "timed_trace", "bailian"),
    "--session-rate": ("weka",),
    "--open-loop": ("weka",),
    "--trace-start": ("servegen",),
    "--trace-duration": ("servegen",),
}


def _help(text: str) -> str:
    return f"{text} [default: %(default)s]"


def add_reader_flags(group: Any) -> None:
    """Add the flags of reading a trace file."""
    group.add_argument(
        "--format", choices=list(READERS), default="mooncake", help=_help("what the trace is")
    )
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help=_help("stop at a bad row, or leave it out and count it"),
    )
    group.add_argument(
        "--hash-block-size",
        type=int,
        metavar="N",
        help="tokens per hash id, for mooncake, timed_trace and bailian [default: the format's]",
    )
    group.add_argument(
        "--session-rate",
        type=float,
        default=1.0,
        metavar="X",
        help=_help("weka sessions per second"),
    )
    group.add_argument(
        "--open-loop",
        action="store_true",
        help="weka: requests come when the trace says, not a think time after the answer",
    )
    group.add_argument(
        "--trace-start", type=float, default=0.0, metavar="S", help=_help("servegen: from here")
    )
    group.add_argument(
        "--trace-duration", type=float, default=3600.0, metavar="S", help=_help("and for so long")
    )


def add_generator_flags(group: Any) -> None:
    """Add the flags of making a workload up; words are vLLM's where it has them."""
    group.add_argument("--num-prompts", type=int, metavar="N", help="requests at most")
    for flag, default, text in _NUMBERS:
        group.add_argument(flag, type=float, default=default, metavar="X", help=_help(text))
    group.add_argument("--length-law", choices=_LAWS, default="lognormal", help=_help("of lengths"))
    group.add_argument(
        "--prefix-len", type=int, metavar="N", help="tokens of a system prompt [default: 256; 0]"
    )
    group.add_argument(
        "--num-prefixes", type=int, default=1, metavar="N", help=_help("different ones, for random")
    )
    group.add_argument("--num-tenants", type=int, default=8, metavar="N", help=_help("tenants"))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would say nothing.

    Raises:
        ConfigError: A trace is given together with what makes a workload up, or the other way; or
            what is given is for other kinds of workload, or formats, than those asked for.
    """
    given = _set(args, _OF_TRACES if args.trace is None else _MADE_UP)
    if given:
        where, remedy = "without --trace", "leave it out, or name a trace"
        if args.trace is not None:
            where, remedy = "with --trace", "leave it out; --speedup makes a trace faster"
        raise ConfigError(f"{', '.join(given)} says nothing", where=where, remedy=remedy)
    asked = args.workload if args.trace is None else args.format
    check_kind(args, [asked] if isinstance(asked, str) else asked)  # several in a sweep


def check_kind(args: argparse.Namespace, kinds: Iterable[str]) -> None:
    """Refuse flags that no kind of workload, or format of a trace, among these has a use for.

    Raises:
        ConfigError: There is such a flag.
    """
    for flag in _set(args, {flag: (_MADE_UP | _OF_TRACES)[flag] for flag in _USERS}):
        if not {*_USERS[flag]} & {*kinds}:
            raise ConfigError(
                f"{flag} says nothing about {', '.join(kinds)}",
                where=flag,
                remedy=f"leave it out: it is for {', '.join(_USERS[flag])}",
            )


def _set(args: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    """Return the flags that do not have their defaults; a command need not have them all."""
    names = {flag: flag[2:].replace("-", "_") for flag in defaults}
    return [
        flag
        for flag, name in names.items()
        if getattr(args, name, defaults[flag]) != defaults[flag]
    ]


def workload(args: argparse.Namespace) -> Workload:
    """Return what ``--trace`` or ``--workload`` stands for.

    Raises:
        ConfigError, TraceError: A flag or a file is wrong.
    """
    if args.trace is None:
        return generated(args, args.workload)
    return read(args, args.trace).head(args.num_prompts).faster(args.speedup)


def read(args: argparse.Namespace, path: str) -> Workload:
    """Return the workload of a trace file."""
    options: dict[str, Any] = {}
    if args.hash_block_size is not None:
        options["block_size"] = args.hash_block_size
    if args.format == "weka":
        options |= {"session_rate": args.session_rate, "closed_loop": not args.open_loop}
        options["seed"] = args.seed
    if args.format == "servegen":
        options |= {"start": args.trace_start, "duration": args.trace_duration, "seed": args.seed}
    return read_trace(path, args.format, on_error=args.on_error, **options)


def generated(args: argparse.Namespace, kind: str) -> Workload:
    """Return a made-up workload of one of the kinds in `GENERATORS`."""
    assert kind in GENERATORS
    common: dict[str, Any] = {
        "num_prompts": 1000 if args.num_prompts is None else args.num_prompts,
        "rate": args.request_rate,
        "burstiness": args.burstiness,
        "seed": args.seed,
    }
    if kind == "tool-agent":
        return make_tool_agent(**common)
    common["input_len"] = Lengths(args.input_len, args.length_law, args.input_spread)
    common["output_len"] = Lengths(args.output_len, args.length_law, args.output_spread)
    if args.prefix_len is not None:
        common["prefix_len"] = args.prefix_len
    if kind == "tenants":
        return tenants(num_tenants=args.num_tenants, skew=args.tenant_skew, **common)
    if kind == "sessions":
        return sessions(turns=args.turns, think=args.think_time, **common)
    return random_requests(num_prefixes=args.num_prefixes, **common)
