"""What a timeline can teach: places in it worth a note, each found by looking."""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Bool
from pagedkv.timeline import CACHED, SHARED, Span, Timeline

__all__ = ["BLOCKS", "LOAD", "POOL", "USERS", "Lesson", "find_lessons", "widest_spot"]

BLOCKS, USERS, POOL, LOAD = range(4)
"""The panels of the picture, from top to bottom."""


class Lesson(Struct, frozen=True, kw_only=True):
    """A note, and the spot it is about.

    Attributes:
        panel: The panel to mark; None marks none.
        step: Where, along the steps.
        level: Where, in the panel's own vertical unit.
    """

    heading: str
    text: str
    panel: int | None = None
    step: float = 0.0
    level: float = 0.0


def find_lessons(
    timeline: Timeline, index_of: Mapping[int, int], line_of: Mapping[int, int], block_size: int
) -> list[Lesson]:
    """Return the notes that this timeline has examples for, in reading order.

    Args:
        index_of: Sequence id to its user, counted from 0; the notes count from 1.
        line_of: Sequence id to its line in the users' panel.
        block_size: Tokens in a block.
    """
    found = [
        _sharing(timeline, block_size),
        _paging(timeline, index_of),
        _caching(timeline),
        _preemption(timeline, index_of, line_of),
        _forking(timeline, index_of, line_of),
        _saving(timeline),
        _waiting(timeline),
    ]
    return [lesson for lesson in found if lesson is not None]


def _sharing(timeline: Timeline, block_size: int) -> Lesson | None:
    shared = timeline.owner == SHARED
    # What stays shared longest is what all prompts begin with, even if larger parts come and go.
    longest = max(_longest_true(column)[1] for column in shared.T)
    spot = widest_spot(shared, min_steps=longest)
    if spot is None:
        return None
    most = int(timeline.num_shared.max())
    return Lesson(
        heading="One copy for all who begin alike",
        text="Dark blocks are read by several users at once, mostly the instructions that every "
        f"prompt begins with. They are computed once. At most {most} blocks ({most * block_size} "
        "tokens) were shared at a time.",
        panel=BLOCKS,
        step=spot[0],
        level=spot[1],
    )


def _paging(timeline: Timeline, index_of: Mapping[int, int]) -> Lesson | None:
    """Find the sequence that held the most separate pieces of the pool at once."""
    owner = timeline.owner
    begins = owner != np.roll(owner, 1, axis=1)
    begins[:, 0] = True
    steps, blocks = np.nonzero(begins & (owner >= 0))
    pieces, counts = np.unique(np.stack([steps, owner[steps, blocks]]), axis=1, return_counts=True)
    if not len(counts) or counts.max() < 3:
        return None
    seq_id = int(pieces[1, np.argmax(counts)])
    at = pieces[0, (pieces[1] == seq_id) & (counts == counts.max())]
    step = int(at[len(at) // 2])
    mine = np.flatnonzero(owner[step] == seq_id)
    return Lesson(
        heading="Any free block will do",
        text=f"A user's blocks need not be neighbours; a table lists them in order. At step {step} "
        f"user {index_of[seq_id] + 1} has {len(mine)} blocks in {counts.max()} places. So no gap "
        "is ever too small to use.",
        panel=BLOCKS,
        step=float(step),
        level=float(mine[len(mine) // 2]),
    )


def _caching(timeline: Timeline) -> Lesson | None:
    spot = widest_spot(timeline.owner == CACHED)
    if spot is None:
        return None
    return Lesson(
        heading="Free, but not forgotten",
        text="When a user is done its blocks turn grey: anyone may take them, but until then "
        "a prompt that begins with the same tokens finds them and skips that work.",
        panel=BLOCKS,
        step=spot[0],
        level=spot[1],
    )


def _preemption(
    timeline: Timeline, index_of: Mapping[int, int], line_of: Mapping[int, int]
) -> Lesson | None:
    pairs = [(span, _next_span(timeline, span)) for span in timeline.spans if span.preempted]
    returns = [(back.begin - span.end, span, back) for span, back in pairs if back is not None]
    if not returns:
        return None
    _, span, back = max(returns, key=lambda entry: entry[0])
    user = index_of[span.seq_id]
    return Lesson(
        heading="The pool is full: one steps back",
        text=f"At step {span.end} no block was left for the next tokens, so user {user + 1}, who "
        f"came in last, gave its blocks up (red triangle) and waited (red line) until step "
        f"{back.begin}. It then went on where it was: what was still grey it found again, the "
        "rest it computed anew. Its answer does not change.",
        panel=USERS,
        step=(span.end + back.begin) / 2,
        level=float(line_of[span.seq_id]),
    )


def _next_span(timeline: Timeline, span: Span) -> Span | None:
    later = [s for s in timeline.spans if s.seq_id == span.seq_id and s.begin >= span.end]
    return min(later, key=lambda s: s.begin, default=None)


def _forking(
    timeline: Timeline, index_of: Mapping[int, int], line_of: Mapping[int, int]
) -> Lesson | None:
    users = list(index_of.values())
    forked = [seq_id for seq_id, user in index_of.items() if users.count(user) > 1]
    copies = int(timeline.num_copies.sum())
    if not forked or not copies:
        return None
    user = min(index_of[seq_id] for seq_id in forked)
    mine = [seq_id for seq_id in forked if index_of[seq_id] == user]
    end = max(span.end for span in timeline.spans if span.seq_id in mine)
    return Lesson(
        heading="Two answers, one prompt",
        text=f"User {user + 1} asked for two answers and has two bars. Both read the same prompt "
        "blocks; only a half-filled block is copied, when one of them writes to it: "
        f"{copies} {'copy' if copies == 1 else 'copies'} in this run.",
        panel=USERS,
        step=end + 0.015 * len(timeline.owner),
        level=sum(line_of[seq_id] for seq_id in mine) / len(mine),
    )


def _saving(timeline: Timeline) -> Lesson | None:
    saved = timeline.num_entries - timeline.num_held
    step = int(np.argmax(saved))
    if not saved[step]:
        return None
    blocks = timeline.owner.shape[1]
    return Lesson(
        heading="More than fits",
        text=f"Dashed: blocks these users would hold if nothing were shared. At step {step} that "
        f"is {timeline.num_entries[step]}, held in {timeline.num_held[step]} of the pool's "
        f"{blocks} (red line).",
        panel=POOL,
        step=float(step),
        level=float(timeline.num_entries[step]),
    )


def _waiting(timeline: Timeline) -> Lesson | None:
    step = int(np.argmax(timeline.num_waiting))
    most = int(timeline.num_waiting[step])
    if not most:
        return None
    running = int(timeline.num_running[step])
    return Lesson(
        heading="Nobody is turned away",
        text=f"Green runs, orange waits for blocks. At step {step} {running} ran and {most} "
        "waited; they start, first come first served, as soon as there is room.",
        panel=LOAD,
        step=float(step),
        level=running + most / 2,
    )


# Looking


def widest_spot(
    mask: Bool, min_steps: float = 1, min_blocks: float = 1
) -> tuple[float, float] | None:
    """Return the middle (step, block) of the largest rectangle in a mask, if it is large enough.

    Args:
        mask: [S, N] Steps by blocks.
        min_steps: How wide the rectangle must be.
        min_blocks: How high.
    """
    best, spot = 0.0, None
    run = np.zeros(mask.shape[1], np.int64)  # steps that each block has been held up to now
    for step in range(len(mask)):
        run = np.where(mask[step], run + 1, 0)
        if step + 1 < len(mask) and (mask[step + 1] >= mask[step]).all():
            continue  # it can only grow wider
        for width in np.unique(run[run >= min_steps]).tolist():
            begin, height = _longest_true(run >= width)
            if height >= min_blocks and width * height > best:
                best = width * height
                spot = (step + 1 - width / 2, begin + height / 2 - 0.5)
    return spot


def _longest_true(mask: Bool) -> tuple[int, int]:
    """Return where the longest run of a [N] mask begins, and its length."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    begins, ends = edges[::2], edges[1::2]
    if not len(begins):
        return 0, 0
    longest = int(np.argmax(ends - begins))
    return int(begins[longest]), int(ends[longest] - begins[longest])
