"""Flags that take several values by comma, and the runs they stand for."""

import argparse
import itertools
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from typing import Any

from pagedkv.errors import closest

__all__ = ["Sweep", "expand", "let_sweep"]


class Sweep(tuple[Any, ...]):
    """The values that one flag was given, in order."""


class _Choices(list[Any]):
    """Choices that hold any sweep: its values were looked at one by one."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Sweep) or super().__contains__(value)


def let_sweep(parser: argparse.ArgumentParser, *, but: Collection[str]) -> None:
    """Let every flag that takes one value take several by comma.

    Args:
        but: Destinations of flags that are left alone: their values may hold commas.
    """
    for action in parser._actions:
        if type(action) is not argparse._StoreAction or action.nargs is not None:
            continue
        if action.dest in but:
            continue
        action.type = _several(action.type, action.choices)
        if action.choices is not None:
            action.choices = _Choices(action.choices)


def _several(kind: Any, choices: Iterable[Any] | None) -> Callable[[str], Any]:
    parse: Callable[[str], Any] = kind or str
    known = None if choices is None else [*choices]

    def parse_all(text: str) -> Any:
        if "," not in text:
            return parse(text)
        values = Sweep(parse(part.strip()) for part in text.split(","))
        for value in values:
            if known is not None and value not in known:
                near = closest(str(value), list(map(str, known)))
                hint = f"; did you mean {near}?" if near else ""
                raise argparse.ArgumentTypeError(
                    f"invalid choice: {value!r}{hint} (choose from {', '.join(map(repr, known))})"
                )
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise argparse.ArgumentTypeError(f"{twice[0]} is given twice")
        return values

    # argparse names the type in its message when it raises ValueError.
    parse_all.__name__ = getattr(parse, "__name__", "value")
    return parse_all


def expand(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], argparse.Namespace]]:
    """Yield every combination of swept flags: what was varied, and the flags of that run."""
    swept: dict[str, Container[Any]] = {k: v for k, v in vars(args).items() if isinstance(v, Sweep)}
    for values in itertools.product(*swept.values()):  # type: ignore[call-overload]
        point = dict(zip(swept, values, strict=True))
        yield point, argparse.Namespace(**(vars(args) | point))
