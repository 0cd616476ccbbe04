"""A preempted sequence forgets the same things again: rounds of eviction, logged and repeated."""

import numpy as np

from pagedkv.core.arrays import Bool, Int32
from pagedkv.core.request import UNBOUNDED, Eviction, SavedScores, Sequence
from pagedkv.core.table import SequenceTable
from pagedkv.core.tokens import TokenColumns

__all__ = ["log_round", "next_logged", "replay_round", "restore_scores", "save_scores"]

SCORE_COLUMNS = ("score", "weight", "mass")


def log_round(table: SequenceTable, rows: Int32, keep: Bool, in_use: Int32) -> None:
    """Record a round in the logs of the rows that hold it for the first time.

    Args:
        rows: [B]
        keep: [groups, B, width] Which entries of their tables stay.
        in_use: [groups, B] How many entries each table has.
    """
    for i, row in enumerate(rows.tolist()):
        seq = table.sequences[row]
        assert seq is not None
        computed = int(table.num_computed[row])
        if computed > table.replay_until[row]:  # else it is the log that is carried out
            held = Eviction.of(keep[:, i, : in_use[:, i].max()])
            seq.evictions[computed] = held.after(seq.evictions.get(computed))


def next_logged(table: SequenceTable, row: int) -> int:
    """Return how many tokens a row is from the next eviction in its log."""
    seq, computed = table.sequences[row], int(table.num_computed[row])
    assert seq is not None
    return next((at for at in seq.evictions if at > computed), UNBOUNDED) - computed


def replay_round(table: SequenceTable, row: int, keep: Bool, in_use: Int32) -> None:
    """Overwrite what a round decided with what it decided before: [groups, width] in place."""
    seq = table.sequences[row]
    assert seq is not None
    logged = seq.evictions.get(int(table.num_computed[row]))
    keep[:] = np.arange(keep.shape[1]) < in_use[:, None]
    if logged is not None:
        keep[:, : logged.width] = logged.keep


def save_scores(
    table: SequenceTable, entries: SequenceTable | TokenColumns, row: int, width: int
) -> SavedScores:
    """Return what is known of a row's first ``width`` entries, and what it has forgotten."""
    return SavedScores(
        int(table.num_computed[row]),
        [getattr(entries, name)[:, row, :width].copy() for name in SCORE_COLUMNS],
        int(table.num_evicted[row]),
        float(table.forfeited[row]),
        float(table.left_out[row]),
    )


def restore_scores(
    table: SequenceTable, entries: SequenceTable | TokenColumns, seq: Sequence
) -> None:
    """Give a sequence that has just finished replaying the scores it had."""
    assert seq.saved is not None
    for name, column in zip(SCORE_COLUMNS, seq.saved.columns, strict=True):
        getattr(entries, name)[:, seq.row, : column.shape[1]] = column
    table.forfeited[seq.row] = seq.saved.forfeited
    table.left_out[seq.row] = seq.saved.left_out
    table.replay_until[seq.row] = 0
