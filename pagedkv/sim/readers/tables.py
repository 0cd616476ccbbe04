"""Traces that say lengths only, as CSV: Azure's LLM inference traces and BurstGPT."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pagedkv.sim.content import stream_id, text
from pagedkv.sim.readers.rows import Rows
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["azure", "burstgpt"]

PROMPTS, OUTPUTS = 3, 4


def _lengths_only(
    arrival: float, number: int, inputs: int, outputs: int, tenant: str = "", session: str = ""
) -> SimRequest:
    """Return a request that shares nothing with any other."""
    return SimRequest(
        arrival=arrival,
        prompt=text(stream_id(PROMPTS, number), inputs),
        output_len=outputs,
        output_stream=stream_id(OUTPUTS, number),
        tenant=tenant,
        session=session,
    )


def azure(path: Path, *, on_error: str = "raise") -> Workload:
    """Read an Azure LLM inference trace (2023 or 2024): a date, context and generated tokens."""
    rows = Rows(path, on_error)

    def source() -> Iterator[SimRequest]:
        start: datetime | None = None

        def made(number: int, row: dict[str, str]) -> SimRequest:
            nonlocal start
            inputs, outputs = rows.length(row, "ContextTokens"), rows.length(row, "GeneratedTokens")
            when = _date(rows, row["TIMESTAMP"])
            start = start or when
            if (when.tzinfo is None) != (start.tzinfo is None):
                raise rows.fault("some time stamps have a time zone and some have none")
            return _lengths_only((when - start).total_seconds(), number, inputs, outputs)

        table = rows.csv_rows("TIMESTAMP", "ContextTokens", "GeneratedTokens")
        first: float | None = None
        for request in rows.requests(table, made):
            first = request.arrival if first is None else first
            request.arrival -= first  # not 0 where the first row's stamp ran ahead
            yield request

    return Workload(path.name, source, skipped=rows.skipped)


def _date(rows: Rows, text: str) -> datetime:
    """Read ``2023-11-16 18:17:03.9799600``: seven digits of a second, Python takes six."""
    whole, dot, rest = text.strip().partition(".")
    digits = "".join(c for c in rest[:9] if c.isdigit())[:6]
    zone = rest.lstrip("0123456789")
    try:
        return datetime.fromisoformat(f"{whole}{dot}{digits.ljust(6, '0') if dot else ''}{zone}")
    except ValueError:
        raise rows.fault("TIMESTAMP is not a date") from None


def burstgpt(path: Path, *, on_error: str = "raise", model: str | None = None) -> Workload:
    """Read a BurstGPT trace (v1, or v2 with ``Session ID``); models become tenants.

    Rows of requests that failed have 0 response tokens: they cannot be replayed, so they are
    errors unless bad rows are skipped.

    Args:
        model: Only rows of this model, such as ``GPT-4``; the others count as skipped.
    """
    rows = Rows(path, on_error)

    def chosen() -> Iterator[dict[str, str]]:
        for row in rows.csv_rows("Timestamp", "Model", "Request tokens", "Response tokens"):
            if model is None or row["Model"] == model:
                yield row
            else:
                rows.skipped[f"another model than {model}"] += 1

    def made(number: int, row: dict[str, str]) -> SimRequest:
        return _lengths_only(
            rows.arrival(row, "Timestamp", 1.0),
            number,
            rows.length(row, "Request tokens"),
            rows.length(row, "Response tokens"),
            row["Model"],
            row.get("Session ID", ""),
        )

    def source() -> Iterator[SimRequest]:
        return rows.requests(chosen(), made)

    return Workload(path.name, source, skipped=rows.skipped)
