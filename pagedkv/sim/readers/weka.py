"""Agent sessions: WEKA's traces of coding agents, with think times and 64-token block ids."""

import heapq
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Int64
from pagedkv.sim.content import stream_id
from pagedkv.sim.readers.rows import LARGEST_HASH, Rows, block_content
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
    at which a session begins: they come as a Poisson process. The last, partial block of a prompt
    may be without an id, as most are published: it is shared with nobody.

    Args:
        session_rate: Sessions per second.
        closed_loop: The next request of a session comes its think time after the answer; if not,
            it comes when the trace says.
        seed: Of the sessions' beginnings.
    """
    rows = Rows(path, on_error)

    def begun() -> Iterator[tuple[float, list[SimRequest]]]:
        rng = np.random.default_rng(seed)
        start = 0.0
        for number, (name, turns) in enumerate(_sessions(rows)):
            start += float(rng.exponential(1 / session_rate))
            yield (
                start,
                [_request(turn, name, number, at, start) for at, turn in enumerate(turns)],
            )

    def source() -> Iterator[SimRequest]:
        if not closed_loop:
            yield from _merged(made for _, made in begun())
            return
        for start, made in begun():
            for request, follow in itertools.pairwise(made):
                request.then = follow
            made[0].arrival = start  # though its stamp is later where turns before it were skipped
            yield made[0]

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


class _Turn(Struct, frozen=True, eq=False):
    """What a row says: its time and the thinking before it, its lengths, its ids: [<= blocks]."""

    when: float
    think: float
    length: int
    output: int
    ids: Int64


def _sessions(rows: Rows) -> Iterator[tuple[str, list[_Turn]]]:
    """Yield the sessions that have turns."""
    name = ""
    turns: list[_Turn] = []
    for row in rows.json_lines():
        if "session_meta" in row:
            if turns:
                yield name, turns
            name, turns = str(row["session_meta"]), []
            continue
        with rows.row():
            if "requests" not in row:
                turns.append(_turn(rows, row))
            elif nested := sorted(_nested(rows, row["requests"]), key=lambda turn: turn.when):
                yield str(row.get("id", rows.line)), nested
    if turns:
        yield name, turns


def _nested(rows: Rows, requests: Any) -> Iterator[_Turn]:
    """Yield a published session's turns and its sub-agents'; a sub-agent may be nothing more."""
    if not isinstance(requests, list):
        raise rows.fault("requests is not a list")
    for each in requests:
        with rows.row():
            if not isinstance(each, dict):
                raise rows.fault("requests holds what is not an object")
            if "in" in each or "requests" not in each:
                yield _turn(rows, each)
            if each.get("requests") is not None:
                yield from _nested(rows, each["requests"])


def _turn(rows: Rows, row: dict[str, Any]) -> _Turn:
    length, output = rows.length(row, "in"), rows.length(row, "out")
    think = 0.0 if row.get("think_time") is None else rows.number(row, "think_time")
    when = rows.number(row, "t")
    if think < 0 or when < 0:
        raise rows.fault("a time is negative")
    return _Turn(when, think, length, output, _ids(rows, row, length))


def _ids(rows: Rows, row: dict[str, Any], length: int) -> Int64:
    runs = row.get("hash_rle")
    if runs is None:
        return rows.hashes(row, "hash_ids", length, BLOCK_SIZE, open_end=True)
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise rows.fault("hash_rle is not a list of whole numbers in pairs, a start and a count")
    count = sum(run[1] for run in runs)
    rows.check_cover("hash_rle", count, length, BLOCK_SIZE, open_end=True)
    pieces = [np.arange(start, start + many, dtype=np.int64) for start, many in runs]
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 2
        and type(run[0]) is type(run[1]) is int
        and run[1] > 0
        and 0 <= run[0] <= LARGEST_HASH - run[1]
    )


def _request(turn: _Turn, session: str, number: int, at: int, start: float) -> SimRequest:
    ids = turn.ids
    if len(ids) * BLOCK_SIZE < turn.length:
        ids = np.append(ids, -1 - at)  # nobody else's
    return SimRequest(
        arrival=start + turn.when,
        prompt=block_content(stream_id(7, number), ids, turn.length, BLOCK_SIZE),
        output_len=turn.output,
        output_stream=stream_id(OUTPUTS, number * 1_000_000 + at),
        session=session,
        think=turn.think if at else 0.0,
    )
