"""Distributions against numpy; series against plain sums."""

import numpy as np
import pytest

from pagedkv.sim.sketch import Distribution, Series

PERCENTS = (0, 1, 25, 50, 90, 99, 100)


def test_percentiles_are_numpys_while_values_are_few():
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 1, 5000)
    times = rng.integers(1, 4, 5000)
    found = Distribution()
    for start in range(0, 5000, 617):
        part, often = values[start : start + 617], times[start : start + 617]
        for count in (1, 2, 3):
            found.add(part[often == count], count)
        found.add(float(values[0]), 2)
    every = np.append(np.repeat(values, times), np.repeat(values[0], 2 * 9))
    assert found.percentile(PERCENTS) == pytest.approx(np.percentile(every, PERCENTS))
    assert found.mean == pytest.approx(every.mean())
    assert found.deviation == pytest.approx(every.std())


def test_percentiles_of_very_many_values_are_within_a_thousandth():
    values = np.random.default_rng(1).lognormal(-3, 2, 300_000)
    found = Distribution()
    for part in np.array_split(values, 30):
        found.add(part)
    want = np.percentile(values, PERCENTS)
    assert np.abs(found.percentile(PERCENTS) / want - 1).max() < 2e-3
    assert found.mean == pytest.approx(values.mean())
    assert (found.least, found.greatest) == (values.min(), values.max())
    assert found._exact == [], "the values themselves are not kept"


@pytest.mark.parametrize("sizes", [(10, 20), (70_000, 20), (20, 70_000), (70_000, 70_000)])
def test_merged_is_as_if_all_had_come_to_one(sizes):
    rng = np.random.default_rng(2)
    parts = [rng.exponential(1, size) for size in sizes]
    merged = Distribution()
    for part in parts:
        other = Distribution()
        other.add(part)
        merged.merge(other)
    every = np.concatenate(parts)
    assert merged.count == len(every)
    assert merged.percentile(PERCENTS) == pytest.approx(np.percentile(every, PERCENTS), rel=2e-3)


def test_nothing_has_a_summary():
    assert Distribution().summary("ttft_ms", (99.0,), 1000)["p99_ttft_ms"] == 0


def test_a_series_keeps_its_sums_while_its_stretches_widen():
    rng = np.random.default_rng(3)
    seconds = rng.exponential(1, 4000)
    values = rng.random((4000, 2))
    ends = np.cumsum(seconds)
    found = Series(("a", "b"), bins=8, width=0.25)
    for part in np.array_split(np.arange(4000), 50):
        found.add(ends[part], seconds[part], values[part])
    want = (seconds[:, None] * values).sum(axis=0) / seconds.sum()
    assert list(found.means.values()) == pytest.approx(want)
    table = found.table()
    assert len(table["time"]) <= 16
    assert found.peaks["a"] == values[:, 0].max()


def test_series_of_replicas_add_up_side_by_side():
    one, two = Series(("held",), bins=8), Series(("held",), bins=8, width=1.0)
    ends = np.arange(1.0, 7.0)
    one.add(ends, np.ones(6), np.full((6, 1), 3.0))
    two.add(ends, np.ones(6), np.full((6, 1), 4.0))
    one.merge(two)
    assert set(one.table()["held"]) == {7.0}
