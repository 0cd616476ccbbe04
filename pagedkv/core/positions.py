"""Where keys stand once blocks before them are gone: rotations, and the turns that undo them."""

import numpy as np

from pagedkv.core.arrays import Bool, Int32, alike, at_rows
from pagedkv.core.table import SequenceTable

__all__ = ["place", "turns"]


def place(table: SequenceTable, rotates: Bool, rows: Int32) -> None:
    """Choose the positions that the next tokens of rotating rows are written at.

    At a block boundary a sequence starts over from the number of tokens it still has, so
    positions stay as small as its cache. Inside a block they go on: a block's keys are turned
    as one.

    Args:
        rotates: By table row: whether its policy closes the gaps that it leaves.
        rows: [B] Those that compute next.
    """
    rotates = rotates[rows]
    if not rotates.any():
        return
    at = rows[rotates & (table.num_computed[rows] % table.block_size == 0)]
    table.next_position[at] = table.num_resident[:, at].max(axis=0, initial=0)


def turns(table: SequenceTable, rotates: Bool, rows: Int32, width: int) -> Int32 | None:
    """Return by how many positions each block's queries must be turned: [groups, B, width].

    A query at resident index n with position w sees a block whose first key has index c and
    position r at distance n - c; the rotation alone gives w - r. Turning the query by the
    difference is exact and leaves keys alone (relative rotary positions, Su et al. 2021).
    None if every turn is 0.
    """
    rotates = rotates[rows]
    # Blocks turn once a gap has closed before them, never sooner.
    if not (rotates & (table.num_evicted[rows] > 0)).any():
        return None
    at, index = at_rows(rows), np.arange(width, dtype=np.int32)
    last = alike(np.where(rotates, table.num_blocks[:, at], 0))
    query = alike(table.num_resident[:, at] - table.next_position[at])
    # In place: fresh pages cost more than the arithmetic.
    ahead = query[:, :, None] - index * np.int32(table.block_size)
    turned: Int32 = table.rotation[:, at, :width] + ahead
    turned *= (index < last[:, :, None]).astype(np.int32)
    return turned if turned.any() else None
