"""Readers of public trace formats: files in, workloads out, parsed as they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError, TraceError
from pagedkv.sim.ranges import check
from pagedkv.sim.readers.exact import llmservingsim
from pagedkv.sim.readers.hashed import bailian, mooncake, timed_trace
from pagedkv.sim.readers.servegen import servegen
from pagedkv.sim.readers.tables import azure, burstgpt
from pagedkv.sim.readers.weka import weka
from pagedkv.sim.workload import Workload

__all__ = ["READERS", "read_trace"]

READERS: dict[str, Callable[..., Workload]] = {
    "mooncake": mooncake,
    "timed_trace": timed_trace,
    "bailian": bailian,
    "azure": azure,
    "burstgpt": burstgpt,
    "weka": weka,
    "servegen": servegen,
    "llmservingsim": llmservingsim,
}


def read_trace(
    path: str | Path, format: str, *, on_error: str = "raise", **options: Any
) -> Workload:
    """Return the workload of a trace file; rows are read when it is iterated.

    Args:
        format: A name of `READERS`.
        on_error: ``raise`` at the first bad row, or ``skip`` bad rows and count them by reason.
        options: The reader's own.

    Raises:
        ConfigError: The format is unknown, takes no such option, or its value is out of range.
        TraceError: There is no such file.
    """
    if format not in READERS:
        raise ConfigError(
            f"there is no trace format {format!r}",
            where="format",
            remedy=f"give one of {', '.join(READERS)}",
        )
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"{on_error!r}", where="on_error", remedy="give raise or skip")
    check("trace", **options)
    file = Path(path)
    if not file.exists():
        raise TraceError("there is no such file", where=str(path), remedy="give a trace's path")
    try:
        return READERS[format](file, on_error=on_error, **options)
    except TypeError:
        raise ConfigError(
            f"{format} takes no such option",
            where=", ".join(options),
            remedy="see the reader's documentation",
        ) from None
