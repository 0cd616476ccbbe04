"""ServeGen clients: rates, burstiness and lengths of each client in windows of time."""

import heapq
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float64, Int64
from pagedkv.errors import TraceError
from pagedkv.sim.content import stream_id, text
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["servegen"]

PROMPTS, OUTPUTS = 8, 9
_PAIR = re.compile(r"(\d+): ([0-9.eE+-]+)")
_TRACE = re.compile(r"chunk-(\w+)-trace\.csv$")


class _Client(Struct, eq=False):
    """One client: [W, 6] its windows, and its length distributions by their start."""

    name: str
    windows: Float64
    lengths: dict[int, tuple[tuple[Int64, Float64], tuple[Int64, Float64]]]


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
    window's rate, law (Gamma or Weibull) and parameters; lengths come from the client's published
    distributions of that time, input and output apart.

    Args:
        on_error: ``skip`` leaves out, and counts, clients whose files are damaged.
        start: Where in the trace to begin, in seconds.
        duration: How long to go on.
        speedup: Requests per request of the trace.
    """
    workload = Workload(path.name, lambda: _draw(path, workload, on_error, span))
    span = (start, duration, speedup, seed)
    return workload


def _draw(
    path: Path,
    workload: Workload,
    on_error: str,
    span: tuple[float, float, float, int],
) -> Iterator[SimRequest]:
    workload.skipped.clear()
    streams = []
    for number, client in enumerate(_clients(path, workload, on_error)):
        rng = np.random.default_rng([span[3], number])
        streams.append(_requests(client, rng, number, span))
    if not streams:
        raise TraceError(
            "there is no client in it",
            where=str(path),
            remedy="give ServeGen's chunk-N-trace.csv and chunk-N-dataset.json",
        )
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
    except (OSError, tarfile.TarError, EOFError) as fault:
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
    trace, dataset = f"chunk-{name}-trace.csv", f"chunk-{name}-dataset.json"
    rows = []
    for line, raw in enumerate(files[trace].decode("utf-8", "replace").splitlines(), start=1):
        t, rate, cv, law, p1, p2 = (raw.split(",") + [""] * 6)[:6]
        try:
            kind = {"": 0.0, "Gamma": 1.0, "Weibull": 2.0}[law]
            rows.append([float(t), float(rate), float(cv), kind, float(p1), float(p2)])
        except (KeyError, ValueError):
            raise TraceError(
                "the row is not t,rate,cv,law,p1,p2",
                where=f"{path}/{trace}:{line}",
                remedy="mend the row, or skip bad clients",
            ) from None
    try:
        tables: dict[str, dict[str, str]] = msgspec.json.decode(files[dataset])
        lengths = {
            int(t): (_law(table["input_tokens"]), _law(table["output_tokens"]))
            for t, table in tables.items()
        }
    except (KeyError, ValueError, AttributeError, TypeError, msgspec.DecodeError):
        raise TraceError(
            "it is not ServeGen's length distributions",
            where=f"{path}/{dataset}",
            remedy="mend the file, or skip bad clients",
        ) from None
    return _Client(f"client-{name}", np.array(rows, np.float64).reshape(-1, 6), lengths)


def _law(text: str) -> tuple[Int64, Float64]:
    """Read ``{133: 0.0015, 134: 0.0063}``: lengths and their cumulated probabilities."""
    pairs = _PAIR.findall(text)
    lengths = np.array([int(a) for a, _ in pairs], np.int64)
    weights = np.array([float(b) for _, b in pairs], np.float64)
    return lengths, np.cumsum(weights / max(weights.sum(), 1e-300))


def _requests(
    client: _Client, rng: Any, number: int, span: tuple[float, float, float, int]
) -> Iterator[SimRequest]:
    start, duration, speedup, seed = span
    windows = client.windows
    if len(windows) < 2 or not client.lengths:
        return
    width = float(windows[1, 0] - windows[0, 0])
    marks = np.array(sorted(client.lengths))
    count = 0
    for t, rate, _, law, p1, p2 in windows.tolist():
        if rate <= 0 or law == 0 or t + width <= start or t >= start + duration:
            continue
        inputs, outputs = client.lengths[int(marks[max(0, np.searchsorted(marks, t, "right") - 1)])]
        if not len(inputs[0]) or not len(outputs[0]):
            continue
        for when in _arrivals(rng, t, width, law, p1, p2, rate * speedup, rate):
            drawn = rng.random(2)
            if not start <= when < start + duration:
                continue
            count += 1
            key = (seed * 1_000 + number) * 100_000_000 + count
            yield SimRequest(
                arrival=when - start,
                prompt=text(stream_id(PROMPTS, key), _length(inputs, drawn[0])),
                output_len=_length(outputs, drawn[1]),
                output_stream=stream_id(OUTPUTS, key),
                tenant=client.name,
            )


def _length(law: tuple[Int64, Float64], uniform: float) -> int:
    at = min(int(np.searchsorted(law[1], uniform, "right")), len(law[0]) - 1)
    return max(1, int(law[0][at]))


def _arrivals(
    rng: Any, t: float, width: float, law: float, p1: float, p2: float, rate: float, base: float
) -> Iterator[float]:
    """Yield a renewal process over one window: shape ``p1``, scale ``p2``, sped up to ``rate``."""
    when = t
    while True:
        gap = rng.gamma(p1, p2) if law == 1 else p2 * rng.weibull(p1)
        when += gap * base / rate
        if when >= t + width:
            return
        yield when
