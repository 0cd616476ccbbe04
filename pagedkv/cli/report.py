"""What a benchmark shows on a terminal: a line while it runs, a table when it is done."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pagedkv.core.plan import StepOutput, StepPlan, StepResult

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM

__all__ = ["RunProgress", "show", "table"]

# Seconds between two drawings: often enough to look alive, too seldom to be measured.
_REFRESH = 0.5


class RunProgress:
    """Watches an `LLM` while in a ``with`` block and draws a bar on standard error.

    Attributes:
        peak_usage: The largest fraction of the pool that sequences held.
        computed_tokens: Tokens run through the model.

    Args:
        total: How many sequences will finish.
    """

    def __init__(self, llm: "LLM", total: int) -> None:
        self._llm = llm
        self.peak_usage = 0.0
        self.computed_tokens = 0
        self._drawn = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("serving", total=total, note="")

    def __enter__(self) -> "RunProgress":
        self._start = time.perf_counter()
        self._progress.start()
        self._llm.engine.observers.append(self._observe)
        return self

    def __exit__(self, *fault: object) -> None:
        self._llm.engine.observers.remove(self._observe)
        self._progress.stop()

    def _observe(self, plan: StepPlan, result: StepResult, output: StepOutput) -> None:
        pool = self._llm.scheduler.manager.pool
        self.peak_usage = max(self.peak_usage, pool.num_held / pool.num_blocks)
        self.computed_tokens += plan.num_tokens
        if output.finished:
            self._progress.advance(self._task, len(output.finished))
        now = time.perf_counter()
        if now - self._drawn > _REFRESH:
            self._drawn = now
            self._progress.update(self._task, note=self._note(now))
            self._progress.refresh()

    def _note(self, now: float) -> str:
        stats = self._llm.scheduler.stats()
        rate = self.computed_tokens / (now - self._start)
        return (
            f"{rate:,.0f} tok/s  {stats.num_running} running  {stats.num_waiting} waiting  "
            f"KV {stats.kv_cache_usage:.0%}"
        )


def show(result: Mapping[str, Any], title: str, *, to_stderr: bool = False) -> None:
    """Print a result as a table."""
    console = Console(stderr=to_stderr, highlight=False)
    console.print(f"[bold]{title}[/]", table(result), sep="\n")


def table(result: Mapping[str, Any]) -> Table:
    """Return a result as a table: what, how much, of what."""
    drawn = Table(box=SIMPLE, show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(justify="right", no_wrap=True)
    drawn.add_column(style="dim")
    rows = _throughput_rows if "elapsed_time" in result else _latency_rows
    for row in rows(result):
        drawn.add_row(*row)
    return drawn


def _throughput_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    blocks = result["config"]["cache"]["num_blocks"]
    steps = result["num_steps"]
    return [
        ("output tokens/s", f"{result['output_tokens_per_second']:,.1f}", ""),
        ("total tokens/s", f"{result['tokens_per_second']:,.1f}", "prompt and output"),
        ("requests/s", f"{result['requests_per_second']:,.2f}", ""),
        ("elapsed", f"{result['elapsed_time']:,.2f} s", ""),
        (
            "tokens",
            f"{result['total_num_tokens']:,}",
            f"{result['total_input_tokens']:,} in, {result['total_output_tokens']:,} out",
        ),
        (
            "prefix hit rate",
            f"{result['prefix_cache_hit_rate']:.1%}",
            f"{result['prompt_tokens_cached']:,} of {result['prompt_tokens']:,} prompt tokens",
        ),
        (
            "preemptions",
            f"{result['num_preemptions']:,}",
            f"{result['recomputed_tokens']:,} tokens computed again",
        ),
        (
            "steps",
            f"{steps:,}",
            f"{result['computed_tokens'] / max(1, steps):,.1f} tokens computed in each",
        ),
        (
            "evicted tokens",
            f"{result['evicted_tokens']:,.0f}",
            f"policy {result['config']['cache']['eviction']}",
        ),
        (
            "bytes moved",
            f"{result['bytes_moved']:,}",
            f"{result['tokens_moved']:,} tokens repacked by compaction",
        ),
        ("peak KV use", f"{result['peak_kv_cache_usage']:.1%}", f"of {blocks:,} blocks"),
        ("failed", f"{result['failed']:,}", "sequences"),
    ]


def _latency_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = [
        ("mean", f"{result['avg_latency']:.3f} s", f"of {len(result['latencies'])} runs"),
        ("deviation", f"{result['std_latency']:.3f} s", ""),
    ]
    rows += [
        (f"{percentage} % take at most", f"{seconds:.3f} s", "")
        for percentage, seconds in result["percentiles"].items()
    ]
    return rows
