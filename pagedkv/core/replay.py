"""A preempted sequence forgets the same things again: rounds of eviction, logged and repeated.

And what slid out of its windows does not come back at once: they are filled no wider than before.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Bool, Float32, Float64, Int32, Int64
from pagedkv.core.bounds import most_again
from pagedkv.core.gaps import Holes
from pagedkv.core.plan import StepPlan
from pagedkv.core.request import UNBOUNDED, Eviction, SavedScores
from pagedkv.core.table import SCORE_COLUMNS, SequenceTable
from pagedkv.core.tokens import TokenColumns
from pagedkv.eviction import Policy

__all__ = [
    "Known",
    "Undo",
    "log_round",
    "no_wider",
    "replay_round",
    "restore_scores",
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


class Known(NamedTuple):
    """What eviction knows of B rows: `SavedScores`, side by side.

    Attributes:
        rows: [B]
        computed, num_evicted, forfeited, left_out: [B] each.
        columns: [groups, B, entries] per column of scores, by name.
    """

    rows: Int32
    computed: Int32
    columns: dict[str, Float32]
    num_evicted: Int64
    forfeited: Float64
    left_out: Float64

    @classmethod
    def of(cls, table: SequenceTable, rows: Int32, unit: str, width: int) -> "Known":
        """Copy what is known of the first ``width`` blocks, or tokens, of rows."""
        entries = scored_entries(table, unit)
        columns = {
            name: getattr(entries, name)[:, rows, :width]
            for name in entries.kept_columns
            if name in SCORE_COLUMNS
        }
        facts = (table.num_evicted[rows], table.forfeited[rows], table.left_out[rows])
        return cls(rows, table.num_computed[rows], columns, *facts)

    def saved(self, i: int) -> SavedScores:
        """Return what is known of the i-th row."""
        return SavedScores(
            int(self.computed[i]),
            {name: column[:, i].copy() for name, column in self.columns.items()},
            int(self.num_evicted[i]),
            float(self.forfeited[i]),
            float(self.left_out[i]),
        )


def scored_entries(table: SequenceTable, unit: str) -> SequenceTable | TokenColumns:
    """Return who keeps what is known of blocks, or of tokens."""
    return table.tokens if unit == "token" else table


class Undo:
    """Within it a plan's step is counted; if that is interrupted, it has not been counted.

    Effect, if so: the plan's rows say that they computed what they had before. They must be
    preempted next; what is saved of them then makes them observe the step once when they compute
    it again, or not again where it was taken in.

    Cost: a copy of what is known of the rows that hold a round, and of those whose scores are not
    just added up.
    """

    def __init__(self, table: SequenceTable, plan: StepPlan) -> None:
        self._table = table
        self._rows = plan.rows
        self._computed = table.num_computed[plan.rows]
        self._noted: list[tuple[Policy, Int32, Int32, int, Bool, Known]] = []

    def note(self, chosen: Policy, rows: Int32, counts: Int32, width: int) -> None:
        """Remember rows of one policy, [B], right before they take in ``counts`` tokens each."""
        table, adds = self._table, chosen.scorer().counts or chosen.scorer().observe == "none"
        copied: Bool = np.ones(len(rows), np.bool_)
        if adds and not chosen.shrinks:
            computed, prompt = table.num_computed[rows] + counts, table.num_prompt[rows]
            copied = chosen.cadence(table.block_size).is_round(computed, prompt)
        known = Known.of(table, rows[copied], chosen.unit, width)
        self._noted.append((chosen, rows, counts, width, copied, known))

    def __enter__(self) -> "Undo":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        table = self._table
        table.num_computed[self._rows] = self._computed
        for i, row in enumerate(self._rows.tolist()):  # who replayed keeps what was saved
            seq = table.sequences[row]
            if seq is not None and seq.saved and self._computed[i] < seq.saved.computed:
                table.replay_until[row] = UNBOUNDED
        for chosen, rows, counts, width, copied, known in self._noted:
            table.replay_until[rows] = UNBOUNDED  # so that nothing more is saved
            self._save(known)
            rest = Known.of(table, rows[~copied], chosen.unit, width)
            self._save(rest._replace(computed=rest.computed + counts[~copied]))

    def _save(self, known: Known) -> None:
        for i, row in enumerate(known.rows.tolist()):
            seq = self._table.sequences[row]
            assert seq is not None
            seq.saved = known.saved(i)
            rounds = seq.evictions.items()
            seq.evictions = {at: held for at, held in rounds if at <= known.computed[i]}


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
