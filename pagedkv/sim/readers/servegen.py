"""ServeGen clients: rates, burstiness and lengths of each client in windows of time."""

import heapq
import math
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float64, Int64
from pagedkv.errors import TraceError
from pagedkv.sim.content import stream_id, text
from pagedkv.sim.ranges import LARGEST_LENGTH, Range
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["servegen"]

PROMPTS, OUTPUTS = 8, 9
GAMMA, WEIBULL = 1.0, 2.0
# Laws beyond these would take for ever to draw one window from; published ones are within.
SHAPES, SCALES, MEAN_GAPS = Range(1e-3, 1e6), Range(1e-9, 1e12), Range(1e-4, math.inf)
_PAIR = re.compile(r"(-?\d+): ([0-9.eE+-]+)")
_TRACE = re.compile(r"chunk-(\w+)-trace\.csv$")


class _Law(Struct, frozen=True, eq=False):
    """Lengths and their cumulated probabilities: [N], [N]."""

    lengths: Int64
    cumulated: Float64

    def at(self, uniform: float) -> int:
        """Return the length at a place from 0 to 1."""
        place = int(np.searchsorted(self.cumulated, uniform, "right"))
        return int(self.lengths[min(place, len(self.lengths) - 1)])


class _Window(Struct, frozen=True):
    """One window with requests: from when to when, its renewal process, its lengths."""

    start: float
    end: float
    law: float
    shape: float
    scale: float
    inputs: _Law
    outputs: _Law


class _Client(Struct, frozen=True):
    """One client: the windows in which it asks, and when the last of all its windows ends."""

    name: str
    windows: list[_Window]
    end: float


class _Span(Struct, frozen=True):
    """Which part of the trace is drawn, and how."""

    start: float
    duration: float
    speedup: float
    seed: int


def servegen(
    path: Path,
    *,
    on_error: str = "raise",
    start: float = 0.0,
    duration: float = 3600.0,
    speedup: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Draw requests from ServeGen's client models: a ``.tar.gz`` or a folder of its chunks.

    Every client is a tenant with random streams of its own, so that a client's requests do not
    depend on which others there are. Within a window arrivals are a renewal process of the
    window's law (Gamma or Weibull) and parameters; lengths come from the client's published
    distributions of that time, input and output apart. Clients without length distributions,
    as some are published, are left out and counted.

    Args:
        on_error: ``skip`` leaves out, and counts, clients whose files are damaged.
        start: Where in the trace to begin, in seconds.
        duration: How long to go on.
        speedup: Requests per request of the trace.
    """
    span = _Span(start, duration, speedup, seed)
    workload = Workload(path.name, lambda: _draw(path, workload, on_error, span))
    return workload


def _draw(path: Path, workload: Workload, on_error: str, span: _Span) -> Iterator[SimRequest]:
    workload.skipped.clear()
    clients = list(_clients(path, workload, on_error))
    if not clients:
        raise TraceError(
            "there is no client in it",
            where=str(path),
            remedy="give ServeGen's chunk-N-trace.csv and chunk-N-dataset.json",
        )
    end = max(client.end for client in clients)
    if span.start >= end:
        raise TraceError(
            f"it ends at {end:g} s, before the start at {span.start:g} s",
            where=str(path),
            remedy="start earlier",
        )
    streams = [_requests(client, span) for client in clients]
    yield from heapq.merge(*streams, key=lambda request: request.arrival)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            for file in sorted(path.rglob("chunk-*")):
                yield file.name, file.read_bytes()
            return
        with tarfile.open(path) as archive:
            for member in archive:
                held = archive.extractfile(member) if member.isfile() else None
                if held is not None:
                    yield Path(member.name).name, held.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as fault:
        raise TraceError(
            f"cannot be read: {fault}", where=str(path), remedy="give a .tar.gz or a folder"
        ) from None


def _clients(path: Path, workload: Workload, on_error: str) -> Iterator[_Client]:
    files = dict(_files(path))
    for name in sorted(files):
        found = _TRACE.search(name)
        if not found:
            continue
        if f"chunk-{found[1]}-dataset.json" not in files:  # so it is published for some clients
            workload.skipped["a client without length distributions"] += 1
            continue
        try:
            yield _client(path, found[1], files)
        except TraceError as fault:
            if on_error != "skip":
                raise
            workload.skipped[fault.what] += 1


def _client(path: Path, name: str, files: dict[str, bytes]) -> _Client:
    rows = _rows(f"{path}/chunk-{name}-trace.csv", files[f"chunk-{name}-trace.csv"])
    where = f"{path}/chunk-{name}-dataset.json"
    laws = _laws(where, files[f"chunk-{name}-dataset.json"])
    marks = np.array(sorted(laws))
    ends = [row[0] for row in rows[1:]] + [2 * rows[-1][0] - rows[-2][0]]
    windows = []
    for (start, rate, law, shape, scale), end in zip(rows, ends, strict=True):
        if rate == 0:
            continue
        mark = int(marks[max(0, int(np.searchsorted(marks, start, "right")) - 1)])
        inputs, outputs = laws[mark]
        if inputs is None or outputs is None:
            raise _damaged(f"there are no lengths for the window at {start:g} s", where)
        windows.append(_Window(start, end, law, shape, scale, inputs, outputs))
    return _Client(f"client-{name}", windows, ends[-1])


def _damaged(what: str, where: str) -> TraceError:
    return TraceError(what, where=where, remedy="mend the file, or skip bad clients")


def _rows(where: str, content: bytes) -> list[tuple[float, float, float, float, float]]:
    """Read ``t,rate,cv,law,p1,p2`` a line; the variation follows from the rest."""
    rows: list[tuple[float, float, float, float, float]] = []
    for line, raw in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        here = f"{where}:{line}"
        try:
            t, rate, _, law, shape, scale = raw.split(",")
            kind = {"": 0.0, "Gamma": GAMMA, "Weibull": WEIBULL}[law]
            row = (float(t), float(rate), kind, float(shape), float(scale))
        except (KeyError, ValueError):
            raise _damaged("the row is not t,rate,cv,law,p1,p2", here) from None
        if not math.isfinite(row[0]) or not 0 <= row[1] < math.inf:
            raise _damaged("the time or the rate is not a finite number of 0 up", here)
        if rows and row[0] <= rows[-1][0]:
            raise _damaged("the window does not begin after the one before", here)
        if row[1] > 0:
            _check_law(*row[2:], here)
        rows.append(row)
    if len(rows) < 2:
        raise _damaged("there are fewer than two windows, so their width is unknown", where)
    return rows


def _check_law(law: float, shape: float, scale: float, where: str) -> None:
    """Refuse what is no law, and what would take for ever to draw a window from."""
    if law == 0:
        raise _damaged("the window has a rate and no law", where)
    if shape not in SHAPES or scale not in SCALES:
        raise _damaged(f"p1 or p2 is out of range; p1 is {SHAPES}, p2 {SCALES}", where)
    # A Weibull law's gamma(1 + 1 / p1) leaves the floating numbers below a shape of 0.006.
    mean = shape * scale if law == GAMMA else scale * math.exp(min(700, math.lgamma(1 + 1 / shape)))
    if mean not in MEAN_GAPS:
        raise _damaged(f"requests come {mean:g} s apart on average; {MEAN_GAPS} can be", where)


def _laws(where: str, content: bytes) -> dict[int, tuple[_Law | None, _Law | None]]:
    """Read the distributions of lengths by the time from which they hold."""
    try:
        tables = msgspec.json.decode(content, type=dict[int, dict[str, str]])
        laws = {
            t: (_law(each["input_tokens"]), _law(each["output_tokens"]))
            for t, each in tables.items()
        }
    except (KeyError, ValueError):
        laws = {}
    if not laws:
        raise _damaged("it is not ServeGen's length distributions", where)
    return laws


def _law(text: str) -> _Law | None:
    """Read ``{133: 0.0015, 134: 0.0063}``; None if it is empty. Published lengths of 0 become 1.

    Raises:
        ValueError: It is something else.
    """
    pairs = _PAIR.findall(text)
    if text.count(":") != len(pairs) or (not pairs and text != "{}"):
        raise ValueError(text)
    if not pairs:
        return None
    lengths = [int(length) for length, _ in pairs]
    weights = np.array([float(weight) for _, weight in pairs], np.float64)
    total = float(weights.sum())
    if not 0 <= min(lengths) <= max(lengths) <= LARGEST_LENGTH:
        raise ValueError(text)
    if not (weights >= 0).all() or not 0 < total < math.inf:
        raise ValueError(text)
    return _Law(np.maximum(1, np.array(lengths, np.int64)), np.cumsum(weights / total))


def _requests(client: _Client, span: _Span) -> Iterator[SimRequest]:
    """Draw one client's requests; times and lengths from streams of their own."""
    key = zlib.crc32(client.name.encode())
    times, lengths = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence([span.seed, key]).spawn(2)
    )
    prompts, outputs = (stream_id(space, span.seed << 32 | key) for space in (PROMPTS, OUTPUTS))
    end = span.start + span.duration
    count = 0
    for window in client.windows:
        if window.end <= span.start:
            continue
        if window.start >= end:
            return
        for when in _arrivals(times, window, span.speedup):
            drawn = lengths.random(2)
            if when >= end:
                return
            if when < span.start:
                continue
            count += 1
            yield SimRequest(
                arrival=when - span.start,
                prompt=text(stream_id(prompts, count), window.inputs.at(drawn[0])),
                output_len=window.outputs.at(drawn[1]),
                output_stream=stream_id(outputs, count),
                tenant=client.name,
            )


def _arrivals(rng: np.random.Generator, window: _Window, speedup: float) -> Iterator[float]:
    """Yield a renewal process over one window."""
    since, width = (
        0.0,
        window.end - window.start,
    )  # late in a trace, small gaps would be rounded off
    while True:
        if window.law == GAMMA:
            gap = rng.gamma(window.shape, window.scale)
        else:
            gap = window.scale * rng.weibull(window.shape)
        since += gap / speedup
        if since >= width:
            return
        yield window.start + since
