"""Rows as slices, and columns that all groups share."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.core.arrays import alike, at_rows


@given(st.lists(st.integers(0, 6), max_size=6))
def test_rows_become_a_slice_exactly_if_they_follow_on(rows):
    given_rows, column = np.array(rows, np.int32), np.arange(7)
    at = at_rows(given_rows)
    follow_on = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    assert isinstance(at, slice) == follow_on
    assert (column[at] == column[given_rows]).all()


def test_a_column_is_shared_only_if_every_group_has_the_same():
    same, other = np.array([[1, 2], [1, 2]]), np.array([[1, 2], [1, 3]])
    assert alike(same).tolist() == [[1, 2]]
    assert alike(other).tolist() == other.tolist()
