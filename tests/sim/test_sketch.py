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
    assert Distribution().summary("ttft_ms", (99.0,), 1000)["p99_ttft_ms"] is None


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


def test_a_step_is_spread_over_the_stretches_it_lies_in():
    found = Series(("held",), width=1.0)
    found.add(np.array([2.5]), np.array([2.0]), np.array([[4.0]]))
    found.add(np.array([4.0]), np.array([0.5]), np.array([[8.0]]))
    assert found.table() == {"time": [0.5, 1.5, 2.5, 3.5], "held": [2.0, 4.0, 2.0, 4.0]}
    assert found.means["held"] == (2 * 4 + 0.5 * 8) / 4


def test_stretches_hold_what_steps_come_to_within_them():
    rng = np.random.default_rng(4)
    pauses, seconds = rng.exponential(0.3, 900), rng.exponential(0.2, 900)
    ends = 5.0 + np.cumsum(pauses + seconds)
    values = rng.integers(0, 9, (900, 2)).astype(float)
    found = Series(("a", "b"), bins=16, width=0.25)
    found.start = 5.0
    for part in np.array_split(np.arange(900), 41):
        found.add(ends[part], seconds[part], values[part])
        _ = found.peaks  # so that what has come is counted
    found.close(ends[-1] + 7.0, np.array([2.0, 0.0]))
    ends, seconds = np.append(ends, ends[-1] + 7.0), np.append(seconds, 7.0)
    values = np.vstack([values, [2.0, 0.0]])
    table = found.table()
    edges = np.minimum(5.0 + np.arange(len(table["time"]) + 1) * found.width, ends[-1])
    overlap = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], ends - seconds)
    want = np.maximum(overlap, 0) @ values / np.diff(edges)[:, None]
    assert table["a"] == pytest.approx(want[:, 0])
    assert table["b"] == pytest.approx(want[:, 1])
    assert found.means["a"] == pytest.approx(float(seconds @ values[:, 0]) / (ends[-1] - 5.0))


def test_series_of_replicas_add_up_side_by_side():
    one, two = Series(("held",), bins=8), Series(("held",), bins=8, width=1.0)
    ends = np.arange(1.0, 7.0)
    one.add(ends, np.ones(6), np.full((6, 1), 3.0))
    two.add(ends[:3], np.ones(3), np.full((3, 1), 4.0))
    one.merge(two)
    assert one.table()["held"] == [7.0] * 3 + [3.0] * 3
    assert one.means["held"] == 5.0
