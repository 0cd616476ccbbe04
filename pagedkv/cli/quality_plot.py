"""A picture of ``pagedkv eval``: quality against the KV bytes that were held."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from pagedkv.files import replacing

__all__ = ["draw_quality"]

COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948",
)  # fmt: skip
STYLES = {"sequence": ("-", "o"), "layer": ("--", "s"), "head": (":", "^")}
INK, FAINT = "#1f2430", "#6b7280"
MEANING = {
    "perplexity": "perplexity (lower is better)",
    "accuracy": "share of keys found (higher is better)",
    "agreement": "share of next tokens as with the full cache",
}


def draw_quality(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG with a line per policy and granularity over its budgets.

    Bars are the 95 % intervals of the paired difference to the full cache, the grey line.

    Raises:
        ConfigError: The file cannot be written.
    """
    figure = Figure(figsize=(8.6, 5.2), dpi=120, facecolor="white", layout="constrained")
    axis = figure.add_subplot()
    full, rest = result["cells"][0], result["cells"][1:]
    axis.axhline(full["value"], color=FAINT, linewidth=1.2, zorder=1)
    axis.annotate(
        f"full cache {full['value']:.2f}, {full['kv_bytes'] / 2**20:,.1f} MiB",
        (1.0, full["value"]), xycoords=("axes fraction", "data"), xytext=(-4, 4),
        textcoords="offset points", ha="right", va="bottom", color=FAINT, fontsize=9,
    )  # fmt: skip
    names = list(dict.fromkeys(cell["eviction"] for cell in rest))
    for name, granularity in dict.fromkeys((c["eviction"], c["granularity"]) for c in rest):
        line = [c for c in rest if (c["eviction"], c["granularity"]) == (name, granularity)]
        colour = COLOURS[names.index(name) % len(COLOURS)]
        _draw_line(axis, line, full["value"], colour, ratio=result["metric"] == "perplexity")
    _label(figure, axis, result)
    with replacing(path, binary=True) as out:
        figure.savefig(out, format=Path(path).suffix[1:] or "png", metadata={"Software": "pagedkv"})


def _draw_line(
    axis: Any, line: list[Mapping[str, Any]], full: float, colour: str, *, ratio: bool
) -> None:
    line = sorted(line, key=lambda cell: cell["kv_bytes"])
    bounds = [[cell["vs_full"][end] for cell in line] for end in ("low", "high")]
    low, high = ([full * x if ratio else full + x for x in ends] for ends in bounds)
    below = [max(0.0, cell["value"] - x) for cell, x in zip(line, low, strict=True)]
    above = [max(0.0, x - cell["value"]) for cell, x in zip(line, high, strict=True)]
    style, marker = STYLES[line[0]["granularity"]]
    axis.errorbar(
        [cell["kv_bytes"] / 2**20 for cell in line],
        [cell["value"] for cell in line],
        yerr=[below, above], color=colour, linestyle=style, marker=marker, markersize=5,
        linewidth=1.5, elinewidth=0.9, capsize=2.5, zorder=2,
        label=textwrap.fill(f"{line[0]['eviction']}, by {line[0]['granularity']}", 30),
    )  # fmt: skip


def _label(figure: Figure, axis: Any, result: Mapping[str, Any]) -> None:
    count, text = len(result["passages"]), result["text"]["name"]
    tokens = max(each["num_tokens"] for each in result["passages"])
    axis.set_title(
        f"{result['task']}: {result['model']}, {count} x {tokens:,} tokens of {text}, "
        f"seed {result['seed']}",
        fontsize=10, color=INK, loc="left",
    )  # fmt: skip
    axis.set_xlabel("MiB of keys and values that a sequence held at most", color=INK)
    axis.set_ylabel(MEANING[result["metric"]], color=INK)
    if result["metric"] == "perplexity":
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(_ticks(result))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(color="#e5e7eb", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def _ticks(result: Mapping[str, Any]) -> Any:
    """Return round numbers for a logarithmic axis, whether it spans decades or a part of one."""
    values = [cell["value"] for cell in result["cells"]]
    return LogLocator(subs=(1, 2, 5)) if max(values) > 5 * min(values) else MaxNLocator(6)
