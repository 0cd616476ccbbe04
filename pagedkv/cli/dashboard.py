"""Live progress of the demo: a coloured panel on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TextIO

from msgspec import Struct

from pagedkv import SchedulerStats
from pagedkv.core.arrays import Int32
from pagedkv.timeline import CACHED, FREE, SHARED

__all__ = ["USER_COLOURS", "Dashboard", "PlainDashboard", "Progress", "RichDashboard", "dashboard"]

# Neighbours in the list differ in hue and lightness; red is kept for preemptions.
USER_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2",
    "#9c755f", "#ff9da7", "#6b8fd6", "#a3c93a", "#d4a6c8", "#ffbe7d",
)  # fmt: skip
WIDTH = 96


class Progress(Struct, frozen=True, kw_only=True):
    """What there is to show after a step.

    Attributes:
        owner: [blocks] The place of the user who holds each block, or `FREE`, `CACHED`, `SHARED`.
        num_done: Users who have their answers.
        num_users: Users in all.
        latest: The newest answer, on one line.
    """

    stats: SchedulerStats
    owner: Int32
    num_done: int
    num_users: int
    elapsed: float
    latest: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, over the whole run so far."""
        return self.stats.generation_tokens / max(self.elapsed, 1e-9)


class Dashboard(Protocol):
    """Shows progress while it is entered."""

    def __enter__(self) -> "Dashboard": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, progress: Progress) -> None:
        """Show the state after a step; cheap to call at every one."""
        ...


def dashboard(stream: TextIO | None = None) -> Dashboard:
    """Return a `RichDashboard` if the stream is a terminal and rich is there, else plain lines."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return PlainDashboard(stream)
    try:
        return RichDashboard()
    except ModuleNotFoundError:
        return PlainDashboard(stream)


class PlainDashboard:
    """Writes a line at the first step, now and then (ever more rarely), and at the end."""

    def __init__(
        self, stream: TextIO, every: float = 3.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._every = every
        self._clock = clock
        self._due = -float("inf")
        self._last: Progress | None = None

    def __enter__(self) -> "PlainDashboard":
        return self

    def __exit__(self, *fault: object) -> None:
        if self._last is not None:
            self._write(self._last)

    def update(self, progress: Progress) -> None:
        """Write a line if the last one is old enough."""
        self._last = progress
        now = self._clock()
        if now >= self._due:
            self._due = now + max(self._every, 0.1 * progress.elapsed)
            self._write(progress)

    def _write(self, progress: Progress) -> None:
        self._last = None
        stats = progress.stats
        print(
            f"step {stats.num_steps:4d}  run {stats.num_running:2d}  wait {stats.num_waiting:2d}  "
            f"done {progress.num_done:2d}/{progress.num_users}  "
            f"blocks {stats.blocks_held:3d} held {stats.blocks_cached:3d} cached "
            f"{stats.blocks_free:3d} free  {progress.tokens_per_second:5.1f} tok/s  "
            f"{stats.num_preemptions} preempted",
            file=self._stream,
            flush=True,
        )


class RichDashboard:
    """A panel that is redrawn in place, with every block of the pool as a coloured cell."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console()
        self._width = min(WIDTH + 4, self._console.width)
        self._live = Live(console=self._console, refresh_per_second=8)

    def __enter__(self) -> "RichDashboard":
        self._live.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._live.stop()

    def update(self, progress: Progress) -> None:
        """Show the state; the terminal is written to at most eight times a second."""
        self._live.update(self._panel(progress))

    def _panel(self, progress: Progress) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        stats = progress.stats
        cells = Text(overflow="fold", no_wrap=False)
        for owner in progress.owner.tolist():
            cells.append(*_cell(owner))
        shared, cached, free = (int((progress.owner == x).sum()) for x in (SHARED, CACHED, FREE))
        held = len(progress.owner) - cached - free
        hits = stats.prompt_tokens_cached / max(stats.prompt_tokens, 1)
        blocks = (
            f"blocks  {held} held, {shared} of them ",
            ("█ shared", "bold"),
            f"   {cached} ",
            ("▒ cached", "grey50"),
            f"   {free} · free",
        )
        users = (
            "users   ",
            (f"{stats.num_running} running", "green"),
            "   ",
            (f"{stats.num_waiting} waiting", "yellow"),
            f"   {progress.num_done} of {progress.num_users} done",
        )
        so_far = (
            f"so far  {progress.tokens_per_second:.0f} tokens/s   step {stats.num_steps}   "
            f"{progress.elapsed:.0f} s   ",
            (f"{stats.num_preemptions} preemptions", "red" if stats.num_preemptions else ""),
            f"   {hits:.0%} of prompts found cached",
        )
        lines = [Text.assemble(*parts) for parts in (blocks, users, so_far)]
        latest = Text(progress.latest, style="italic", no_wrap=True, overflow="ellipsis")
        return Panel(
            Group(cells, Text(), *lines, latest),
            title=f"{progress.num_users} users, one pool of {len(progress.owner)} blocks: "
            "a cell is a block, its colour the user",
            title_align="left",
            width=self._width,
        )


def _cell(owner: int) -> tuple[str, str]:
    """The character and the style of one block."""
    if owner == FREE:
        return "·", "grey50"
    if owner == CACHED:
        return "▒", "grey50"
    if owner == SHARED:
        return "█", "default"
    return "█", USER_COLOURS[owner % len(USER_COLOURS)]
