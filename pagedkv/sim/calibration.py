"""Fits the cost model's efficiencies to measured step times, and says how well they fit."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float64
from pagedkv.errors import ConfigError
from pagedkv.sim.cost import CostModel, StepWork

__all__ = ["Fit", "fit", "stacked"]

_FITTED = ("weight_efficiency", "matmul_efficiency", "kv_efficiency", "attention_efficiency")
_ROUNDS = 60
_STARTS = 10  # overheads to begin with
_LARGEST = 1.0  # more than the data sheet says, nothing reaches


class Fit(Struct, frozen=True, kw_only=True):
    """A fitted cost model and its relative errors on what it was fitted to.

    Attributes:
        mean_error, max_error: Of ``|predicted - measured| / measured``.
        num_steps: Step times it was fitted to.
    """

    cost: CostModel
    mean_error: float
    max_error: float
    num_steps: int


def stacked(works: Sequence[StepWork]) -> StepWork:
    """Return many steps' work as one of arrays."""
    return StepWork(
        **{
            name: np.array([getattr(work, name) for work in works], np.float64)
            for name in StepWork.__struct_fields__
        }
    )


def fit(start: CostModel, work: StepWork, seconds: Float64) -> Fit:
    """Fit efficiencies and overhead by pattern search on the mean relative error.

    The error is not smooth in the parameters and there are only five, so each is moved up and
    down by a factor that shrinks until nothing gets better: deterministic, no derivatives. Two
    that stand for one another are moved against each other as well, or the search would end there.

    Args:
        start: The hardware and model, and where the search begins.
        work: Arrays of [N] steps.
        seconds: [N] What each took.

    Raises:
        ConfigError: Fewer steps than parameters, or a time that is not positive.
    """
    seconds = np.asarray(seconds, np.float64)
    if len(seconds) <= len(_FITTED):
        raise ConfigError(
            f"{len(seconds)} step times for {len(_FITTED) + 1} unknowns",
            where="calibration",
            remedy="measure more steps, of different sizes",
        )
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ConfigError(
            "a step time is not a positive number", where="calibration", remedy="measure again"
        )
    terms = start.terms(work)
    fixed = np.asarray(terms["fixed"], np.float64)
    parts = np.stack(
        [np.broadcast_to(terms[name], seconds.shape) for name in ("weights", "matmul")]
        + [np.broadcast_to(terms[name], seconds.shape) for name in ("kv", "attention")]
    ).astype(np.float64)

    def errors(point: Float64) -> Float64:
        scaled = parts / point[:4, None]
        total = np.hypot(scaled[0], scaled[1]) + scaled[2] + scaled[3] + fixed + point[4]
        gap: Float64 = np.abs(total - seconds) / seconds
        return gap

    first = np.array([getattr(start, name) for name in _FITTED] + [start.overhead])
    point = _search(errors, first, float(seconds.min()), float(parts[0].max()))
    found = dict(zip(_FITTED, np.round(point[:4], 4).tolist(), strict=True))
    cost = msgspec.structs.replace(start, **found, overhead=round(float(point[4]), 7))
    gap = np.abs(cost.seconds(work) - seconds) / seconds
    return Fit(
        cost=cost,
        mean_error=float(gap.mean()),
        max_error=float(gap.max()),
        num_steps=len(seconds),
    )


def _search(
    errors: Callable[[Float64], Float64], first: Float64, shortest: float, weights: float
) -> Float64:
    """Return the best point of several pattern searches: four efficiencies and an overhead.

    Args:
        shortest: The least of the times.
        weights: Seconds to read all weights at full bandwidth.
    """
    best, lowest = first, float("inf")
    for overhead in np.linspace(0.0, 0.9, _STARTS) * shortest:
        point = first.copy()
        point[4] = overhead
        value, stride = float(errors(point).mean()), 0.4
        for _ in range(_ROUNDS):
            before = value
            for move in range(12):
                trial = _moved(point, move, stride, shortest, weights)
                if (score := float(errors(trial).mean())) < value:
                    point, value = trial, score
            stride *= 1.0 if value < before else 0.6
        if value < lowest:
            best, lowest = point, value
    return best


def _moved(point: Float64, move: int, stride: float, shortest: float, weights: float) -> Float64:
    """Return a point after one of 12 moves: each of five numbers up or down, or time taken from
    reading weights for the overhead and back, which are nearly the same to a small batch.
    """
    axis, sign = move // 2, 1 - 2 * (move % 2)
    trial = point.copy()
    if axis < 4:
        trial[axis] = np.clip(trial[axis] * (1 + stride) ** sign, 1e-6, _LARGEST)
        return trial
    trial[4] = max(0.0, trial[4] + sign * stride * 0.5 * shortest)
    if axis == 5:
        left = weights / point[0] + point[4] - trial[4]
        trial[0] = np.clip(weights / max(left, 1e-12), 1e-6, _LARGEST)
    return trial
