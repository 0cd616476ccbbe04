"""Which entries of many short tables go, and how the rest move up."""

from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from pagedkv.core.arrays import Bool, Int32, Int64, whole_tables

__all__ = ["Gaps", "Holes", "close_gaps"]


class Holes(Struct, frozen=True, kw_only=True, eq=False):
    """The H entries that go from the tables of B rows, found once for all who ask.

    Attributes:
        mask: [groups, B, width] Which entries go; none past that width does.
        table: [H] Their tables, counted group after group; in ascending order.
        group, member: [H] Of which group those are, and of which of the B rows.
        entry: [H] Where they stand in those, in ascending order.
        lost: [groups, B] How many each table loses.
    """

    mask: Bool
    table: Int64
    group: Int64
    member: Int64
    entry: Int64
    lost: Int32

    @classmethod
    def of(cls, mask: Bool) -> "Holes":
        """Find the entries of a mask: [groups, B, width]."""
        groups, rows, width = mask.shape
        table, entry = np.divmod(np.flatnonzero(mask), max(width, 1))
        group, member = np.divmod(table, rows)
        lost = np.bincount(table, minlength=groups * rows).astype(np.int32)
        return cls(
            mask=mask,
            table=table,
            group=group,
            member=member,
            entry=entry,
            lost=lost.reshape(groups, rows),
        )


class Gaps(Struct, frozen=True, kw_only=True, eq=False):
    """What closes the gaps in N tables that lie one after the other, by flat indices into them.

    Attributes:
        gone: [H] The entries that go, each table's tail first.
        steps: [N, width] By how many places the entry that each place takes over moves up.
        source: [N * width] That entry; where none is left, any. None if no step is longer than 1.
        past: [H] The places where none is left.
        lost: [N] How many entries each table loses.
    """

    gone: Int64
    steps: npt.NDArray[np.integer]
    source: Int64 | None
    past: Int64
    lost: Int32

    @property
    def behind(self) -> Int32:
        """[N, width] How many of the entries that go lay behind each one that stays."""
        behind: Int32 = self.lost[:, None] - self.steps
        return behind

    def close(
        self, column: npt.NDArray[Any], tables: Int64, less: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Close the gaps in a column and leave 0 at the ends of its tables.

        Args:
            column: [groups, rows, width] Of 4 bytes each.
            tables: [N] Which of its tables, each once.
            less: [N, width] What is taken from the entries that stay.

        Returns:
            [N, width] What the tables held.
        """
        whole = whole_tables(column)
        held = whole.take(tables).view(column.dtype)
        if self.source is None:
            moved = self._nearest(held.view(np.int32)).view(column.dtype)
        else:
            moved = held.take(self.source, mode="clip")
        moved[self.past] = 0
        if less is not None:
            moved -= less.ravel()
        whole[tables] = moved.view(whole.dtype)
        return held.reshape(-1, column.shape[2])

    def _nearest(self, held: Int32) -> Int32:
        """Return each entry or, a step further on, the next: [N * width]. In half the time of a
        lookup, which goes entry by entry.
        """
        moved = np.zeros_like(held)
        np.subtract(held[1:], held[:-1], out=moved[:-1])
        moved *= self.steps.ravel()
        moved += held
        return moved


def close_gaps(holes: Holes, width: int) -> Gaps:
    """Return how entries move up, in their order, once others are gone.

    Args:
        holes: The entries that go.
        width: Of the tables that are to be closed: as wide as those of ``holes``, or wider.
    """
    lost, table = holes.lost.ravel(), holes.table
    end = np.cumsum(lost)
    ordinal = np.arange(len(table)) - (end - lost)[table]
    at = table * width + holes.entry
    steps: npt.NDArray[np.integer]
    if len(table) == len(lost) and lost.all():  # one of each, as in decode: less than half the time
        gone = holes.entry.astype(np.int32)[:, None]
        steps = (np.arange(width, dtype=np.int32) >= gone).astype(np.int32)
        source = None
    else:
        # A place takes over what stood as many entries further on as holes were met up to there.
        # All tables are one run, for sums over many short ones take several times as long.
        steps = np.bincount(at - ordinal, minlength=len(lost) * width)
        steps[width::width] -= lost[:-1]
        np.cumsum(steps, out=steps)
        source = np.arange(len(steps)) + steps
    return Gaps(
        gone=at[end[table] - 1 - ordinal],
        steps=steps.reshape(-1, width),
        source=source,
        past=(table + 1) * width - 1 - ordinal,
        lost=lost,
    )
