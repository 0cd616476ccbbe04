"""Files that are written whole or not at all."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from pagedkv.errors import ConfigError

__all__ = ["check_outputs", "check_writable", "replacing"]

_REMEDY = "name a file in a directory with room that may be written to"


def check_writable(path: str | Path | None) -> None:
    """Find out before a long run that nothing could be written there; leaves all as it is.

    Raises:
        ConfigError: It cannot, and why.
    """
    if path is None:
        return
    if str(path) == "-":
        _stdout()
        return
    with _told(path):
        if Path(path).is_dir():
            raise IsADirectoryError("it is a directory")
        if not _is_special(Path(path)):
            beside = _beside(Path(path))
            beside.touch()
            beside.unlink()


def check_outputs(
    outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None] = ()
) -> None:
    """Find out before a long run that something could not be written, or would not last.

    Args:
        outputs: By flag, what will be written; None if the flag was not given.
        inputs: What is read, and is no result to be written over.

    Raises:
        ConfigError: One cannot be written, or is named twice.
    """
    taken = {_place(path): "read as well" for path in inputs if path is not None}
    for flag, path in outputs.items():
        check_writable(path)
        if path is None or str(path) == "-" or _is_special(Path(path)):
            continue
        if how := taken.get(_place(path)):
            raise ConfigError(f"{path} is {how}", where=flag, remedy="give each a file of its own")
        taken[_place(path)] = f"what {flag} writes as well"


def _place(path: str | Path) -> Path:
    return Path(path).resolve()


@contextmanager
def replacing(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a file beside ``path`` that takes its place if nothing goes wrong; a fault leaves what
    was there. ``-`` is standard output, and what is no regular file is written to as it is.

    Raises:
        ConfigError: It cannot be written, and why.
    """
    if str(path) == "-":
        with _told("standard output"):
            out = _stdout()
            yield out.buffer if binary else out
            out.flush()
        return
    with _told(path):
        if _is_special(Path(path)):  # a device or a pipe: nothing to lose, nor to replace
            with _opened(Path(path), binary=binary) as file:
                yield file
            return
        beside = _beside(Path(path))
        try:
            with _opened(beside, binary=binary) as file:
                yield file
            place = Path(path).resolve()  # of a link, what it leads to
            if place.exists():
                shutil.copymode(place, beside)
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)


def _opened(path: Path, *, binary: bool) -> IO[Any]:
    return path.open("wb") if binary else path.open("w", encoding="utf-8", newline="")


def _stdout() -> TextIO:
    # Whoever started this process has closed it; the command line puts what leads nowhere there.
    if sys.stdout is None or getattr(sys.stdout, "name", "") == os.devnull:
        raise ConfigError("it is closed", where="standard output", remedy=_REMEDY)
    return sys.stdout


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Say of an error of the system which file it is about."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads has enough, which is no mistake
    except OSError as fault:
        reason = fault.strerror or fault
        raise ConfigError(f"cannot be written: {reason}", where=str(path), remedy=_REMEDY) from None


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _beside(path: Path) -> Path:
    place = path.resolve()
    return place.with_name(f".{place.name}.{os.getpid()}.part")
