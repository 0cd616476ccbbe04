"""Closing the gaps of many tables at once does to each what a list comprehension does to one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.core.gaps import close_gaps

WIDTH = 6
SPARE = 3  # entries of a column between the tables looked at: another's
TABLE = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH)


@given(st.lists(TABLE, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_every_table_keeps_its_order(tables, random):
    """Tables lie anywhere in their column, in any order."""
    gone = np.array(tables, np.bool_)
    column = np.arange(len(tables) * (WIDTH + SPARE)) * 7 + 1
    places = list(range(0, len(column), WIDTH + SPARE))
    random.shuffle(places)

    gaps = close_gaps(gone, np.array(places))

    dropped = []
    for i, at in enumerate(places):
        entries = column[at : at + WIDTH].tolist()
        stay = [entry for entry, goes in zip(entries, tables[i], strict=True) if not goes]
        leave = [entry for entry, goes in zip(entries, tables[i], strict=True) if goes]
        dropped += leave[::-1]
        assert gaps.lost[i] == len(leave)
        assert column[gaps.source[i, : len(stay)]].tolist() == stay
        behind = [sum(tables[i][k:]) for k, goes in enumerate(tables[i]) if not goes]
        assert gaps.behind[i, : len(stay)].tolist() == behind
        past = [place % WIDTH for place in gaps.past.tolist() if place // WIDTH == i]
        assert sorted(past) == list(range(len(stay), WIDTH))
    assert column[gaps.gone].tolist() == dropped
