"""Rows as slices, and arrays that grow."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.core.arrays import at_rows, with_room


@given(st.lists(st.integers(0, 6), max_size=6))
def test_rows_become_a_slice_exactly_if_they_follow_on(rows):
    given_rows, column = np.array(rows, np.int32), np.arange(7)
    at = at_rows(given_rows)
    follow_on = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    assert isinstance(at, slice) == follow_on
    assert (column[at] == column[given_rows]).all()


@given(st.integers(1, 2), st.lists(st.integers(0, 40), max_size=8))
def test_an_array_grows_along_every_axis_and_keeps_what_it_held(axes, sizes):
    array, copies, held = np.zeros((0,) * axes, np.int64), 0, {}
    for value, size in enumerate(sizes, 1):
        before = array
        array = with_room(array, size)
        copies += array is not before
        assert array.ndim == axes
        assert all(length >= size for length in array.shape)
        assert all(array[at] == was for at, was in held.items())
        assert np.count_nonzero(array) == len(held)
        if size:
            at = (size - 1,) * axes
            array[at] = held[at] = value
    assert copies <= 1 + np.log2(max([1, *sizes]))  # each is at least twice as long
