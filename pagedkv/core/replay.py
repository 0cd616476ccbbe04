"""A preempted sequence forgets the same things again: rounds of eviction, logged and repeated.

And what slid out of its windows does not come back at once: they are filled no wider than before.
"""

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Bool, Int32
from pagedkv.core.bounds import most_again
from pagedkv.core.gaps import Holes
from pagedkv.core.request import UNBOUNDED, Eviction, SavedScores
from pagedkv.core.table import SCORE_COLUMNS, SequenceTable
from pagedkv.core.tokens import TokenColumns

__all__ = [
    "log_round",
    "no_wider",
    "replay_round",
    "restore_scores",
    "save_scores",
    "scored_entries",
    "until_logged",
]

FIRST_BITS = np.packbits(np.tri(9, 8, -1, np.uint8), axis=1).ravel()
"""[9] Bytes of which so many bits are set, from the first on."""


def log_round(table: SequenceTable, rows: Int32, holes: Holes, in_use: Int32) -> None:
    """Record a round in the logs of the rows that hold it for the first time.

    Args:
        rows: [B]
        holes: Which entries of their tables go.
        in_use: [groups, B] How many entries each table has.
    """
    bits, groups, computed = _packed(holes, in_use), len(in_use), table.num_computed[rows]
    size, content = bits[0].size, bits.tobytes()
    new = (computed > table.replay_until[rows]).tolist()
    facts = zip(rows.tolist(), new, computed.tolist(), in_use.max(axis=0).tolist(), strict=True)
    for i, (row, is_new, at, width) in enumerate(facts):
        if is_new:  # for the others it is the log that is carried out
            seq = table.sequences[row]
            assert seq is not None
            held = Eviction(content[i * size : (i + 1) * size], groups, width)
            seq.evictions[at] = held.after(seq.evictions.get(at))


def _packed(holes: Holes, in_use: Int32) -> npt.NDArray[np.uint8]:
    """Return which entries stay, as `Eviction` has them: [B, groups, ceil(width / 8)]."""
    groups, size = len(in_use), -(-int(in_use.max()) // 8)
    # Byte after byte, for tables are many and short.
    left = in_use.T.ravel() - np.arange(0, 8 * size, 8, np.int32)[:, None]
    bits = FIRST_BITS.take(left, mode="clip").T.copy()
    at = (holes.member * groups + holes.group) * size + holes.entry // 8
    gone = np.bincount(at, 128 >> (holes.entry % 8), bits.size).astype(np.uint8)
    return (bits.ravel() - gone).reshape(-1, groups, size)


def until_logged(table: SequenceTable, rows: Int32, need: Int32) -> Int32:
    """Return ``need`` cut so that who replays stops at each eviction in its log: [B] each.

    Cost: a loop over the rows that replay.
    """
    computed = table.num_computed[rows]
    left = table.replay_until[rows] - computed
    need = np.where(left > 0, np.minimum(need, left), need)
    for i in np.flatnonzero(left > 0).tolist():
        seq = table.sequences[rows[i]]
        assert seq is not None
        logged = next((at for at in seq.evictions if at > computed[i]), UNBOUNDED)
        need[i] = min(need[i], logged - computed[i])
    return need


def no_wider(table: SequenceTable, rows: Int32, need: Int32) -> Int32:
    """Return ``need`` cut to what `most_again` lets preempted rows hold: [B] each.

    Cost: a loop over the rows that compute more than one token.
    """
    groups, size = table.num_groups, table.block_size
    need = need.copy()
    for i in np.flatnonzero(need > 1).tolist():
        seq = table.sequences[rows[i]]
        assert seq is not None
        computed = int(table.num_computed[rows[i]])
        most = most_again(seq.leader, groups, size)
        room = (most - int(table.num_blocks[:, rows[i]].sum())) // groups
        # To the end of the block at hand, or of the next: less is no step.
        end = -(-computed // size) + max(room, computed % size == 0)
        need[i] = min(need[i], end * size - computed)
    return need


def replay_round(table: SequenceTable, row: int, keep: Bool, in_use: Int32) -> None:
    """Overwrite what a round decided with what it decided before: [groups, width] in place."""
    seq = table.sequences[row]
    assert seq is not None
    logged = seq.evictions.get(int(table.num_computed[row]))
    keep[:] = np.arange(keep.shape[1]) < in_use[:, None]
    if logged is not None:
        keep[:, : logged.width] = logged.keep


def save_scores(table: SequenceTable, row: int, unit: str, width: int) -> SavedScores:
    """Return what is known of a row's first ``width`` entries, and what it has forgotten."""
    entries = scored_entries(table, unit)
    return SavedScores(
        int(table.num_computed[row]),
        {
            name: getattr(entries, name)[:, row, :width].copy()
            for name in entries.kept_columns
            if name in SCORE_COLUMNS
        },
        int(table.num_evicted[row]),
        float(table.forfeited[row]),
        float(table.left_out[row]),
    )


def scored_entries(table: SequenceTable, unit: str) -> SequenceTable | TokenColumns:
    """Return who keeps what is known of blocks, or of tokens."""
    return table.tokens if unit == "token" else table


def restore_scores(table: SequenceTable, rows: Int32) -> None:
    """Give those of the rows that have finished replaying the scores they had."""
    until = table.replay_until[rows]
    for row in rows[(until > 0) & (table.num_computed[rows] >= until)].tolist():
        seq = table.sequences[row]
        assert seq is not None
        assert seq.saved is not None
        entries = scored_entries(table, seq.policy.unit)
        for name, column in seq.saved.columns.items():
            getattr(entries, name)[:, row, : column.shape[1]] = column
        table.forfeited[row] = seq.saved.forfeited
        table.left_out[row] = seq.saved.left_out
        table.replay_until[row] = 0
