"""How the tokens that survive in part-evicted blocks are packed into the fewest blocks."""

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Bool, Int32, Int64

__all__ = ["Repacking", "repack"]


class Repacking(Struct, frozen=True, kw_only=True, eq=False):
    """Where T tables' surviving tokens go.

    Attributes:
        stays: [T, W] Old table entries whose block is taken over as it is.
        entry: [T, W] For each new table entry, the old one that it takes over; -1 for none.
        fresh: [T, W] New table entries that need a block of their own.
        num_blocks: [T] New table entries in use.
        table, source, target: [M] Tokens that move: of which table, from which index among its
            slots to which.
    """

    stays: Bool
    entry: Int64
    fresh: Bool
    num_blocks: Int64
    table: Int64
    source: Int64
    target: Int64


def repack(keep: Bool, num_resident: Int32, block_size: int) -> Repacking:
    """Pack what stays of each table into as few blocks as it needs, in its order.

    A block that loses nothing and still begins at a block boundary is taken over, so whole blocks
    that go cost no copy, and what is shared stays shared. No block that lives on is written into:
    every other survivor goes to a fresh block.

    Args:
        keep: [T, W * block_size] The slots whose tokens stay.
        num_resident: [T] Slots in use; the rest of ``keep`` counts for nothing.
        block_size: Slots of a block.
    """
    tables, slots = keep.shape
    used = np.arange(slots) < num_resident[:, None]
    keep = keep & used
    shape = tables, slots // block_size, block_size
    kept, held = (x.reshape(shape).sum(axis=2) for x in (keep, used))
    before = np.cumsum(kept, axis=1) - kept
    stays = (kept > 0) & (kept == held) & (before % block_size == 0)
    num_blocks = -(-kept.sum(axis=1) // block_size)
    entry = np.full(shape[:2], -1, np.int64)
    of, old = np.nonzero(stays)
    entry[of, before[of, old] // block_size] = old
    table, source = np.nonzero(keep & ~np.repeat(stays, block_size, axis=1))
    return Repacking(
        stays=stays,
        entry=entry,
        fresh=(np.arange(shape[1]) < num_blocks[:, None]) & (entry < 0),
        num_blocks=num_blocks,
        table=table,
        source=source,
        target=(np.cumsum(keep, axis=1) - 1)[table, source],
    )
