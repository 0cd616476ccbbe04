"""What the numbers that describe a workload may be: one table, for generators and readers."""

import math
from numbers import Integral
from typing import NamedTuple

from pagedkv.errors import ConfigError

__all__ = ["LARGEST_LENGTH", "RANGES", "Range", "check"]

LARGEST_LENGTH = 2**24


class Range(NamedTuple):
    """All numbers from ``least`` to ``most``, both included; only whole ones if ``whole``."""

    least: float
    most: float
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if self.whole and not isinstance(value, Integral):
            return False
        return self.least <= value <= self.most  # type: ignore[operator]  # NaN is in no range

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        most = "inf" if math.isinf(self.most) else f"{self.most:,.15g}"
        return f"a {kind} from {self.least:,g} to {most}"


RANGES = {
    "num_prompts": Range(1, 10**9, whole=True),
    "rate": Range(1e-9, math.inf),
    "burstiness": Range(1e-9, math.inf),
    "speedup": Range(1e-6, 1e6),
    "mean": Range(1, LARGEST_LENGTH),
    "most": Range(1, LARGEST_LENGTH, whole=True),
    "spread": Range(0, 100),
    "prefix_len": Range(0, LARGEST_LENGTH, whole=True),
    "num_prefixes": Range(1, 10**9, whole=True),
    "num_tenants": Range(1, 10**6, whole=True),
    "skew": Range(0, 20),
    "turns": Range(1, 1e6),
    "think": Range(0, 1e9),
    "block_size": Range(1, LARGEST_LENGTH, whole=True),
    "seconds": Range(1e-12, 1e9),
    "session_rate": Range(1e-9, math.inf),
    "start": Range(0, 1e12),
    "duration": Range(1e-9, math.inf),
    "seed": Range(0, 2**63 - 1, whole=True),
}
"""Per parameter, its range; infinite where that has a meaning: all at once, to the end."""


def check(where: str, **values: float) -> None:
    """Compare parameters with their ranges; those that have none pass.

    Raises:
        ConfigError: Naming the first that is outside, and its range.
    """
    for name, value in values.items():
        if name in RANGES and value not in RANGES[name]:
            raise ConfigError(
                f"{name} is {value}", where=f"{where}.{name}", remedy=f"give {RANGES[name]}"
            )
