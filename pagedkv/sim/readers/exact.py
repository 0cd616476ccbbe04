"""Traces with the very tokens: LLMServingSim's JSON lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.config import LARGEST_INT32
from pagedkv.core.arrays import Int32
from pagedkv.sim.content import Content, stream_id
from pagedkv.sim.readers.rows import Rows
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["llmservingsim"]

OUTPUTS = 5


def llmservingsim(path: Path, *, on_error: str = "raise") -> Workload:
    """Read LLMServingSim requests: nanoseconds, lengths, and the prompt's token ids."""
    rows = Rows(path, on_error)

    def made(number: int, row: dict[str, Any]) -> SimRequest:
        inputs = rows.length(row, "input_toks")
        none = np.zeros(0, np.int64)
        return SimRequest(
            arrival=rows.arrival(row, "arrival_time_ns", 1e-9),
            prompt=Content(none, none, None, _tokens(rows, row, inputs)),
            output_len=rows.length(row, "output_toks"),
            output_stream=stream_id(OUTPUTS, number),
        )

    def source() -> Iterator[SimRequest]:
        return rows.requests(rows.json_lines(), made)

    return Workload(path.name, source, skipped=rows.skipped)


def _tokens(rows: Rows, row: dict[str, Any], length: int) -> Int32:
    ids = row.get("input_tok_ids")
    if not isinstance(ids, list) or not all(
        type(each) is int and 0 <= each < LARGEST_INT32 for each in ids
    ):
        raise rows.fault("input_tok_ids is not a list of token ids")
    if len(ids) != length:
        raise rows.fault("input_tok_ids and input_toks disagree")
    return np.array(ids, np.int32)
