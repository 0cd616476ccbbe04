"""Agent sessions: WEKA's traces of coding agents, with think times and 64-token block ids."""

import heapq
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.core.arrays import Int64
from pagedkv.sim.content import stream_id
from pagedkv.sim.readers.rows import Rows, block_content
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["weka"]

BLOCK_SIZE = 64
OUTPUTS = 6


def weka(
    path: Path,
    *,
    on_error: str = "raise",
    session_rate: float = 1.0,
    closed_loop: bool = True,
    seed: int = 0,
) -> Workload:
    """Read sessions, either as published (one object per session with nested ``requests``) or as
    flat rows behind a ``session_meta`` row, block ids as lists or as ``hash_rle`` runs.

    Block ids are local to a session, so nothing is shared between sessions. The trace has no time
    at which a session begins: they come as a Poisson process. A row may carry fewer or more ids
    than its prompt has blocks (sub-agents start afresh): a prompt is what its ids say, cut or
    padded to ``in`` tokens of its own.

    Args:
        session_rate: Sessions per second.
        closed_loop: The next request of a session comes its think time after the answer; if not,
            it comes when the trace says.
        seed: Of the sessions' beginnings.
    """
    rows = Rows(path, on_error)

    def sessions() -> Iterator[list[SimRequest]]:
        rng = np.random.default_rng(seed)
        start = 0.0
        for number, (name, turns) in enumerate(_sessions(rows)):
            start += float(rng.exponential(1 / session_rate))
            made = []
            for at, turn in enumerate(turns):
                with rows.at(turn.get("line", rows.line)), rows.row():
                    made.append(_request(rows, turn, name, number, at, start))
            if made:
                yield made

    def source() -> Iterator[SimRequest]:
        if closed_loop:
            for made in sessions():
                for request, follow in itertools.pairwise(made):
                    request.then = follow
                yield made[0]
        else:
            yield from _merged(sessions())

    return Workload(
        path.name,
        source,
        block_size=BLOCK_SIZE,
        closed_loop=closed_loop,
        skipped=rows.skipped,
    )


def _merged(sessions: Iterator[list[SimRequest]]) -> Iterator[SimRequest]:
    """Merge sessions that begin in order; holds only those that have begun and not ended."""
    heap: list[tuple[float, int, SimRequest]] = []
    count = 0
    for made in sessions:
        first = min(request.arrival for request in made)
        while heap and heap[0][0] <= first:
            yield heapq.heappop(heap)[2]
        for request in made:
            heapq.heappush(heap, (request.arrival, count, request))
            count += 1
    while heap:
        yield heapq.heappop(heap)[2]


def _sessions(rows: Rows) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    name = ""
    turns: list[dict[str, Any]] = []
    for row in rows.json_lines():
        if "requests" in row:  # as published: a session an object, sub-agents nested
            with rows.row():
                yield str(row.get("id", rows.line)), _flattened(rows, row["requests"])
        elif "session_meta" in row:
            if turns:
                yield name, turns
            name, turns = str(row["session_meta"]), []
        else:
            turns.append(row | {"line": rows.line})
    if turns:
        yield name, turns


def _flattened(rows: Rows, requests: Any) -> list[dict[str, Any]]:
    """Return a session's requests and its sub-agents', in order of their time."""
    if not isinstance(requests, list) or not all(isinstance(each, dict) for each in requests):
        raise rows.fault("requests is not a list of objects")
    found: list[dict[str, Any]] = []
    for each in requests:
        if "in" in each:
            found.append(each)
        if each.get("requests"):
            found += _flattened(rows, each["requests"])
    return sorted(found, key=lambda each: each.get("t", 0.0))


def _request(
    rows: Rows, row: dict[str, Any], session: str, number: int, at: int, start: float
) -> SimRequest:
    length, output = rows.length(row, "in"), rows.length(row, "out")
    think = 0.0 if row.get("think_time") is None else rows.number(row, "think_time")
    when = rows.number(row, "t")
    if think < 0 or when < 0:
        raise rows.fault("a time is negative")
    ids = _ids(rows, row)[: -(-length // BLOCK_SIZE)]
    missing = -(-length // BLOCK_SIZE) - len(ids)
    if missing:
        own = -1 - np.arange(missing) - 1_000_000 * (at + 1)  # nobody else's
        ids = np.concatenate([ids, own])
    place = stream_id(7, number)
    return SimRequest(
        arrival=start + when,
        prompt=block_content(place, ids, length, BLOCK_SIZE),
        output_len=output,
        output_stream=stream_id(OUTPUTS, number * 1_000_000 + at),
        session=session,
        think=think if at else 0.0,
    )


def _ids(rows: Rows, row: dict[str, Any]) -> Int64:
    runs = row.get("hash_rle")
    try:
        if runs is None:
            return np.array(row.get("hash_ids", []), np.int64).reshape(-1)
        pieces = [np.arange(start, start + count) for start, count in runs]
        ids: Int64 = np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64)
        return ids
    except (TypeError, ValueError, OverflowError):
        raise rows.fault("hash_rle or hash_ids is not a list of whole numbers") from None
