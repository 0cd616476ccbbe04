"""What users were promised: latency bounds, written as vLLM's ``--goodput`` has them."""

from collections.abc import Iterable, Mapping

import numpy as np
from msgspec import Struct

from pagedkv.errors import ConfigError

__all__ = ["Objective", "objective"]

METRICS = ("ttft", "tpot", "e2el")


class Objective(Struct, frozen=True, kw_only=True):
    """Bounds in seconds; a request is good if it keeps all of them.

    Attributes:
        ttft: Until the first token.
        tpot: Per token after the first, on average.
        e2el: Until the last token.
    """

    ttft: float = np.inf
    tpot: float = np.inf
    e2el: float = np.inf

    @property
    def bounds(self) -> bool:
        """Whether it asks for anything."""
        return min(self.ttft, self.tpot, self.e2el) < np.inf

    def kept(self, ttft: float, tpot: float, e2el: float) -> bool:
        """Return whether a request with these latencies is good."""
        return ttft <= self.ttft and tpot <= self.tpot and e2el <= self.e2el


def objective(words: Iterable[str] | Mapping[str, float]) -> Objective:
    """Read ``["ttft:200", "tpot:50"]``, or a mapping of the same, in milliseconds.

    Raises:
        ConfigError: A metric is unknown, named twice, or its bound is no positive number.
    """
    pairs = words.items() if isinstance(words, Mapping) else (w.partition(":")[::2] for w in words)
    found: dict[str, float] = {}
    for name, value in pairs:
        if name not in METRICS or name in found:
            raise ConfigError(
                f"{name!r} is not a latency bound or is given twice",
                where="goodput",
                remedy=f"give {', '.join(METRICS)}, each as NAME:MILLISECONDS and once",
            )
        try:
            bound = float(value)
        except ValueError:
            bound = np.nan
        if not bound > 0:
            raise ConfigError(
                f"the bound of {name} is {value!r}",
                where="goodput",
                remedy="give milliseconds, such as ttft:200",
            )
        found[name] = bound / 1000
    return Objective(**found)
