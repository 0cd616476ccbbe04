"""A picture of a `Timeline` that explains itself: who held which block when."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pagedkv.cli.dashboard import USER_COLOURS
from pagedkv.cli.lessons import Lesson, find_lessons, widest_spot
from pagedkv.files import replacing
from pagedkv.timeline import CACHED, FREE, SHARED, Timeline

__all__ = ["draw_timeline"]

SHARED_COLOUR, CACHED_COLOUR, FREE_COLOUR = "#2b2d42", "#d9dce1", "#ffffff"
ALARM, WAIT = "#d62728", "#9aa1ac"
INK, FAINT = "#1f2430", "#6b7280"
CAPTIONS = (
    "The pool: numbers in the colours are users",
    "The users: a bar runs, a thin grey line waits, a red line waits because it was preempted",
    "Blocks in use: dark shared, blue held by one user, grey free but cached",
    "Sequences: green runs, orange waits",
)
SIZE = (15.0, 10.6)
DPI = 110


@dataclass(frozen=True)
class Users:
    """The requests of a timeline in order of arrival.

    Attributes:
        names: [U] Request ids.
        arrivals: [U] The step before which each came.
        index_of: Sequence id to place in `names`.
        line_of: Sequence id to its line in the users' panel.
    """

    names: list[str]
    arrivals: list[int]
    index_of: dict[int, int]
    line_of: dict[int, int]


def draw_timeline(
    timeline: Timeline,
    path: Path,
    *,
    title: str,
    block_size: int,
    arrivals: Mapping[str, int] | None = None,
) -> None:
    """Write a PNG with the pool's blocks, every request's life and the load, over the steps.

    Args:
        title: One line above the picture.
        block_size: Tokens in a block, for the captions.
        arrivals: Request id to the step before which it was added; the first step it ran if
            omitted.

    Raises:
        ConfigError: The file cannot be written.
    """
    users = _users(timeline, arrivals or {})
    lessons = find_lessons(timeline, users.index_of, users.line_of, block_size)
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(
        4, 1, height_ratios=(5.2, 3.4, 1.2, 1.0), left=0.05, right=0.755, top=0.875, bottom=0.05,
        hspace=0.2,
    )  # fmt: skip
    axes = [figure.add_subplot(grid[i]) for i in range(4)]
    _draw_blocks(axes[0], timeline, users)
    _draw_users(axes[1], timeline, users)
    _draw_pool(axes[2], timeline)
    _draw_load(axes[3], timeline)
    _share_steps(axes, len(timeline.owner))
    _draw_heading(figure, timeline, title, block_size, len(users.names))
    _draw_lessons(figure, axes, lessons)
    with replacing(path, binary=True) as out:
        figure.savefig(out, format="png", metadata={"Software": "pagedkv"})


def _users(timeline: Timeline, arrivals: Mapping[str, int]) -> Users:
    first = {timeline.request_of[span.seq_id]: span.begin for span in reversed(timeline.spans)}
    came = {name: arrivals.get(name, begin) for name, begin in first.items()}
    names = sorted(came, key=lambda name: (came[name], first[name]))
    place = {name: i for i, name in enumerate(names)}
    index_of = {seq_id: place[name] for seq_id, name in timeline.request_of.items()}
    lines = sorted(index_of, key=lambda seq_id: (index_of[seq_id], seq_id))
    line_of = {seq_id: line for line, seq_id in enumerate(lines)}
    return Users(names, [came[name] for name in names], index_of, line_of)


def _colour(user: int) -> str:
    return USER_COLOURS[user % len(USER_COLOURS)]


def _readable_on(colour: str) -> str:
    red, green, blue = to_rgb(colour)
    return INK if 0.30 * red + 0.59 * green + 0.11 * blue > 0.6 else "white"


# Panels


def _draw_blocks(axis: Any, timeline: Timeline, users: Users) -> None:
    """The map: one row per block, one column per step."""
    places = user_map(timeline, users.index_of)
    special = {FREE: FREE_COLOUR, CACHED: CACHED_COLOUR, SHARED: SHARED_COLOUR}
    palette = np.zeros((len(users.names) + len(special), 3))
    for code, colour in special.items():
        palette[code] = to_rgb(colour)  # negative codes index from the end
    for user in range(len(users.names)):
        palette[user] = to_rgb(_colour(user))
    steps, blocks = places.shape
    axis.imshow(
        palette[places.T],
        aspect="auto",
        interpolation="nearest",
        extent=(0, steps, blocks - 0.5, -0.5),
    )
    for user in range(len(users.names)):
        spot = widest_spot(places == user, steps / 60, max(2.0, blocks / 60))
        if spot is not None:
            axis.text(*spot, str(user + 1), color=_readable_on(_colour(user)), fontsize=7,
                      weight="bold", ha="center", va="center")  # fmt: skip
    preempted = [span.end for span in timeline.spans if span.preempted]
    axis.plot(preempted, np.full(len(preempted), -0.5 - blocks * 0.017), "v", color=ALARM,
              markersize=6, clip_on=False)  # fmt: skip
    axis.set_ylabel("block of KV memory", color=INK)
    axis.set_ylim(blocks - 0.5, -0.5)


def user_map(timeline: Timeline, index_of: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """Return the timeline's owners with each sequence replaced by its user's place: [S, N]."""
    lookup = np.full(max(index_of) + 1, FREE, np.int64)
    for seq_id, user in index_of.items():
        lookup[seq_id] = user
    return np.where(timeline.owner >= 0, lookup[np.maximum(timeline.owner, 0)], timeline.owner)


def _draw_users(axis: Any, timeline: Timeline, users: Users) -> None:
    """One line per sequence: thin while it waits, thick while it runs."""
    waits: list[tuple[int, int, int, str]] = []
    since: dict[int, int] = {}
    for span in timeline.spans:
        born = users.arrivals[users.index_of[span.seq_id]]
        if _is_fork(span.seq_id, users):
            born = span.begin
        colour = ALARM if span.seq_id in since else WAIT
        begin = since.get(span.seq_id, born)
        waits.append((users.line_of[span.seq_id], begin, span.begin, colour))
        since[span.seq_id] = span.end
    axis.hlines(*zip(*waits, strict=True), linewidth=1)
    lines = [users.line_of[span.seq_id] for span in timeline.spans]
    axis.hlines(
        lines,
        [span.begin for span in timeline.spans],
        [span.end for span in timeline.spans],
        [_colour(users.index_of[span.seq_id]) for span in timeline.spans],
        linewidth=0.8 * 72 * axis.bbox.height / DPI / (len(users.line_of) + 0.2),
    )
    marks = [(s.end, line) for s, line in zip(timeline.spans, lines, strict=True) if s.preempted]
    if marks:
        axis.plot(*zip(*marks, strict=True), "v", color=ALARM, markersize=4.5)
    _name_lines(axis, users)


def _name_lines(axis: Any, users: Users) -> None:
    """Number the users beside the middle of their lines, as many as there is room for."""
    middles = [
        np.mean([line for seq_id, line in users.line_of.items() if users.index_of[seq_id] == user])
        for user in range(len(users.names))
    ]
    stride = -(-len(middles) // 40)
    labels = [str(user + 1) for user in range(len(middles))]
    axis.set_yticks(middles[::stride], labels[::stride])
    axis.tick_params(axis="y", labelsize=max(5, min(8, 200 / len(middles))), length=0)
    axis.set_ylim(len(users.line_of) - 0.4, -0.6)
    axis.set_ylabel("user by arrival", color=INK)


def _is_fork(seq_id: int, users: Users) -> bool:
    return any(s < seq_id and user == users.index_of[seq_id] for s, user in users.index_of.items())


def _draw_pool(axis: Any, timeline: Timeline) -> None:
    """What the blocks were used for, and what the same users would hold without sharing."""
    steps, blocks = timeline.owner.shape
    alone = timeline.num_held - timeline.num_shared
    edges = np.arange(steps + 1)
    layers = (timeline.num_shared, alone, timeline.num_cached)
    floor = np.zeros(steps + 1)
    for layer, colour in zip(layers, (SHARED_COLOUR, "#8fb3d9", CACHED_COLOUR), strict=True):
        top = floor + np.append(layer, layer[-1])
        axis.fill_between(edges, floor, top, step="post", color=colour, linewidth=0)
        floor = top
    entries = np.append(timeline.num_entries, timeline.num_entries[-1])
    axis.step(edges, entries, where="post", color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    axis.axhline(blocks, color=ALARM, linewidth=0.9)
    axis.set_ylim(0, max(blocks, int(entries.max())) * 1.08)
    axis.set_ylabel("blocks", color=INK)


def _draw_load(axis: Any, timeline: Timeline) -> None:
    """How many run and how many wait."""
    edges = np.arange(len(timeline.owner) + 1)
    running = np.append(timeline.num_running, timeline.num_running[-1])
    waiting = np.append(timeline.num_waiting, timeline.num_waiting[-1])
    axis.fill_between(edges, 0, running, step="post", color="#59a14f", linewidth=0)
    axis.fill_between(edges, running, running + waiting, step="post", color="#f2c6a0", linewidth=0)
    axis.set_ylabel("sequences", color=INK)
    axis.set_ylim(0, None)
    axis.set_xlabel("step of the engine (one step computes one token for each that runs)")


def _share_steps(axes: list[Any], steps: int) -> None:
    for axis in axes:
        axis.set_xlim(0, steps)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color("#c3c7ce")
        axis.tick_params(colors=FAINT)
    for axis, words in zip(axes, CAPTIONS, strict=True):
        axis.set_title(words, loc="left", fontsize=9.5, color=FAINT, pad=5)
    axes[0].set_title(CAPTIONS[0], loc="left", fontsize=9.5, color=FAINT, pad=12)
    for axis in axes[:-1]:
        axis.tick_params(axis="x", labelbottom=False)


# Words


def _draw_heading(
    figure: Any, timeline: Timeline, title: str, block_size: int, num_users: int
) -> None:
    blocks = timeline.owner.shape[1]
    figure.text(0.05, 0.965, title, fontsize=16, weight="bold", color=INK)
    figure.text(
        0.05,
        0.942,
        f"{num_users} users share {blocks} blocks, each with room for {block_size} tokens. In the "
        "big panel a row is one block, a column one step; the colour says whose tokens lie in it.",
        fontsize=10.5,
        color=FAINT,
    )
    patches = [
        Patch(facecolor=USER_COLOURS[0], label="held by one user (a colour each)"),
        Patch(facecolor=SHARED_COLOUR, label="shared by several"),
        Patch(facecolor=CACHED_COLOUR, label="free, content kept (cached)"),
        Patch(facecolor=FREE_COLOUR, edgecolor="#c3c7ce", label="free, empty"),
    ]
    legend = figure.legend(
        handles=[*patches, _preemption_mark()], loc="upper left", bbox_to_anchor=(0.043, 0.937),
        ncols=5, frameon=False, fontsize=9.5, handlelength=1.3, columnspacing=1.6,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(INK)


def _preemption_mark() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="v", color=ALARM, linestyle="", label="a user is preempted")


def _draw_lessons(figure: Any, axes: list[Any], lessons: list[Lesson]) -> None:
    """Write the numbered notes beside the panels and their numbers into them."""
    top = 0.875
    figure.text(0.775, top + 0.02, "How to read it", fontsize=12.5, weight="bold", color=INK)
    ring = {"boxstyle": "circle,pad=0.22", "facecolor": "white", "edgecolor": INK, "linewidth": 1.1}
    for number, lesson in enumerate(lessons, 1):
        body = textwrap.wrap(lesson.text, 44)
        figure.text(0.782, top - 0.012, str(number), fontsize=8.5, weight="bold", ha="center",
                    va="center", bbox=ring, color=INK)  # fmt: skip
        figure.text(0.796, top - 0.018, lesson.heading, fontsize=10, weight="bold", color=INK)
        figure.text(0.796, top - 0.026, "\n".join(body), fontsize=8.8, va="top", color=INK,
                    linespacing=1.35)  # fmt: skip
        top -= 0.046 + 0.0172 * len(body)
        if lesson.panel is not None:
            axes[lesson.panel].text(lesson.step, lesson.level, str(number), fontsize=8.5,
                                    weight="bold", ha="center", va="center", bbox=ring,
                                    color=INK, clip_on=False, zorder=5)  # fmt: skip
