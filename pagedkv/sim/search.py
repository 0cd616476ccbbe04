"""The edge of what meets a target: the highest rate, the fewest blocks."""

from collections.abc import Callable

from pagedkv.errors import Unattainable

__all__ = ["BLOCKS_WITHIN", "RATE_WITHIN", "highest_rate", "least_blocks"]

RATE_WITHIN = 0.02
BLOCKS_WITHIN = 0.01

_DOUBLINGS = 12


def highest_rate(
    share: Callable[[float], float],
    target: float,
    *,
    start: float = 1.0,
    precision: float = RATE_WITHIN,
) -> float:
    """Return the highest rate at which the share of good requests reaches the target.

    Doubles or halves until the edge is between two rates, then halves the gap: about 15 runs.

    Args:
        share: The share of good requests at a rate; simulates.
        precision: How close to the edge, as a fraction of the rate.

    Raises:
        Unattainable: The target is met at none of, or at all of, the rates from 1/4096 to 4096
            times ``start``.
    """
    good = bad = None
    rate = start
    for _ in range(_DOUBLINGS + 1):
        if share(rate) >= target:
            good, rate = rate, rate * 2
            if bad is not None:
                break
        else:
            bad, rate = rate, rate / 2
            if good is not None:
                break
    if good is None:
        raise Unattainable(
            f"the bounds are not met even at a rate of {bad:.3g}",
            where="capacity",
            remedy="loosen --goodput, lower --good-share, or take faster hardware",
        )
    if bad is None:
        raise Unattainable(
            f"the bounds are still met at a rate of {good:.3g}",
            where="capacity",
            remedy="simulate more requests, so that a queue can build up, or tighten --goodput",
        )
    while bad / good > 1 + precision:
        middle = (good * bad) ** 0.5
        if share(middle) >= target:
            good = middle
        else:
            bad = middle
    return good


def least_blocks(share: Callable[[int], float], target: float, most: int) -> int:
    """Return the fewest blocks, at most ``most``, with which the target is reached: to 1 %.

    Raises:
        Unattainable: It is not reached with ``most``.
    """
    if share(most) < target:
        raise Unattainable(
            f"the bounds are not met even with {most} blocks",
            where="blocks",
            remedy="loosen --goodput, lower the rate, or take faster hardware",
        )
    good, bad = most, 0
    while good - bad > max(1, int(good * BLOCKS_WITHIN)):
        middle = (good + bad) // 2
        if share(middle) >= target:
            good = middle
        else:
            bad = middle
    return good
