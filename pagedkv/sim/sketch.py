"""Distributions and time series in bounded memory, however long a simulation runs."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Float64, Int64

__all__ = ["Distribution", "Series"]

_EXACT = 65_536
_GROWTH = 1.002  # bins this much apart: within 0.1 % of any value
_SMALLEST = 1e-7
_AT_ONCE = 512
_BINS = int(math.log(1e14) / math.log(_GROWTH)) + 2


class Distribution:
    """Values that came in, each any number of times: exact at first, then in narrow log bins.

    Up to 65,536 values percentiles are exact. Beyond, they are within 0.1 % of a value that was
    seen (the bins of DDSketch, Masson et al. 2019); mean, deviation, least and greatest stay
    exact. Memory: 0.6 MB at most. Values below 1e-7 count as 0.
    """

    def __init__(self) -> None:
        self._count = 0
        self._total = 0.0
        self._squares = 0.0
        self._least = math.inf
        self._greatest = -math.inf
        self._ones: list[float] = []  # what has come and was not counted yet, value by value
        self._many: list[tuple[Float64, int]] = []  # and by the array
        self._exact: list[tuple[Float64, Int64]] = []
        self._stored = 0
        self._bins: Int64 | None = None

    def add(self, values: float | Float64, times: int = 1) -> None:
        """Take in a value, or an array of them that will not change, each so many times."""
        if isinstance(values, np.ndarray):
            self._many.append((values, times))
        else:
            self._ones += [values] * times
        if len(self._ones) + len(self._many) >= _AT_ONCE:
            self._settle()

    def add_each(self, values: Float64, times: Int64) -> None:
        """Take in values, each as often as is said: [N] each, 1 at least."""
        self._settle()
        self._take_in(values, times)

    def _settle(self) -> None:
        """Count what has come in."""
        if not self._ones and not self._many:
            return
        parts = [np.array(self._ones, np.float64), *(values for values, _ in self._many)]
        times = np.array([1, *(times for _, times in self._many)])
        self._ones, self._many = [], []
        self._take_in(np.concatenate(parts), np.repeat(times, [len(part) for part in parts]))

    def _take_in(self, new: Float64, often: Int64) -> None:
        if not new.size:
            return
        weighted = new * often
        self._count += int(often.sum())
        self._total += float(weighted.sum())
        self._squares += float((weighted * new).sum())
        self._least = min(self._least, float(new.min()))
        self._greatest = max(self._greatest, float(new.max()))
        if self._bins is not None:
            self._bin(new, often)
            return
        self._exact.append((new, often))
        self._stored += new.size
        if self._stored > _EXACT:
            self._spill()

    @property
    def count(self) -> int:
        """How many values came in."""
        self._settle()
        return self._count

    @property
    def total(self) -> float:
        """Their sum."""
        self._settle()
        return self._total

    @property
    def least(self) -> float:
        """The least of them; inf of nothing."""
        self._settle()
        return self._least

    @property
    def greatest(self) -> float:
        """The greatest of them; -inf of nothing."""
        self._settle()
        return self._greatest

    def _spill(self) -> None:
        self._bins = np.zeros(_BINS, np.int64)
        for values, often in self._exact:
            self._bin(values, often)
        self._exact = []

    def _bin(self, values: Float64, often: Int64) -> None:
        assert self._bins is not None
        at = np.log(np.maximum(values, _SMALLEST) / _SMALLEST) / math.log(_GROWTH)
        np.add.at(self._bins, np.minimum(at.astype(np.int64), _BINS - 1), often)

    def merge(self, other: "Distribution") -> None:
        """Take in everything another one holds."""
        self._settle()
        other._settle()
        exact, bins = other._exact, other._bins
        if bins is not None:
            if self._bins is None:
                self._spill()
            assert self._bins is not None
            self._bins += bins
        self._count += other._count
        self._total += other._total
        self._squares += other._squares
        self._least = min(self._least, other._least)
        self._greatest = max(self._greatest, other._greatest)
        for values, often in exact:
            if self._bins is not None:
                self._bin(values, often)
            else:
                self._exact.append((values, often))
                self._stored += values.size
        if self._bins is None and self._stored > _EXACT:
            self._spill()

    @property
    def mean(self) -> float:
        """The mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation over all values; 0 of nothing."""
        if not self.count:
            return 0.0
        return math.sqrt(max(0.0, self._squares / self.count - self.mean**2))

    def percentile(self, percent: float | npt.ArrayLike) -> Any:
        """Return percentiles, interpolated as numpy does while values are exact."""
        wanted = np.asarray(percent, np.float64)
        if not self.count:
            return np.zeros(wanted.shape)[()]
        values, often = self.sorted()
        ends = np.cumsum(often)
        at = wanted / 100 * (self.count - 1)
        below = np.searchsorted(ends, np.floor(at), side="right")
        above = np.searchsorted(ends, np.ceil(at), side="right")
        low, high = values[below], values[np.minimum(above, len(values) - 1)]
        return np.clip(low + (high - low) * (at - np.floor(at)), self.least, self.greatest)[()]

    def sorted(self) -> tuple[Float64, Int64]:
        """Return the distinct values in order, bins by their middles, and how often each came."""
        if self._bins is not None:
            at = np.flatnonzero(self._bins)
            middles: Float64 = (_SMALLEST * _GROWTH ** (at + 0.5)).astype(np.float64)
            return middles, self._bins[at]
        values = np.concatenate([v for v, _ in self._exact] or [np.zeros(0)])
        often = np.concatenate([n for _, n in self._exact] or [np.zeros(0, np.int64)])
        order = np.argsort(values, kind="stable")
        return values[order], often[order]

    def summary(
        self, name: str, percents: tuple[float, ...], scale: float
    ) -> dict[str, float | None]:
        """Return mean, median, deviation and percentiles under vLLM's keys; None of nothing."""
        known = {
            f"mean_{name}": self.mean,
            f"median_{name}": float(self.percentile(50)),
            f"std_{name}": self.deviation,
            **{f"p{percent:g}_{name}": float(self.percentile(percent)) for percent in percents},
        }
        return {key: value * scale if self.count else None for key, value in known.items()}


class Series:
    """Time-weighted means of several quantities, and over at most ``2 * bins`` stretches of time.

    What holds during a step is spread over the stretches it lies in. Time that nobody speaks of
    counts, with 0; so what replicas of the same time span hold adds up. Stretches double in width
    whenever time outgrows them, so memory never grows.

    Args:
        names: The quantities.
        bins: Half the most stretches kept.
        width: Seconds of a stretch at first.

    Attributes:
        start: When time begins; set it before anything is added.
    """

    def __init__(self, names: tuple[str, ...], bins: int = 512, width: float = 0.25) -> None:
        self.names = names
        self.width = width
        self.start = 0.0
        self._sums: Float64 = np.zeros((2 * bins, len(names)))  # of quantity times seconds
        self._peaks: Float64 = np.zeros(len(names))
        self._coming: list[tuple[Float64, Float64, Float64]] = []
        self._waiting = 0
        self._more: list[tuple[int, float, float]] = []
        self._end = 0.0

    def add(self, ends: Float64, durations: Float64, values: Float64) -> None:
        """Take in steps: [K] when each ended, [K] how long it was, [K, N] what held during it.

        Each begins when the one before ended, or later. The arrays must not change afterwards.
        """
        self._coming.append((ends, durations, values))
        self._waiting += len(ends)
        if self._waiting >= _AT_ONCE:
            self._settle()

    def add_to(self, name: str, end: float, amount: float) -> None:
        """Add so much, quantity times seconds, to the stretch that ``end`` lies in, or the last."""
        self._more.append((self.names.index(name), end, amount))
        if len(self._more) >= _AT_ONCE:
            self._settle()

    def close(self, end: float, values: Float64) -> None:
        """Say that time goes on until ``end`` if it did not yet, with such values: [N]."""
        self._settle()
        since = max(self._end, self.start)
        if end > since:
            self.add(np.array([end]), np.array([end - since]), values[None, :])

    def _settle(self) -> None:
        """Count what has come in."""
        if self._coming:
            coming, self._coming, self._waiting = self._coming, [], 0
            parts = zip(*coming, strict=True)
            self._spread(*(np.concatenate(part) for part in parts))
        if self._more:
            which, ends, amounts = map(np.array, zip(*self._more, strict=True))
            self._more = []
            at = ((ends - self.start) / self.width).astype(np.int64)
            np.add.at(self._sums, (np.minimum(at, len(self._sums) - 1), which), amounts)

    def _spread(self, ends: Float64, durations: Float64, values: Float64) -> None:
        """Share out what steps add up to among the stretches they lie in."""
        self._peaks = np.maximum(self._peaks, values.max(axis=0))
        self._end = float(ends[-1])
        while self._end - self.start > self.width * len(self._sums):
            self._halve()
        # Sums up to the begin and the end of each step; between them they grow evenly.
        times = np.maximum.accumulate(np.stack([ends - durations, ends], axis=1).ravel())
        times -= self.start
        sums = np.repeat(np.cumsum(durations[:, None] * values, axis=0), 2, axis=0)
        sums[2::2], sums[0] = sums[1:-1:2].copy(), 0.0
        first, last = (np.array([times[0], times[-1]]) / self.width).astype(np.int64).tolist()
        edges = np.arange(first + 1, last + 1) * self.width
        for column, total in zip(self._sums.T, sums.T, strict=True):
            upto = np.interp(edges, times, total)
            share = np.diff(upto, prepend=0.0, append=total[-1])
            column[first : first + len(share)] += share[: len(column) - first]

    def _halve(self) -> None:
        half = len(self._sums) // 2
        sums = np.zeros_like(self._sums)
        sums[:half] = self._sums[0::2] + self._sums[1::2]
        self._sums = sums
        self.width *= 2

    def merge(self, other: "Series") -> None:
        """Add what other replicas did at the same time, quantity by quantity; both start alike.

        Peaks add up, so they bound the sum's peak from above.
        """
        self._settle()
        other._settle()
        while self.width < other.width:
            self._halve()
        while other.width < self.width:
            other._halve()
        self._sums = self._sums + other._sums
        self._peaks = self._peaks + other._peaks
        self._end = max(self._end, other._end)

    @property
    def peaks(self) -> dict[str, float]:
        """The greatest value of each quantity."""
        self._settle()
        return dict(zip(self.names, self._peaks.tolist(), strict=True))

    @property
    def means(self) -> dict[str, float]:
        """The mean of each quantity over all time, from the start to the end of what was added."""
        self._settle()
        total = max(self._end - self.start, 1e-300)
        return dict(zip(self.names, (self._sums.sum(axis=0) / total).tolist(), strict=True))

    def table(self) -> dict[str, list[float]]:
        """Return the middles of the stretches, and the means in each."""
        self._settle()
        span = max(self._end - self.start, 0.0)
        begins = np.arange(min(len(self._sums), math.ceil(span / self.width))) * self.width
        widths = np.minimum(self.width, span - begins)
        rates = self._sums[: len(begins)] / widths[:, None]
        columns = dict(zip(self.names, rates.T.tolist(), strict=True))
        return {"time": (self.start + begins + widths / 2).tolist(), **columns}
