"""Where keys stand once blocks before them are gone: rotations, and the turns that undo them."""

import numpy as np

from pagedkv.core.arrays import Int32, alike
from pagedkv.core.batch import Batch

__all__ = ["place", "turns"]


def place(batch: Batch) -> None:
    """Choose the positions that the next tokens of rotating rows are written at.

    They go on by one per token until, at a block boundary, they are twice as many as the sequence
    still has tokens; there it starts over from those. So positions stay as small as its cache, and
    blocks written between two such points want the same turn however many went before them: an
    attention call for each would cost more than the attention. A block's keys are turned as one.
    """
    if batch.rotates is None:
        return
    table = batch.table
    at = batch.rows[batch.rotates & (table.num_computed[batch.at] % table.block_size == 0)]
    resident = table.num_resident[:, at].max(axis=0, initial=0)
    far = table.next_position[at] >= 2 * resident
    table.next_position[at[far]] = resident[far]


def turns(batch: Batch, width: int) -> Int32 | None:
    """Return by how many positions each block's queries must be turned: [groups, B, width].

    A query at resident index n with position w sees a block whose first key has index c and
    position r at distance n - c; the rotation alone gives w - r. Turning the query by the
    difference is exact and leaves keys alone (relative rotary positions, Su et al. 2021).
    None if every turn is 0.
    """
    table, at = batch.table, batch.at
    # Blocks turn once a gap has closed before them, never sooner.
    if batch.rotates is None or not (batch.rotates & (table.num_evicted[at] > 0)).any():
        return None
    index = np.arange(width, dtype=np.int32)
    last = alike(np.where(batch.rotates, table.num_blocks[:, at], 0))
    query = alike(table.num_resident[:, at] - table.next_position[at])
    # In place: fresh pages cost more than the arithmetic.
    ahead = query[:, :, None] - index * np.int32(table.block_size)
    turned: Int32 = table.rotation[:, at, :width] + ahead
    turned *= index < last[:, :, None]
    return turned if turned.any() else None
