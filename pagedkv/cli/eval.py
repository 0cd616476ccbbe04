"""``pagedkv eval``: what eviction policies cost in quality, beside the full cache."""

import argparse
from typing import Any

from pagedkv.cli.flags import add_engine_flags

__all__ = ["TASKS", "add_parser", "run"]

TASKS = {
    "perplexity": "how well every token of a text is predicted",
    "copy": "how well a passage is predicted that was read long before",
    "passkey": "whether a key hidden in a long text is found again",
    "agreement": "how often the next token is the full cache's",
}

_ALL = """
Policies, budgets and granularities are swept: give each as a list by comma. Every combination
reads exactly the same tokens as the full cache did, and is compared with it token by token; the
interval in the table is a 95 % bootstrap of that paired difference. `full` keeps everything,
whatever the budgets, and is measured even if it is not in the list.

Tokens run in chunks of --chunk, with a round of eviction after each. 16, one block, is what
generation does; larger chunks are faster, and forget later. KV is the most that a sequence held
while a step ran, the chunk in flight included.
"""
_DESCRIPTIONS = {
    "perplexity": """\
Read a text and report the perplexity of its tokens: exp of the mean negative log-probability.
Most of a book is predicted from the last few sentences, so this says little about what a policy
remembers of long ago: see `pagedkv eval copy`.
""",
    "copy": """\
Read filler, a source passage, more filler, then the source again, and report the perplexity of
the repeat. With the full cache a model copies; a policy that forgot the source cannot. The source
is in the middle because scores that add up favour the oldest tokens.
""",
    "passkey": """\
Hide a number in a long text, at several depths, and ask for it at the end. Right is an answer
whose every token is the likeliest one in its place, which is what greedy generation would write.
The question is not known while the text is read, so policies that judge by attention must guess.
""",
    "agreement": """\
Let the full cache continue a text greedily, then read text and continuation under each policy and
report how often the likeliest next token is still the one that the full cache chose.
""",
}
_EXAMPLES = {
    "perplexity": """\
  pagedkv eval perplexity --num-tokens 2048 --eviction full,streaming,h2o,peak --budget 256,512
  pagedkv eval perplexity --text moby_dick.txt --granularity sequence,layer --plot quality.png
  pagedkv eval perplexity --model tiny-random --num-tokens 300 --budget 64
""",
    "copy": """\
  pagedkv eval copy --eviction streaming,peak --budget 320,640 --granularity layer
  pagedkv eval copy --eviction "sinks=4 + recent=0.125 + score=lift" --budget 640
  pagedkv eval copy --model tiny-random --source-len 32 --filler-len 48 --budget 64
""",
    "passkey": """\
  pagedkv eval passkey --num-tokens 1024 --depths 0.1,0.5,0.9 --eviction streaming,peak
  pagedkv eval passkey --text moby_dick.txt --num-samples 5 --plot passkey.png
  pagedkv eval passkey --model tiny-random --num-tokens 300 --budget 64
""",
    "agreement": """\
  pagedkv eval agreement --num-tokens 1024 --output-len 128 --eviction streaming,h2o,peak
  pagedkv eval agreement --text moby_dick.txt --budget 128,256,512 --plot agreement.png
  pagedkv eval agreement --model tiny-random --num-tokens 200 --budget 64
""",
}
_SWEPT = ("eviction", "granularity", "seed")


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser and those of its tasks."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what eviction costs in quality",
        description="Measure what eviction policies cost in quality, beside the full cache. Each "
        "task explains itself:\npagedkv eval perplexity --help",
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, text in TASKS.items():
        task = tasks.add_parser(
            name,
            usage=f"pagedkv eval {name} [flags]",
            help=text,
            description=_DESCRIPTIONS[name] + _ALL,
            epilog="examples:\n" + _EXAMPLES[name],
        )
        _add_sweep_flags(task)
        _add_text_flags(task, name)
        _add_run_flags(task)
        add_engine_flags(task, skip=_SWEPT)


def _names(text: str) -> list[str]:
    return [name for name in (piece.strip() for piece in text.split(",")) if name]


def _numbers(text: str) -> list[int]:
    try:
        return [int(piece) for piece in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers by comma") from None


def _fractions(text: str) -> list[float]:
    try:
        return [float(piece) for piece in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers by comma") from None


def _add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sweep", "Lists by comma; every combination is measured.")
    group.add_argument(
        "--eviction",
        type=_names,
        default=["full", "streaming", "h2o", "peak"],
        metavar="LIST",
        help="presets or expressions [default: full,streaming,h2o,peak]",
    )
    group.add_argument(
        "--budget",
        type=_numbers,
        default=[256],
        metavar="LIST",
        help="tokens that may stay, in each table; replaces a policy's own [default: 256]",
    )
    group.add_argument(
        "--granularity",
        type=_names,
        default=["sequence"],
        metavar="LIST",
        help="who decides apart: sequence, layer, head [default: sequence]",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=16,
        metavar="N",
        help="tokens between two rounds of eviction [default: %(default)s]",
    )


def _add_text_flags(parser: argparse.ArgumentParser, task: str) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        metavar="FILE",
        help="what to read: a UTF-8 file, .gz or not [default: two chapters of Moby-Dick]",
    )

    def count(flag: str, default: int | None, text: str) -> None:
        shown = text if default is None else f"{text} [default: %(default)s]"
        group.add_argument(flag, type=int, default=default, metavar="N", help=shown)

    if task == "copy":
        count("--source-len", 256, "tokens of the passage that is repeated")
        count("--filler-len", 384, "tokens before it, and between it and its repeat")
    elif task == "agreement":
        count("--num-tokens", 1024, "tokens of text before the continuation")
        count("--output-len", 128, "tokens of the full cache's continuation")
    else:
        count("--num-tokens", 1024, "tokens to read")
    if task == "passkey":
        group.add_argument(
            "--depths",
            type=_fractions,
            default=[0.1, 0.3, 0.5, 0.7, 0.9],
            metavar="LIST",
            help="where the key is hidden, 0 the beginning [default: 0.1,0.3,0.5,0.7,0.9]",
        )
    count("--num-samples", 1, "places of the text to begin at")
    count("--offset", None, "begin at this token of the text instead of where the seed says")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of places in the text, keys and the bootstrap [default: %(default)s]",
    )
    group.add_argument(
        "--output-json", metavar="FILE", help="write the result there; - is standard output"
    )
    group.add_argument("--plot", metavar="FILE", help="draw quality against KV bytes, as PNG")


def run(args: argparse.Namespace) -> int:
    """Measure the whole sweep."""
    from pagedkv.cli import sweep

    return sweep.run(args)
