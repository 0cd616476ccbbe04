"""Where keys stand once blocks before them are gone, and the turns that make up for it.

A key is rotated to a position when it is written, and never again. A query at resident index n
with position w sees a block whose first key has index c and position r at distance n - c; the
rotations alone give w - r. Turning the query by the difference, n - c - (w - r), is exact and
leaves keys alone (relative rotary positions, Su et al. 2021).

That turn is 0 for a block just taken, and every token that is written moves n and w alike. So it
changes only when blocks go, or when positions start over, and the table keeps it.
"""

import numpy as np

from pagedkv.core.arrays import Int32
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
    if not len(at):
        return
    resident = table.num_resident[:, at].max(axis=0)
    far = table.next_position[at] >= 2 * resident
    at, resident = at[far], resident[far]
    if len(at):
        back = table.next_position[at] - resident
        used = np.arange(table.turn.shape[2]) < table.num_blocks[:, at, None]
        table.turn[:, at] += back[:, None] * used
        table.next_position[at] = resident


def turns(batch: Batch, width: int) -> Int32 | None:
    """Return by how many positions each block's queries must be turned: [groups, B, width].

    None if every turn is 0.
    """
    # Blocks turn once a gap has closed before them, never sooner.
    table, at = batch.table, batch.at
    if batch.rotates is None or not (batch.rotates & (table.num_evicted[at] > 0)).any():
        return None
    turned = table.turn[:, at, :width]
    # The first group mostly tells: its blocks turn for whatever goes between them and the query.
    return turned.copy() if turned[:1].any() or turned.any() else None
