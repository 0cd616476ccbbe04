"""The second rung under pressure: sequences with an elastic budget forget more, to a floor."""

import numpy as np

from pagedkv.core.arrays import Bool, Float32, Int32
from pagedkv.core.batch import Batch
from pagedkv.core.retention import Retention
from pagedkv.eviction import Policy, protect

__all__ = ["shrink"]


def shrink(retention: Retention, need: int, rows: Int32) -> int:
    """Free blocks by eviction from running sequences with an adaptive budget.

    The blocks that go are those with the least attention mass over all such sequences; sinks,
    recent tokens, tails and every table's floor stay. Only blocks that nobody shares are taken:
    evicting others would free nothing.

    Args:
        need: Blocks that lack.
        rows: [N] Whose may go.

    Returns:
        How many blocks became available, ``need`` at most. Whose own score fails gives none, and
        is for `Roster.end_faulty` to end.
    """
    candidates = [
        (chosen, mine, _masses(retention, chosen, mine))
        for chosen, mine in _elastic(retention, rows)
    ]
    if not candidates or need <= 0:
        return 0
    masses = np.concatenate([mass.ravel() for _, _, mass in candidates])
    lightest = np.argsort(masses, kind="stable")[:need]
    taken: Bool = np.zeros(len(masses), np.bool_)
    taken[lightest[np.isfinite(masses[lightest])]] = True
    sizes = np.cumsum([mass.size for _, _, mass in candidates])[:-1]
    freed = 0
    for (chosen, mine, mass), part in zip(candidates, np.split(taken, sizes), strict=True):
        gone = part.reshape(mass.shape)
        losing = gone.any(axis=(0, 2))
        if not losing.any():
            continue
        losers, gone = mine[losing], gone[:, losing]
        heard = losers, retention.table.mass[:, losers, : mass.shape[2]]
        with retention.blaming(losers):
            retention.forget(chosen, retention.entries.view(chosen, losers), losers, gone, heard)
            freed += int(gone.sum())
            for row in losers.tolist():
                seq = retention.table.sequences[row]
                assert seq is not None
                seq.num_shrinks += 1
    return freed


def _elastic(retention: Retention, rows: Int32) -> list[tuple[Policy, Int32]]:
    """Return those of running rows that can be made to forget blocks, by policy.

    None that replays, and none that ranks tokens: packing what it keeps may take blocks.
    """
    table = retention.table
    rows = rows[table.num_computed[rows] >= table.replay_until[rows]]
    found = retention.by_policy(Batch(table, rows, rows))
    return [(chosen, rows[at]) for chosen, at in found if chosen.shrinks]


def _masses(retention: Retention, chosen: Policy, rows: Int32) -> Float32:
    """Return the mass of the entries that may go, infinity for all others: [groups, B, W]."""
    table, pool = retention.table, retention.manager.pool
    view = retention.entries.view(chosen, rows)
    assert chosen.adaptive is not None
    may_go = ~protect(chosen, view).reshape(table.num_groups, len(rows), -1)
    width = may_go.shape[2]
    may_go &= pool.references(table.block_table[:, rows, :width]) == 1
    may_go[retention.windows > 0] = False
    mass = np.where(may_go, table.mass[:, rows, :width], np.float32(np.inf))
    spare = np.maximum(table.num_resident[:, rows] - chosen.adaptive[0], 0) // table.block_size
    rank = np.argsort(np.argsort(mass, axis=2, kind="stable"), axis=2)
    return np.where(rank < spare[:, :, None], mass, np.float32(np.inf))
