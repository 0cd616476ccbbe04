"""Closing the gaps of many tables at once does to each what a list comprehension does to one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.core.arrays import whole_tables
from pagedkv.core.gaps import Holes, close_gaps

WIDTH = 6
SPARE = 3  # entries that tables are wider than the mask
TABLE = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH)
GROUPS = st.integers(1, 3)
ROWS = st.integers(1, 4)


ONE_OF_EACH = st.integers(0, WIDTH - 1).map(lambda at: [i == at for i in range(WIDTH)])


@st.composite
def masks(draw):
    """Which entries go, of some groups and rows: any, or one of each table as in decode."""
    groups, rows, tables = draw(GROUPS), draw(ROWS), draw(st.sampled_from([TABLE, ONE_OF_EACH]))
    tables = draw(st.lists(tables, min_size=groups * rows, max_size=groups * rows))
    return np.array(tables, np.bool_).reshape(groups, rows, WIDTH)


@given(masks(), st.integers(0, SPARE), st.randoms(use_true_random=False), st.booleans())
def test_every_table_keeps_its_order(mask, spare, random, turns):
    """Tables lie anywhere in their column, and may be wider than what is said of them."""
    tables, width = mask.reshape(-1, WIDTH).tolist(), WIDTH + spare
    column = np.arange(2 * len(tables) * width, dtype=np.int32).reshape(2, -1, width) * 7 + 1
    before = column.reshape(-1, width).tolist()
    places = random.sample(range(len(before)), len(tables))

    gaps = close_gaps(Holes.of(mask), width)
    held = gaps.close(column, np.array(places), gaps.behind * 3 if turns else None)

    dropped, after = [], column.reshape(-1, width).tolist()
    for i, at in enumerate(places):
        goes = tables[i] + [False] * spare
        entries = list(zip(before[at], goes, strict=True))
        leave = [entry for entry, leaves in entries if leaves]
        dropped += leave[::-1]
        less = [3 * turns * sum(goes[k:]) for k, leaves in enumerate(goes) if not leaves]
        stay = [entry for entry, leaves in entries if not leaves]
        stay = [entry - by for entry, by in zip(stay, less, strict=True)]
        assert held[i].tolist() == before[at]
        assert after[at] == stay + [0] * len(leave)
    assert held.reshape(-1)[gaps.gone].tolist() == dropped
    for at in {*range(len(before))} - {*places}:
        assert after[at] == before[at]


FAR = [-(2**31), 2**31 - 1, -1, 0, 0x7FC00001, 0x7F800000]  # and NaN and infinity, as floats


@given(masks(), st.data())
def test_bits_are_moved_as_they_are(mask, data):
    """Whatever numbers stand there: the largest, NaN, infinity."""
    bits = data.draw(st.lists(st.sampled_from(FAR), min_size=mask.size, max_size=mask.size))
    whole = np.array(bits, np.int64).astype(np.int32).reshape(mask.shape)
    column, tables = whole.copy().view(np.float32), np.arange(mask.shape[0] * mask.shape[1])

    close_gaps(Holes.of(mask), WIDTH).close(column, tables)

    for before, goes, after in zip(
        whole.reshape(-1, WIDTH),
        mask.reshape(-1, WIDTH),
        column.view(np.int32).reshape(-1, WIDTH),
        strict=True,
    ):
        assert after.tolist() == [*before[~goes].tolist(), *[0] * int(goes.sum())]


@given(masks())
def test_holes_say_what_the_mask_says(mask):
    """Group by group, row by row, entry by entry."""
    holes = Holes.of(mask)

    found = zip(holes.group.tolist(), holes.member.tolist(), holes.entry.tolist(), strict=True)
    assert list(found) == [tuple(at) for at in np.argwhere(mask).tolist()]
    assert holes.lost.tolist() == mask.sum(axis=2).tolist()


@given(masks(), st.data())
def test_tables_are_moved_whole(mask, data):
    """What is gathered and scattered as one item per table is their entries."""
    column = np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
    tables = column.reshape(-1, WIDTH)
    items = whole_tables(column)
    chosen = np.array(data.draw(st.permutations(range(len(tables)))), np.intp)

    gathered = items.take(chosen).view(np.int32).reshape(-1, WIDTH)
    assert gathered.tolist() == tables[chosen].tolist()

    items[chosen] = items.take(chosen[::-1])
    expected = np.empty_like(gathered)
    expected[chosen] = gathered[::-1]
    assert column.reshape(-1, WIDTH).tolist() == expected.tolist()
