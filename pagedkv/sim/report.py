"""Reports: one HTML file to read in a browser."""

import html
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.files import replacing
from pagedkv.sim.result import SimResult

__all__ = ["cdf_table", "frontier", "write_report"]

Run = dict[str, Any]
_SHOWN = ("ttft", "tpot", "itl", "e2el")
_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
_MOST_LINES = 8
_COLORS = ("#3b6ea5", "#d1793a", "#4f9a55", "#b5484b", "#7d64a8", "#8a6f5a", "#c36aa8", "#7a7a7a")
_ROWS = (
    ("completed", "requests served", "{:,.0f}"),
    ("failed", "failed", "{:,.0f}"),
    ("duration", "duration, s", "{:,.1f}"),
    ("request_throughput", "requests/s", "{:,.2f}"),
    ("output_throughput", "output tokens/s", "{:,.0f}"),
    ("good_fraction", "good requests", "{:.1%}"),
    ("median_ttft_ms", "TTFT median, ms", "{:,.0f}"),
    ("p99_ttft_ms", "TTFT p99, ms", "{:,.0f}"),
    ("median_tpot_ms", "TPOT median, ms", "{:,.1f}"),
    ("p99_itl_ms", "ITL p99, ms", "{:,.1f}"),
    ("prefix_cache_hit_rate", "prefix hits, tokens", "{:.1%}"),
    ("mean_kv_cache_usage", "KV held, mean", "{:.1%}"),
    ("internal_fragmentation", "empty slots in held blocks", "{:.2%}"),
    ("num_preemptions", "preemptions", "{:,.0f}"),
    ("recomputed_tokens", "recomputed tokens", "{:,.0f}"),
    ("jain_index_speed", "Jain index of speed", "{:.3f}"),
)
_MEANS = (
    "Means are over time, from the first arrival to the last end, idle time included; what several "
    "replicas hold adds up."
)
_RUNGS = (
    ("reclaimed", "under pressure: blocks reclaimed"),
    ("shrunk", "blocks taken from elastic sequences"),
    ("swapped", "sequences swapped"),
    ("recomputed", "sequences recomputed"),
    ("failed", "sequences failed"),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p.note { color: #666; margin: .2rem 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th { font-weight: 600 } td:first-child, th:first-child { text-align: left; color: #444 }
svg { max-width: 100%; height: auto } .wide { overflow-x: auto }
"""


def cdf_table(result: SimResult, points: int = 200) -> dict[str, list[float]]:
    """Return each latency's quantiles in milliseconds at ``points`` even steps: none of nothing."""
    percents = np.linspace(0, 100, points)
    known = {name: result.latency[name] for name in _SHOWN}
    return {
        name: (each.percentile(percents) * 1000).tolist() if each.count else []
        for name, each in known.items()
    }


def label_of(run: Run) -> str:
    """Return what tells a run from the others."""
    varied = run["varied"]
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in varied.items())


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write an HTML file with every plot inside it; needs matplotlib.

    Args:
        runs: As `pagedkv simulate` makes them.

    Raises:
        ConfigError: The file cannot be written; what was there is as it was.
    """
    shown = list(runs[:_MOST_LINES])
    parts = [_head(runs)]
    if len(runs) > 1:
        parts += [
            "<h2>Comparison</h2>",
            _svg(lambda figure: _compare(figure, runs), 10.5, 3.4),
            "<h2>Throughput against latency</h2>",
            '<p class="note">Every run; the line joins those that no other run beats in both.</p>',
            _svg(lambda figure: _pareto(figure, runs), 10.5, 4.0),
        ]
    parts += [
        "<h2>Block occupancy over time</h2>",
        f'<p class="note">{_MEANS}</p>',
        _svg(lambda figure: _occupancy(figure, shown), 10.5, 2.6 * min(len(shown), 3)),
        "<h2>Queue and batch over time</h2>",
        _svg(lambda figure: _load(figure, shown), 10.5, 3.0),
        "<h2>Latencies, cumulated</h2>",
        _svg(lambda figure: _cdfs(figure, shown), 10.5, 5.6),
    ]
    if any(len(run["tenants"]) > 1 for run in shown):
        parts += ["<h2>Tenants</h2>", _svg(lambda f: _tenants(f, shown[0]), 10.5, 5.6)]
        if len(shown) > 1:
            parts.append(f'<p class="note">Of the run {html.escape(label_of(shown[0]))}.</p>')
    parts += ["<h2>Numbers</h2>", _table(runs)]
    if len(runs) > _MOST_LINES:
        parts.append(f'<p class="note">Plots over time show the first {_MOST_LINES} runs.</p>')
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pagedkv simulation</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    with replacing(path) as out:
        out.write(page)


def _head(runs: Sequence[Run]) -> str:
    first = runs[0]
    cache = first["config"]["cache"]
    facts = [
        f"{first['workload']} on {first['hardware']}",
        f"blocks of {cache['block_size']} tokens",
        f"{first['summary']['num_blocks']:,} blocks",
        f"seed {first['seed']}",
    ]
    if len(runs) > 1:
        facts = [facts[0], f"{len(runs)} runs"]
    note = ""
    if any(run["summary"]["synthetic_scores"] for run in runs):
        note = (
            '<p class="note"><b>Attention scores are made up:</b> no model ran, so what eviction '
            "policies judged by is a declared random process, not attention.</p>"
        )
    return f"<h1>pagedkv simulation</h1><p class='note'>{html.escape(' · '.join(facts))}</p>{note}"


def _table(runs: Sequence[Run]) -> str:
    heads = "".join(f"<th>{html.escape(label_of(run)) or 'value'}</th>" for run in runs)
    lines = [f"<tr><th></th>{heads}</tr>"]
    for key, title, form in _ROWS:
        values = [run["summary"][key] for run in runs]
        cells = "".join(f"<td>{'-' if v is None else form.format(v)}</td>" for v in values)
        lines.append(f"<tr><td>{title}</td>{cells}</tr>")
    for key, title in _RUNGS:
        cells = "".join(f"<td>{run['summary']['rungs'][key]:,}</td>" for run in runs)
        lines.append(f"<tr><td>{title}</td>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


# Plots


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    from matplotlib import rc_context  # the plot extra
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    text = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "pagedkv"}):
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names may be in any script
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def _label(run: Run) -> str:
    return _literal(label_of(run))


def _literal(text: str) -> str:
    """Return a text such that no dollar in it begins a formula."""
    return text.replace("$", r"\$")


def _occupancy(figure: Any, runs: Sequence[Run]) -> None:
    shown = runs[:3]
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axes, run in zip(panels, shown, strict=True):
        table, total = run["occupancy"], run["summary"]["num_blocks"]
        time = np.array(table["time"])
        held, cached = np.array(table["held"]), np.array(table["cached"])
        axes.stackplot(
            time,
            held,
            cached,
            np.maximum(total - held - cached, 0),
            labels=("held by sequences", "cached, free", "blank"),
            colors=("#3b6ea5", "#a8c4e0", "#efefef"),
        )
        axes.set_ylim(0, total)
        axes.set_ylabel("blocks")
        if label := _label(run):
            axes.set_title(label, fontsize=10, loc="left")
    times = [time for run in shown for time in run["occupancy"]["time"]] or [0.0]
    panels[-1].set_xlim(min(times), max(max(times), min(times) + 1e-9))
    panels[-1].set_xlabel("virtual time, s")
    _legend(figure, panels[0])


def _load(figure: Any, runs: Sequence[Run]) -> None:
    left, right = figure.subplots(1, 2)
    for color, run in zip(_COLORS, runs, strict=False):
        table = run["occupancy"]
        for axes, name in ((left, "running"), (right, "waiting")):
            axes.plot(table["time"], table[name], color=color, lw=1.1, label=_label(run))
    for axes, title in ((left, "sequences running"), (right, "requests waiting")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("virtual time, s")
        axes.set_ylim(bottom=0)
    if len(runs) > 1:
        _legend(figure, left)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _cdfs(figure: Any, runs: Sequence[Run]) -> None:
    panels = figure.subplots(2, 2)
    for axes, name in zip(panels.flat, _SHOWN, strict=True):
        for color, run in zip(_COLORS, runs, strict=False):
            values = np.array(run["cdf"][name])
            axes.plot(values, np.linspace(0, 100, len(values)), color=color, label=_label(run))
        values = np.concatenate([run["cdf"][name] for run in runs])
        if values.size and values.min() > 0 and values.max() > 20 * values.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.4g}")
            axes.xaxis.set_minor_formatter("")
        axes.set_title(_TITLES[name], fontsize=10, loc="left")
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("% of " + ("tokens" if name == "itl" else "requests"))
        axes.grid(alpha=0.25)
    if len(runs) > 1:
        _legend(figure, panels[0, 0])


def _tenants(figure: Any, run: Run) -> None:
    found = sorted(run["tenants"].items(), key=lambda pair: -pair[1]["requests"])[:16]
    names = [_literal(name or "(none)") for name, _ in found]
    rows = [row for _, row in found]
    panels = figure.subplots(2, 3, sharey=True)
    at = np.arange(len(names))[::-1]
    for axes, (key, title, scale) in zip(
        panels.flat,
        (
            ("requests", "requests served", 1),
            ("mean_ttft_ms", "mean TTFT, ms", 1),
            ("prefix_cache_hit_rate", "prefix hits, % of tokens", 100),
            ("mean_blocks_held", "blocks held, mean", 1),
            ("evictions_caused_to_others", "blocks it took from others", 1),
            ("evictions_suffered_from_others", "blocks others took from it", 1),
        ),
        strict=True,
    ):
        axes.barh(at, [_measured(row[key]) * scale for row in rows], color=_COLORS[0], height=0.7)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(at, names, fontsize=8)


def _compare(figure: Any, runs: Sequence[Run]) -> None:
    panels = figure.subplots(1, 4)
    labels = [_label(run) for run in runs]
    at = np.arange(len(runs))[::-1]
    for axes, (key, title, scale) in zip(
        panels,
        (
            ("prefix_cache_hit_rate", "prefix hits, %", 100),
            ("median_ttft_ms", "TTFT median, ms", 1),
            ("p99_ttft_ms", "TTFT p99, ms", 1),
            ("output_throughput", "output tokens/s", 1),
        ),
        strict=True,
    ):
        values = [run["summary"][key] for run in runs]
        texts = ["-" if value is None else f"{value * scale:,.4g}" for value in values]
        bars = axes.barh(at, [_measured(v) * scale for v in values], color=_COLORS[0], height=0.7)
        axes.bar_label(bars, texts, fontsize=8, padding=2)
        axes.set_xlim(0, max([*(_measured(v) * scale for v in values), 1e-9]) * 1.3)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(at, labels if axes is panels[0] else [""] * len(runs), fontsize=8)


def _measured(value: float | None) -> float:
    """Return the length of a value's bar: none if nothing was measured."""
    return value or 0.0


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (more is better, less is better) points no other point beats in both."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    best, least = [], float("inf")
    for i in order:
        if points[i][1] < least:
            best.append(i)
            least = points[i][1]
    return best


def _pareto(figure: Any, runs: Sequence[Run]) -> None:
    axes = figure.subplots()
    runs = [run for run in runs if run["summary"]["completed"]]
    points = [(r["summary"]["output_throughput"], r["summary"]["p99_ttft_ms"]) for r in runs]
    best = frontier(points)
    line = sorted(points[i] for i in best)
    axes.plot(
        [x for x, _ in line], [y for _, y in line], color="#999999", lw=1.2, drawstyle="steps-post"
    )
    if len(runs) <= _MOST_LINES:
        for color, point, run in zip(_COLORS, points, runs, strict=False):
            axes.scatter(*point, color=color, zorder=3, label=_label(run))
        if runs:
            _legend(figure, axes)
    else:  # more than there are colours for: those on the line have names
        axes.scatter(*zip(*points, strict=True), color=_COLORS[0], zorder=3)
        for i in best:
            name = _label(runs[i])
            axes.annotate(name, points[i], fontsize=8, xytext=(5, 4), textcoords="offset points")
    axes.set_xlabel("output tokens/s (more is better)")
    axes.set_ylabel("TTFT p99, ms (less is better)")
    axes.margins(x=0.15, y=0.15)
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=0.25)
