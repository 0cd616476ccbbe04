"""The table of ``pagedkv eval``, narrow enough for a terminal of 80 columns."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

__all__ = ["labels", "quality_table", "show_quality"]

# What the other columns leave of 80.
_ROOM = 14


def show_quality(result: Mapping[str, Any], *, to_stderr: bool = False) -> None:
    """Print a sweep as a table, below what was read."""
    console = Console(stderr=to_stderr, highlight=False)
    passages, text = result["passages"], result["text"]
    tokens = max(each["num_tokens"] for each in passages)
    times = f"{len(passages)} x " if len(passages) > 1 else ""
    console.print(
        f"[bold]{result['task']}[/] of {result['model']}, {result['dtype']}: "
        f"{times}{tokens:,} tokens of {text['name']}",
        quality_table(result),
        sep="\n",
    )
    for name, label in labels(result).items():
        if name != label:
            console.print(f"{label} {name}", markup=False)
    if silent := [cell for cell in result["cells"][1:] if not cell["evicted_fraction"]]:
        names = ", ".join(dict.fromkeys(labels(result)[cell["eviction"]] for cell in silent))
        console.print(f"Never evicted anything: {names}. Lower --budget or give more tokens.")


def labels(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what each policy is called where there is little room: its name, or a number."""
    names = list(dict.fromkeys(cell["eviction"] for cell in result["cells"]))
    long = [name for name in names if len(name) > _ROOM]
    return {name: f"#{long.index(name) + 1}" if name in long else name for name in names}


def quality_table(result: Mapping[str, Any]) -> Table:
    """Return a sweep as a table, the full cache first."""
    drawn = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("eviction", no_wrap=True)
    for name in ("budget", "by", result["metric"], "vs full (95 %)", "KV MiB", "evicted"):
        drawn.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    short, ratio = labels(result), result["metric"] == "perplexity"
    for cell in result["cells"]:
        drawn.add_row(short[cell["eviction"]], *_row(cell, ratio=ratio))
    return drawn


def _row(cell: Mapping[str, Any], *, ratio: bool) -> tuple[str, ...]:
    value = f"{cell['value']:,.3g}" if ratio and cell["value"] >= 1e4 else f"{cell['value']:.2f}"
    kv = f"{cell['kv_bytes'] / 2**20:,.1f}"
    if cell["budget"] is None:
        return "", "", value, "", kv, ""
    beside = cell["vs_full"]
    shown = [beside["estimate"], beside["low"], beside["high"]]
    mid, low, high = (_short(n) if ratio else f"{n:+.2f}" for n in shown)
    interval = f"{'x' if ratio else ''}{mid} ({low}, {high})"
    evicted = f"{cell['evicted_fraction']:.0%}"
    return str(cell["budget"]), cell["granularity"], value, interval, kv, evicted


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
