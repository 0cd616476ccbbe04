"""Traces for Chrome's and Perfetto's viewers, in Chrome's trace event format."""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.files import replacing
from pagedkv.sim.recorder import Phase
from pagedkv.sim.result import SimResult

__all__ = ["write_perfetto"]

Event = dict[str, Any]
_WAITS = ("queued", "preempted")
_FIRST_WAIT = 1_000_000  # beyond any row


def write_perfetto(result: SimResult, path: Path) -> None:
    """Write the phases of requests and the pool's occupancy.

    A row of the batch is a track; who waits stands on the first track that is free, since events
    of one track may not overlap in part. What was not kept is said in the replica's label.
    """
    events: list[Event] = []
    for replica, phases in enumerate(result.phases):
        events += _replica(replica, phases, result.num_unwatched[replica])
    table = result.occupancy.table()
    for i, time in enumerate(table["time"]):
        for kind in ("held", "cached", "running", "waiting"):
            counter = {"ph": "C", "pid": 0, "name": kind, "ts": time * 1e6}
            events.append(counter | {"args": {kind: table[kind][i]}})
    document = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"phases_left_out": sum(result.num_unwatched)},
    }
    with replacing(path, binary=True) as out:
        out.write(msgspec.json.encode(document))


def _replica(number: int, phases: list[Phase], left_out: int) -> Iterator[Event]:
    yield _meta(number, "process_name", name=f"replica {number}")
    if left_out:
        label = f"the first {len(phases):,} of {len(phases) + left_out:,} phases"
        yield _meta(number, "process_labels", labels=label)
    tracks = _tracks(phases)
    for track in sorted(set(tracks)):
        wait = track - _FIRST_WAIT
        name = f"row {track}" if wait < 0 else f"waiting {wait}"
        yield _meta(number, "thread_name", tid=track, name=name)
    for phase, track in zip(phases, tracks, strict=True):
        begin, end = _nanoseconds(phase)
        yield {
            "ph": "X",
            "pid": number,
            "tid": track,
            "name": phase.kind,
            "cat": phase.kind,
            "ts": begin / 1e3,
            "dur": (end - begin) / 1e3,
            "args": {"request": phase.request},
        }


def _meta(pid: int, kind: str, *, tid: int = 0, **args: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": args}


def _nanoseconds(phase: Phase) -> tuple[int, int]:
    return round(phase.begin * 1e9), round(phase.end * 1e9)


def _tracks(phases: list[Phase]) -> list[int]:
    """Return where each phase is drawn: its row, or the first track on which nobody waits then."""
    tracks = [phase.row for phase in phases]
    waits = [i for i, phase in enumerate(phases) if phase.kind in _WAITS]
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # until when, and which
    for i in sorted(waits, key=lambda i: _nanoseconds(phases[i])):
        begin, end = _nanoseconds(phases[i])
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        track = heapq.heappop(free) if free else _FIRST_WAIT + len(busy)
        heapq.heappush(busy, (end, track))
        tracks[i] = track
    return tracks
