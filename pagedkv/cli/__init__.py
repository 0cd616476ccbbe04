"""The command line: one module per verb, each torch-free until it runs.

A verb's module has ``add_parser(subparsers) -> None`` and ``run(args) -> int``.
"""

import argparse
import codecs
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from pagedkv import __version__
from pagedkv.config import check_environment
from pagedkv.errors import PagedKVError, PolicyError, closest

__all__ = ["main"]

VERBS = ("demo", "generate", "bench", "eval", "simulate", "trace", "models", "config", "env")

# Which extra brings a package.
_EXTRAS = {
    "torch": "torch",
    "xformers": "torch",
    "numba": "cpu",
    "llvmlite": "cpu",
    "transformers": "models",
    "tokenizers": "models",
    "safetensors": "models",
    "tqdm": "models",
    "gguf": "gguf",
    "accelerate": "gguf",
    "matplotlib": "plot",
    "rich": "progress",
}

_EPILOG = """\
start here:
  pagedkv demo                                      a guided tour on a small model
  pagedkv generate --model tiny-random "Hello"      no download, random words
  pagedkv generate --chat "Name three rivers."      a real model, downloaded once

`pagedkv VERB --help` explains a verb and gives examples.
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps descriptions as written and lines within 100 columns."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=34, width=width)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose unknown flags come with the nearest known."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(**options, allow_abbrev=False)
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and exit with 2."""
        self.exit(2, f"pagedkv: error: {message} (see `{self.prog} --help`)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but refuse what is unknown here, where the nearest flag can be named."""
        found, extra = super().parse_known_args(args, namespace)
        if extra and extra[0].startswith("-"):
            near = closest(extra[0], list(self._option_string_actions))
            hint = f"; did you mean {near}?" if near else ""
            self.error(f"there is no flag {extra[0]}{hint}")
        if extra:
            self.error(f"{extra[0]!r} is one argument too many; give flags first, then the rest")
        return found, extra


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pagedkv",
        description="Serve, measure and inspect language models with a paged KV cache.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"pagedkv {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb in VERBS:
        _module(verb).add_parser(subparsers)
    return parser


def _module(verb: str) -> Any:
    return import_module(f"pagedkv.cli.{verb}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of the process if omitted.

    Returns:
        The exit code: 0; 1 if some requests failed; 2 for a mistake in what was asked; 130 when
        interrupted.
    """
    with _mended_streams():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    args = None
    try:
        args = _parsed(argv)
        check_environment()
        code: int = 0 if args.verb is None else _module(args.verb).run(args)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # what was asked for is help, or was told to be wrong
        if lost := _lost_output():
            print(f"pagedkv: error: standard output: cannot be written: {lost}", file=sys.stderr)
            return 2
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("\npagedkv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read it has enough
        return 141
    except (PagedKVError, ModuleNotFoundError, OSError) as fault:
        if (text := _message(fault)) is None or hasattr(args, "debug"):
            raise
        print(f"pagedkv: error: {text}", file=sys.stderr)
        return 2


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
    return args


@contextmanager
def _mended_streams() -> Iterator[None]:
    """Put streams that lead nowhere in the place of those that whoever started us has closed, and
    write what standard output's encoding lacks as JSON would escape it.
    """
    with ExitStack() as stack:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, stack.enter_context(Path(os.devnull).open(mode)))
                stack.callback(setattr, sys, name, None)
        if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
            codecs.register_error("pagedkv.escape", _escape)
            sys.stdout.reconfigure(errors="pagedkv.escape")
        yield


def _escape(fault: UnicodeError) -> tuple[str, int]:
    assert isinstance(fault, UnicodeEncodeError)
    text = fault.object[fault.start : fault.end]
    return json.dumps(text)[1:-1], fault.end


def _drop_output() -> None:
    """Keep Python from complaining at exit about what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lost_output() -> str | None:
    """Why standard output takes no more; None if it does."""
    try:
        sys.stdout.flush()
    except OSError as fault:
        _drop_output()
        return fault.strerror or str(fault)
    return None


def _message(fault: Exception) -> str | None:
    """What to tell the user, or None if the fault is ours."""
    lost = _lost_output()
    if isinstance(fault, OSError):
        if fault.errno == errno.ENOSPC and fault.filename is None:  # what has no buffer to flush
            lost = fault.strerror
        return f"standard output: cannot be written: {lost}" if lost else None
    if isinstance(fault, PolicyError):
        return str(fault)  # may go on for two lines that point at the place
    if not isinstance(fault, ModuleNotFoundError):
        return " ".join(str(fault).split())
    package = (fault.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return f"this needs {package}; install it with: pip install 'pagedkv[{_EXTRAS[package]}]'"
