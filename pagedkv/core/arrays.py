"""The array types of the control plane; how its columns are read, compared and made longer."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Bool",
    "Float32",
    "Float64",
    "Int32",
    "Int64",
    "UInt64",
    "at_rows",
    "plan_width",
    "whole_tables",
    "with_room",
]

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]


def at_rows(rows: Int32) -> Any:
    """Return rows as a slice if they follow on, which reads columns without gathering them; else as
    numpy's own index type, which gathers in a third of the time.

    What is read through it may be a view: copy it before it leaves the step.
    """
    if not len(rows) or rows[-1] - rows[0] != len(rows) - 1:
        return rows.astype(np.intp)
    first, end = int(rows[0]), int(rows[-1]) + 1
    # Bytes, for at the few rows of most steps they compare in half the time of arrays.
    follow_on = np.arange(first, end, dtype=rows.dtype).tobytes() == rows.tobytes()
    return slice(first, end) if follow_on else rows.astype(np.intp)


def plan_width(widest: int) -> int:
    """Return how wide a plan's tables are, of which the widest has so many blocks.

    Four significant bits: an eighth more at most. Where that is the width of the columns, reading
    and writing them is one run over memory instead of one per table, and so much faster.
    """
    step = 1 << max(0, (widest - 1).bit_length() - 4)
    return -(-widest // step) * step


def whole_tables(column: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """Return a column [groups, rows, width] as one opaque item per table: [groups * rows].

    Short runs are gathered and scattered by item in half the time that numpy takes by row.
    """
    return column.view(_item(column.itemsize * column.shape[2])).reshape(-1)


@functools.cache
def _item(num_bytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, num_bytes))


def with_room(array: Int64, size: int) -> Int64:
    """Return an array that is at least ``size`` long along every axis: itself, or one twice as
    long, zeros behind what it held. So growing one by one costs a constant per entry.
    """
    if len(array) >= size:
        return array
    wider = np.zeros((max(size, 2 * len(array)),) * array.ndim, array.dtype)
    wider[tuple(map(slice, array.shape))] = array
    return wider
