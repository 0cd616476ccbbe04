"""``pagedkv trace``: look at workload traces, make them up, convert them."""

import argparse
import sys
from typing import Any

from pagedkv.cli.results import check_writable, write_result
from pagedkv.cli.workloads import add_generator_flags, add_reader_flags, check_kind, generated, read
from pagedkv.sim.generators import GENERATORS
from pagedkv.sim.traces import WRITERS, trace_stats, write_trace

__all__ = ["add_parser", "run"]

_KINDS = [kind for kind in GENERATORS if kind != "sessions"]
_STATS_EXAMPLES = """\
examples:
  pagedkv trace stats conversation_trace.jsonl
  pagedkv trace stats AzureLLMInferenceTrace_conv.csv --format azure --output-json -
"""
_GENERATE_EXAMPLES = """\
examples:
  pagedkv trace generate tool-agent --num-prompts 1000 --output agent.jsonl
  pagedkv trace generate tenants --num-tenants 4 --tenant-skew 1.5 --output tenants.jsonl
"""
_CONVERT_EXAMPLES = """\
examples:
  pagedkv trace convert azure.csv --format azure --to mooncake --output azure.jsonl
  pagedkv trace convert sharegpt.jsonl --format llmservingsim --to timed_trace --output out.jsonl
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser and those of what it does."""
    parser = subparsers.add_parser(
        "trace",
        help="look at, make up or convert workload traces",
        description="Traces of who asked for what, and when. Each explains itself:\n"
        "pagedkv trace stats --help, generate --help, convert --help",
    )
    modes = parser.add_subparsers(dest="mode", metavar="WHAT", required=True)
    _add_stats(modes)
    _add_generate(modes)
    _add_convert(modes)


def _add_stats(modes: Any) -> None:
    stats = modes.add_parser(
        "stats",
        usage="pagedkv trace stats FILE [flags]",
        help="rates, lengths and reuse",
        description="Read a trace once and print what is in it: rates, lengths, and how much of\n"
        "the prompts an unbounded prefix cache would hold.",
        epilog=_STATS_EXAMPLES,
    )
    stats.add_argument("file", metavar="FILE", help="the trace")
    add_reader_flags(stats)
    _add_common(stats)
    stats.add_argument("--num-prompts", type=int, metavar="N", help="read so many requests at most")
    stats.add_argument("--output-json", metavar="FILE", help="write it there; - is standard output")


def _add_generate(modes: Any) -> None:
    generate = modes.add_parser(
        "generate",
        usage="pagedkv trace generate KIND --output FILE [flags]",
        help="make a workload up and write it",
        description="Make up a workload and write it as a trace. Equal flags give equal files.",
        epilog=_GENERATE_EXAMPLES,
    )
    generate.add_argument(
        "kind",
        metavar="KIND",
        choices=_KINDS,
        help=f"{', '.join(_KINDS)}; sessions, whose times depend on answers, cannot be written",
    )
    add_generator_flags(generate)
    _add_common(generate)
    _add_output(generate)


def _add_convert(modes: Any) -> None:
    convert = modes.add_parser(
        "convert",
        usage="pagedkv trace convert FILE --to FORMAT --output FILE [flags]",
        help="write a trace in another format",
        description="Read a trace in one format and write it in another. What prompts share is\n"
        "kept where the new format can say it.",
        epilog=_CONVERT_EXAMPLES,
    )
    convert.add_argument("file", metavar="FILE", help="the trace")
    add_reader_flags(convert)
    _add_common(convert)
    convert.add_argument("--num-prompts", type=int, metavar="N", help="write so many at most")
    _add_output(convert)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per block [default: the trace's own]"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", choices=list(WRITERS), default="mooncake", help="the format to write"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="where to write it; - is standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Print statistics, or write a trace."""
    check_kind(args, [args.kind if args.mode == "generate" else args.format])
    if args.mode == "stats":
        check_writable(args.output_json)
        found = trace_stats(
            read(args, args.file).head(args.num_prompts), block_size=args.block_size
        )
        write_result(found, args.output_json)
        if args.output_json != "-":
            _show(found)
        return 0
    check_writable(args.output)
    source = generated(args, args.kind) if args.mode == "generate" else read(args, args.file)
    source = source.head(args.num_prompts)
    written = write_trace(source, args.output, args.to, block_size=args.block_size)
    out = sys.stderr if args.output == "-" else sys.stdout
    print(f"{written.num_requests} requests written to {args.output}", file=out)
    for reason, times in source.skipped.items():
        print(f"{times} rows skipped: {reason}", file=out)
    for what, times in written.lost.items():
        requests = "1 request" if times == 1 else f"{times} requests"
        print(f"{args.to} cannot hold {what}: lost of {requests}", file=sys.stderr)
    return 0


def _show(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if isinstance(value, dict):
            text = "  ".join(f"{key} {_text(each)}" for key, each in value.items()) or "none"
        else:
            text = _text(value)
        print(f"{name.replace('_', ' '):24} {text}")


def _text(value: Any) -> str:
    if value is None:  # nothing was measured
        return "-"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
