"""Traces that say which blocks prompts share: Mooncake, vLLM's timed_trace, Qwen-Bailian."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagedkv.sim.content import stream_id
from pagedkv.sim.readers.rows import Rows, block_content
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["bailian", "mooncake", "timed_trace"]

BLOCKS, OUTPUTS = 1, 2


def timed_trace(
    path: Path,
    *,
    on_error: str = "raise",
    block_size: int = 512,
    seconds: float = 0.001,
    timestamp: str = "timestamp",
    input_length: str = "input_length",
    output_length: str = "output_length",
    hash_ids: str = "hash_ids",
    tenant: str = "tenant",
) -> Workload:
    """Read JSON lines of a time, two lengths and the ids of the prompt's blocks.

    The format of Mooncake (FAST'25) and of vLLM's ``timed_trace``. Ids are chained: an id stands
    for its block and all before it. Rows may lie at the same time; they keep the file's order.

    Args:
        block_size: Tokens that an id stands for; the last one of a prompt may stand for fewer.
        seconds: What one unit of the time stamp lasts.
        tenant: A column that names the tenant; rows without it have none.
    """
    rows = Rows(path, on_error)
    names = (timestamp, input_length, output_length, hash_ids, tenant)

    def source() -> Iterator[SimRequest]:
        return rows.requests(
            rows.json_lines(),
            lambda number, row: _request(rows, row, number, names, block_size, seconds),
        )

    return Workload(path.name, source, block_size=block_size, skipped=rows.skipped)


def _request(
    rows: Rows,
    row: dict[str, Any],
    number: int,
    names: tuple[str, ...],
    block_size: int,
    seconds: float,
) -> SimRequest:
    length, output = rows.length(row, names[1]), rows.length(row, names[2])
    ids = rows.hashes(row, names[3], length, block_size)
    tenant = row.get(names[4], "")
    if not isinstance(tenant, str):
        raise rows.fault(f"{names[4]} is not text")
    return SimRequest(
        arrival=rows.arrival(row, names[0], seconds),
        prompt=block_content(BLOCKS, ids, length, block_size),
        output_len=output,
        output_stream=stream_id(OUTPUTS, number),
        tenant=tenant,
    )


def mooncake(path: Path, *, on_error: str = "raise", block_size: int = 512) -> Workload:
    """Read a Mooncake trace: milliseconds, and an id for every 512 tokens."""
    return timed_trace(path, on_error=on_error, block_size=block_size)


def bailian(path: Path, *, on_error: str = "raise", block_size: int = 16) -> Workload:
    """Read a Qwen-Bailian trace: seconds, an id for every 16 tokens, and what a chat goes on from.

    ``chat_id`` names a request and ``parent_chat_id`` the one it follows; both become one session.
    Time stamps hold: a follow-up comes when the trace says, not when its parent has ended.
    """
    rows = Rows(path, on_error)
    names = ("timestamp", "input_length", "output_length", "hash_ids", "tenant")

    def source() -> Iterator[SimRequest]:
        root: dict[int | str, str] = {}

        def made(number: int, row: dict[str, Any]) -> SimRequest:
            request = _request(rows, row, number, names, block_size, 1.0)
            chat, parent = row.get("chat_id", number), row.get("parent_chat_id", -1)
            if not isinstance(chat, int | str) or not isinstance(parent, int | str):
                raise rows.fault("chat_id or parent_chat_id is neither a number nor text")
            request.session = root[chat] = root.get(parent, str(chat))
            return request

        return rows.requests(rows.json_lines(), made)

    return Workload(path.name, source, block_size=block_size, skipped=rows.skipped)
