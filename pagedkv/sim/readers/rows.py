"""Reading a trace line by line: every row that cannot be used is named, or counted."""

import csv
import gzip
import io
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pagedkv.config import LARGEST_INT32
from pagedkv.core.arrays import Int64
from pagedkv.errors import TraceError
from pagedkv.sim.content import Content, stream_ids

__all__ = ["Rows", "block_content"]

LARGEST_LENGTH = 2**24


class Rows:
    """The rows of one trace file, and what becomes of bad ones.

    Args:
        path: The file; ``.gz`` is unpacked as it is read.
        on_error: ``raise`` stops at the first bad row; ``skip`` leaves it out and counts it.
    """

    def __init__(self, path: Path, on_error: str = "raise") -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self.line = 0
        self._skips = on_error == "skip"
        self._before = -math.inf

    def restart(self) -> None:
        """Begin again at the first line."""
        self.skipped.clear()
        self.line = 0
        self._before = -math.inf

    @contextmanager
    def _open(self) -> Iterator[io.TextIOWrapper]:
        try:
            with self.path.open("rb") as raw:
                packed = self.path.suffix == ".gz"
                unpacked: Any = gzip.GzipFile(fileobj=raw) if packed else raw
                yield io.TextIOWrapper(unpacked, encoding="utf-8", newline="")
        except OSError as fault:
            raise TraceError(
                f"cannot be read: {fault.strerror or fault}",
                where=str(self.path),
                remedy="give a readable file",
            ) from None

    def json_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of a JSON-lines file."""
        self.restart()
        with self._open() as text:
            for raw in self._lines(text):
                if not raw.strip():
                    continue
                with self.row():
                    try:
                        found = msgspec.json.decode(raw)
                    except msgspec.DecodeError as fault:
                        raise self.fault(f"not valid JSON: {fault}") from None
                    if not isinstance(found, dict):
                        raise self.fault("the row is not an object")
                    yield found

    def csv_rows(self, *columns: str) -> Iterator[dict[str, str]]:
        """Yield the rows of a CSV file that has at least these columns."""
        self.restart()
        with self._open() as text:
            table = csv.DictReader(self._lines(text))
            header = [name.strip() for name in table.fieldnames or ()]
            missing = [name for name in columns if name not in header]
            if missing:
                raise TraceError(
                    f"the header has no column {', '.join(missing)}",
                    where=f"{self.path}:1",
                    remedy=f"give a table with {', '.join(columns)}",
                )
            table.fieldnames = header
            for row in table:
                with self.row():
                    if None in row or None in row.values():
                        raise self.fault("the row has another number of columns than the header")
                    yield row

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        try:
            for line in text:
                self.line += 1
                yield line
        except (UnicodeDecodeError, OSError, EOFError) as fault:
            self.line += 1
            raise self.fault(f"cannot be read as text: {fault}") from None

    @contextmanager
    def row(self) -> Iterator[None]:
        """Let a bad row of this file pass, if bad rows are skipped; count it by what is wrong."""
        try:
            yield
        except TraceError as fault:
            if not self._skips or not fault.where.startswith(str(self.path)):
                raise
            self.skipped[fault.what] += 1

    @contextmanager
    def at(self, line: int) -> Iterator[None]:
        """Speak of an earlier line for a while."""
        now, self.line = self.line, line
        yield
        self.line = now

    def fault(self, what: str, remedy: str = "") -> TraceError:
        """Return the error of the row that was read last."""
        remedy = remedy or "mend the row, or skip bad rows"
        return TraceError(what, where=f"{self.path}:{self.line}", remedy=remedy)

    # Fields

    def number(self, row: dict[str, Any], name: str) -> float:
        """Return a field as a finite number."""
        try:
            value = float(row[name])
        except KeyError:
            raise self.fault(f"{name} is missing") from None
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise self.fault(f"{name} is not a finite number")
        return value

    def length(self, row: dict[str, Any], name: str) -> int:
        """Return a field as a number of tokens, at least 1."""
        value = self.number(row, name)
        if value != int(value):
            raise self.fault(f"{name} is not a whole number")
        if value < 1:
            raise self.fault(f"{name} is less than 1")
        if value > LARGEST_LENGTH:
            raise self.fault(f"{name} is more than {LARGEST_LENGTH}")
        return int(value)

    def arrival(self, seconds: float) -> float:
        """Return a time stamp in seconds once it is not before the row before's."""
        if seconds < 0:
            raise self.fault("the time stamp is negative")
        if seconds < self._before:
            raise self.fault("the time stamp is before the row before's", "sort the rows by time")
        self._before = seconds
        return seconds

    def hashes(self, row: dict[str, Any], name: str, length: int, block_size: int) -> Int64:
        """Return a list of block ids that covers ``length`` tokens: [ceil(length / size)]."""
        value = row.get(name)
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.fault(f"{name} is not a list of whole numbers")
        if len(value) != -(-length // block_size):
            raise self.fault(f"{name} does not cover the prompt in blocks of {block_size} tokens")
        if any(not -(2**63) <= each < 2**64 for each in value):
            raise self.fault(f"{name} holds a number that is no 64-bit hash")
        return np.array([each & LARGEST_HASH for each in value], np.int64)


LARGEST_HASH = 2**63 - 1
assert LARGEST_INT32 < LARGEST_HASH


def block_content(namespace: int, ids: Int64, length: int, block_size: int) -> Content:
    """Return a prompt whose blocks are numbered: equal numbers hold equal tokens."""
    lengths = np.full(len(ids), block_size, np.int64)
    lengths[-1] = length - (len(ids) - 1) * block_size
    return Content(stream_ids(namespace, ids), lengths)
