"""Quality as numbers: what counts of a score, and how two runs over the same tokens compare."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float64

if TYPE_CHECKING:
    from pagedkv.cli.passages import Passage
    from pagedkv.device.outputs import ScoreOutput

__all__ = ["METRICS", "Comparison", "Metric", "compare"]

SEGMENT = 64
RESAMPLES = 2000


class Metric(Struct, frozen=True, kw_only=True):
    """What a task measures of every passage.

    Attributes:
        name: What it is called in tables.
        exponential: Whether the mean's ``exp`` is reported, and ratios rather than differences.
        of: A passage and its scores to one number per thing that is counted, here *items*.
    """

    name: str
    exponential: bool
    of: "Callable[[Passage, ScoreOutput], Float64]"

    def value(self, items: Sequence[Float64]) -> float:
        """Return the metric over all items."""
        mean = float(np.concatenate(items).mean())
        return float(np.exp(mean)) if self.exponential else mean


class Comparison(Struct, frozen=True, kw_only=True):
    """A run beside the full cache on the same tokens: a ratio or a difference, and its interval."""

    estimate: float
    low: float
    high: float


def _surprise(passage: "Passage", scored: "ScoreOutput") -> Float64:
    surprise: Float64 = -scored.logprobs[passage.start - 1 :].astype(np.float64)
    return surprise


def _greedy(passage: "Passage", scored: "ScoreOutput") -> Float64:
    target = np.array(passage.token_ids[passage.start :])
    hits: Float64 = (scored.greedy[passage.start - 1 :] == target).astype(np.float64)
    return hits


def _all_greedy(passage: "Passage", scored: "ScoreOutput") -> Float64:
    found: Float64 = _greedy(passage, scored).min(keepdims=True)
    return found


METRICS = {
    "perplexity": Metric(name="perplexity", exponential=True, of=_surprise),
    "copy": Metric(name="perplexity", exponential=True, of=_surprise),
    "passkey": Metric(name="accuracy", exponential=False, of=_all_greedy),
    "agreement": Metric(name="agreement", exponential=False, of=_greedy),
}


def compare(
    metric: Metric, items: Sequence[Float64], full: Sequence[Float64], *, seed: int
) -> Comparison:
    """Compare a run with the full cache, item by item.

    Neighbouring tokens are alike, so what is drawn with replacement are segments of up to 64 items
    of one passage; the interval is the middle 95 % of 2,000 such draws. It says how far the result
    depends on which stretches of these texts were read, not on the choice of texts.

    Args:
        items: Per passage, its items.
        full: The same of the full cache.
    """
    pieces = [
        piece
        for own, other in zip(items, full, strict=True)
        for piece in np.split(own - other, np.arange(SEGMENT, len(own), SEGMENT))
    ]
    sums = np.array([piece.sum() for piece in pieces])
    sizes = np.array([len(piece) for piece in pieces])
    draws = np.random.default_rng(seed).integers(0, len(pieces), (RESAMPLES, len(pieces)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    found = np.append(np.percentile(means, (2.5, 97.5)), sums.sum() / sizes.sum())
    low, high, estimate = (np.exp(found) if metric.exponential else found).tolist()
    return Comparison(estimate=estimate, low=low, high=high)
