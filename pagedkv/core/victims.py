"""Whom to push back when blocks lack and nothing cheaper is left: a function of the table.

Each is given the table and the rows that may be chosen, in the order of their admission, and
returns one of them. `pagedkv.Scheduler` takes any such function.
"""

from collections.abc import Callable

from pagedkv.core.arrays import Int32
from pagedkv.core.table import SequenceTable

__all__ = ["VICTIMS", "Victim", "fewest_computed", "last_admitted", "least_urgent", "most_blocks"]

Victim = Callable[[SequenceTable, Int32], int]


def last_admitted(table: SequenceTable, rows: Int32) -> int:
    """Return the row admitted last, as vLLM does."""
    return int(rows[-1])


def least_urgent(table: SequenceTable, rows: Int32) -> int:
    """Return the row of the least urgent request, of equals the last admitted."""
    return int(rows[len(rows) - 1 - int(table.urgency[rows][::-1].argmax())])


def most_blocks(table: SequenceTable, rows: Int32) -> int:
    """Return the row that holds most blocks, of equals the last admitted: fewest must go."""
    return int(rows[len(rows) - 1 - int(table.num_blocks[:, rows].sum(axis=0)[::-1].argmax())])


def fewest_computed(table: SequenceTable, rows: Int32) -> int:
    """Return the row with least to compute again, of equals the last admitted."""
    return int(rows[len(rows) - 1 - int(table.num_computed[rows][::-1].argmin())])


VICTIMS: dict[str, Victim] = {
    victim.__name__: victim
    for victim in (last_admitted, least_urgent, most_blocks, fewest_computed)
}
