"""``pagedkv bench``: how fast the engine serves, offline."""

import argparse
from typing import Any

from pagedkv.cli.flags import add_engine_flags, add_sampling_flags

__all__ = ["DATASETS", "add_parser", "run"]

DATASETS = ("random", "prefix_repetition", "custom")

# Sampling flags that a benchmark sets itself.
_FIXED = ("seed", "max_tokens", "stop", "stop_token_ids", "ignore_eos")

_THROUGHPUT = """\
Hand the engine all requests at once and measure how fast it serves them. Every request generates
exactly its output length: end-of-sequence tokens are ignored. Flags and JSON keys are vLLM's.
"""
_THROUGHPUT_EXAMPLES = """\
examples:
  pagedkv bench throughput --num-prompts 32 --input-len 256 --output-len 128
  pagedkv bench throughput --random-range-ratio 0.8 --output-json ragged.json
  pagedkv bench throughput --dataset-name prefix_repetition --prefix-len 512 --num-prefixes 4
  pagedkv bench throughput --num-blocks 200 --eviction streaming --num-prompts 32
  pagedkv bench throughput --model tiny-random --num-prompts 8 --num-blocks 40

The last one is short of blocks on purpose: look at its preemptions.
"""
_LATENCY = """\
Serve one batch again and again and measure how long it takes from the first prompt in to the last
token out. Cached prefixes are forgotten between runs. Flags and JSON keys are vLLM's.
"""
_LATENCY_EXAMPLES = """\
examples:
  pagedkv bench latency --batch-size 1 --input-len 32 --output-len 32
  pagedkv bench latency --batch-size 8 --num-iters 20 --output-json latency.json
  pagedkv bench latency --model tiny-random --num-iters 5
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser and those of its two measurements."""
    parser = subparsers.add_parser(
        "bench",
        help="measure throughput or latency",
        description="Measure the engine on this machine. Each measurement explains itself:\n"
        "pagedkv bench throughput --help, pagedkv bench latency --help",
    )
    modes = parser.add_subparsers(dest="mode", metavar="MEASUREMENT", required=True)
    throughput = modes.add_parser(
        "throughput",
        usage="pagedkv bench throughput [flags]",
        help="tokens per second over many requests",
        description=_THROUGHPUT,
        epilog=_THROUGHPUT_EXAMPLES,
    )
    _add_dataset_flags(throughput)
    latency = modes.add_parser(
        "latency",
        usage="pagedkv bench latency [flags]",
        help="seconds that one batch takes",
        description=_LATENCY,
        epilog=_LATENCY_EXAMPLES,
    )
    _add_batch_flags(latency)
    for mode in (throughput, latency):
        group = mode.add_argument_group("run")
        group.add_argument(
            "--seed", type=int, default=0, metavar="N", help=_help("of lengths, tokens and draws")
        )
        group.add_argument(
            "--output-json", metavar="FILE", help="write the result there; - is standard output"
        )
        add_sampling_flags(mode, skip=_FIXED, temperature=0.0)
        add_engine_flags(mode, skip=("seed",))


def _help(text: str) -> str:
    return f"{text} [default: %(default)s]"


def _count(group: Any, flags: tuple[str, ...], default: int | None, text: str) -> None:
    shown = text if default is None else _help(text)
    group.add_argument(*flags, type=int, default=default, metavar="N", help=shown)


def _add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--dataset-name",
        choices=DATASETS,
        help="random token ids, prompts that share prefixes, or a file [default: random; custom "
        "with --dataset-path]",
    )
    group.add_argument(
        "--dataset-path", metavar="FILE", help="prompts, one a line: text, or JSON with prompt"
    )
    _count(group, ("--num-prompts",), 64, "requests to serve")
    _count(group, ("--input-len", "--random-input-len"), 128, "tokens of a random prompt")
    _count(group, ("--output-len", "--random-output-len"), 128, "tokens to generate for each")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help=_help("random lengths vary by this fraction, up and down"),
    )
    _count(
        group,
        ("--prefix-len", "--prefix-repetition-prefix-len"),
        None,
        "tokens that prompts share [default: 0; 256 for prefix_repetition]",
    )
    _count(group, ("--suffix-len", "--prefix-repetition-suffix-len"), 256, "tokens they do not")
    _count(group, ("--num-prefixes", "--prefix-repetition-num-prefixes"), 10, "different prefixes")
    _count(group, ("--num-warmups",), 1, "requests to serve before the clock starts")


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batch")
    _count(group, ("--batch-size",), 8, "requests in the batch")
    _count(group, ("--input-len",), 32, "tokens of each prompt")
    _count(group, ("--output-len",), 128, "tokens to generate for each")
    _count(group, ("--num-iters-warmup",), 1, "runs before the clock starts")
    _count(group, ("--num-iters",), 10, "runs to measure")


def run(args: argparse.Namespace) -> int:
    """Measure; 1 if a request failed."""
    from pagedkv.cli import measure

    return measure.run(args)
