"""Reading a trace line by line: every row that cannot be used is named, or counted."""

import csv
import gzip
import io
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from pagedkv.core.arrays import Int64
from pagedkv.errors import TraceError
from pagedkv.sim.content import Content, stream_ids
from pagedkv.sim.ranges import LARGEST_LENGTH
from pagedkv.sim.workload import SimRequest

__all__ = ["LARGEST_HASH", "Rows", "block_content"]

LARGEST_HASH = 2**63 - 1
Row = TypeVar("Row")
_BACK = "the time stamp is before the row before's"


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
        self._numbers: tuple[type, ...] = (int, float)  # as which a row's fields may be given

    def restart(self) -> None:
        """Begin again at the first line."""
        self.skipped.clear()
        self.line = 0

    @contextmanager
    def _open(self) -> Iterator[io.TextIOWrapper]:
        try:
            with self.path.open("rb") as raw:
                packed = self.path.suffix == ".gz"
                unpacked: Any = gzip.GzipFile(fileobj=raw) if packed else raw
                # A byte that is no text is the fault of its row, not of all that is read with it.
                yield io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline="")
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
                    except UnicodeEncodeError:
                        raise self.fault("the row is not UTF-8 text") from None
                    except (msgspec.DecodeError, RecursionError) as fault:
                        raise self.fault(f"not valid JSON: {fault}") from None
                    if not isinstance(found, dict):
                        raise self.fault("the row is not an object")
                    yield found

    def csv_rows(self, *columns: str) -> Iterator[dict[str, str]]:
        """Yield the rows of a CSV file that has at least these columns; a line is a row."""
        self.restart()
        self._numbers = (str,)
        with self._open() as text:
            lines = (line for line in self._lines(text) if line.strip())
            header = [name.strip() for name in self._cells(next(lines, ""))]
            wrong = [name for name in columns if header.count(name) != 1]
            if wrong:
                kind = "no" if wrong[0] not in header else "more than one"
                raise self.fault(
                    f"the header has {kind} column {wrong[0]}",
                    f"give a table with {', '.join(columns)}",
                )
            for line in lines:
                with self.row():
                    cells = self._cells(line)
                    if len(cells) != len(header):
                        raise self.fault("the row has another number of columns than the header")
                    yield dict(zip(header, cells, strict=True))

    def _cells(self, line: str) -> list[str]:
        if not line.isascii() and any("\ud800" <= each <= "\udfff" for each in line):
            raise self.fault("the row is not UTF-8 text")
        if '"' not in line:
            return line.rstrip("\r\n").split(",")
        try:
            return next(csv.reader([line.rstrip("\r\n")], strict=True))
        except csv.Error as fault:  # of an open quote, which would swallow the rows that follow
            raise self.fault(f"the row is not valid CSV: {fault}") from None

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        try:
            for line in text:
                self.line += 1
                yield line
        except (OSError, EOFError, zlib.error) as fault:
            self.line += 1
            raise self.fault(
                f"from here on it cannot be read: {fault}", "get the file anew, or cut it off here"
            ) from None

    def requests(
        self, table: Iterator[Row], make: Callable[[int, Row], SimRequest]
    ) -> Iterator[SimRequest]:
        """Yield what ``make`` makes of a row and its number, in order of arrival.

        Where bad rows are skipped, a time stamp before the row before's costs one row: the row
        before if that one ran ahead, so that one stamp far in the future does not cost all that
        follow; otherwise this one.
        """
        made = self._made(table, make)
        return self._mended(made) if self._skips else self._in_order(made)

    def _made(
        self, table: Iterator[Row], make: Callable[[int, Row], SimRequest]
    ) -> Iterator[SimRequest]:
        for number, row in enumerate(table):
            with self.row():
                yield make(number, row)

    def _in_order(self, made: Iterator[SimRequest]) -> Iterator[SimRequest]:
        before = -math.inf
        for request in made:
            if request.arrival < before:
                raise self.fault(_BACK, "sort the rows by time")
            before = request.arrival
            yield request

    def _mended(self, made: Iterator[SimRequest]) -> Iterator[SimRequest]:
        before, held = -math.inf, None
        for request in made:
            if held is None or request.arrival >= held.arrival:
                if held is not None:
                    yield held
                    before = held.arrival
                held = request
                continue
            self.skipped[_BACK] += 1
            if request.arrival >= before:
                held = request
        if held is not None:
            yield held

    @contextmanager
    def row(self) -> Iterator[None]:
        """Let a bad row of this file pass, if bad rows are skipped; count it by what is wrong."""
        try:
            yield
        except TraceError as fault:
            if not self._skips or not fault.where.startswith(str(self.path)):
                raise
            self.skipped[fault.what] += 1

    def fault(self, what: str, remedy: str = "") -> TraceError:
        """Return the error of the row that was read last."""
        remedy = remedy or "mend the row, or skip bad rows"
        return TraceError(what, where=f"{self.path}:{self.line}", remedy=remedy)

    # Fields

    def number(self, row: dict[str, Any], name: str) -> float:
        """Return a field as a finite number."""
        if name not in row:
            raise self.fault(f"{name} is missing")
        found = row[name]
        try:
            # A table's cells are text; what JSON says as text or as a truth value is no number.
            value = float(found) if type(found) in self._numbers else math.nan
        except (ValueError, OverflowError):
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

    def arrival(self, row: dict[str, Any], name: str, unit: float) -> float:
        """Return a time stamp in seconds, of 0 up; a unit of it lasts so many seconds."""
        seconds = self.number(row, name) * unit
        if seconds < 0:
            raise self.fault("the time stamp is negative")
        return seconds

    def hashes(
        self,
        row: dict[str, Any],
        name: str,
        length: int,
        block_size: int,
        *,
        open_end: bool = False,
    ) -> Int64:
        """Return a list of block ids that covers ``length`` tokens: [ceil(length / size)].

        With ``open_end`` a last, partial block may be without one: [floor(length / size)].
        """
        value = row.get(name, [] if open_end else None)
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.fault(f"{name} is not a list of whole numbers")
        self.check_cover(name, len(value), length, block_size, open_end=open_end)
        if any(not -(2**63) <= each < 2**64 for each in value):
            raise self.fault(f"{name} holds a number that is no 64-bit hash")
        return np.array([each & LARGEST_HASH for each in value], np.int64)

    def check_cover(
        self, name: str, count: int, length: int, block_size: int, *, open_end: bool
    ) -> None:
        """Refuse a number of block ids that disagrees with the prompt's length."""
        if count != -(-length // block_size) and not (open_end and count == length // block_size):
            raise self.fault(f"{name} does not cover the prompt in blocks of {block_size} tokens")


def block_content(namespace: int, ids: Int64, length: int, block_size: int) -> Content:
    """Return a prompt whose blocks are numbered: equal numbers hold equal tokens."""
    lengths = np.full(len(ids), block_size, np.int64)
    lengths[-1] = length - (len(ids) - 1) * block_size
    return Content(stream_ids(namespace, ids), lengths)
