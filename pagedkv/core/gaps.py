"""How the entries of many short tables move up once some of them are gone."""

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Bool, Int32, Int64

__all__ = ["Gaps", "close_gaps"]


class Gaps(Struct, frozen=True, kw_only=True, eq=False):
    """What closes the gaps in N tables, by flat indices into a column of all tables' entries.

    Attributes:
        lost: [N] Entries that each table loses.
        gone: [lost.sum()] Those entries, each table's tail first.
        source: [N, width] The entry that each place takes over; where none is left, any.
        past: [lost.sum()] The places of ``source``, flat, where none is left.
        behind: [N, width] How many of the entries that go lay behind each one that stays.
    """

    lost: Int64
    gone: Int64
    source: Int64
    past: Int64
    behind: Int32


def close_gaps(gone: Bool, first: Int64) -> Gaps:
    """Return how entries move up, in their order, once others are gone.

    Args:
        gone: [N, width] The entries that go.
        first: [N] Where each table begins in the column.
    """
    tables, width = gone.shape
    holes = gone.ravel().nonzero()[0]
    table, entry = np.divmod(holes, width)
    lost = np.bincount(table, minlength=tables)
    end = np.cumsum(lost)
    before = (end - lost)[table]
    ordinal = np.arange(len(holes)) - before
    tail_first = end[table] - 1 - ordinal
    # How many holes come right before what moves to each place. All tables are one run, for sums
    # over many short ones take several times as long.
    jumps = np.bincount(holes - ordinal, minlength=gone.size)
    behind = -jumps
    behind[::width] += lost
    jumps += 1
    jumps[::width] += first - 1
    jumps[width::width] -= (first + lost)[:-1] + (width - 1)
    return Gaps(
        lost=lost,
        gone=(first[table] + entry)[tail_first],
        source=np.cumsum(jumps).reshape(tables, width),
        past=(table + 1) * width - 1 - ordinal,
        behind=np.cumsum(behind, dtype=np.int32).reshape(tables, width),
    )
