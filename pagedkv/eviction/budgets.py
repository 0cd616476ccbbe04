"""How much may stay: from a policy's budget to the number of blocks each table gives up."""

import math

import numpy as np
import numpy.typing as npt

from pagedkv.eviction.policy import Policy
from pagedkv.eviction.scores import UNOBSERVED
from pagedkv.eviction.view import Bool, Float32, Int, View

__all__ = ["PYRAMID_SLOPE", "block_limit", "floor_blocks", "num_evictions", "recent_tokens"]

PYRAMID_SLOPE = 20
"""PyramidKV's beta: the last layer gets 1/20 of the mean heavy budget (Cai et al. 2024)."""

UNBOUNDED = np.iinfo(np.int32).max


def cap_tokens(policy: Policy, view: View) -> Int:
    """Return the budget of each table before it is spread: [N] tokens, or [] if all have the same.

    ``ratio`` rounds what stays up, and never to nothing; ``adaptive`` rounds down.
    """
    if policy.tokens is not None:
        cap = policy.tokens
    elif policy.adaptive is not None:
        low, high = policy.adaptive
        pressure = min(max(view.pressure, 0.0), 1.0)
        cap = high - math.ceil((high - low) * pressure)
    elif policy.ratio is not None:
        least = max(policy.sinks + policy.recent, view.block_size)
        kept: Int = np.ceil(view.num_computed * (1 - policy.ratio)).astype(np.int64)
        return kept.clip(least)
    else:
        cap = UNBOUNDED
    return np.asarray(cap)


def recent_tokens(policy: Policy, view: View) -> Int:
    """Return how many of the last tokens each table protects: [N]."""
    if not policy.recent_share:
        return np.full(len(view.num_resident), policy.recent, np.int64)
    spare = np.maximum(cap_tokens(policy, view) - policy.sinks, 0)
    recent = np.floor(spare * policy.recent_share).astype(np.int64)
    return np.full(len(view.num_resident), recent)


def block_limit(policy: Policy, view: View) -> Int:
    """Return the most sealed blocks each table may hold after a round: [N].

    A budget of n tokens is ``ceil(n / block_size)`` blocks; the tail comes on top. A pyramid moves
    blocks from upper to lower layers and keeps their sum, to rounding.
    """
    tokens = cap_tokens(policy, view)
    if policy.spread == "pyramid" and view.layers > 1 and policy.capped:
        return _pyramid(policy, view, tokens)
    return np.full(len(view.num_resident), -(-tokens // view.block_size))


def _pyramid(policy: Policy, view: View, tokens: Int) -> Int:
    """Fall linearly from the first layer to the last, around the same mean (PyramidKV).

    Of the heavy tokens h = budget - sinks - recent, the last layer has h / 20 and the first the
    rest of 2 h. Rounding is carried from layer to layer.
    """
    held = policy.sinks + recent_tokens(policy, view)
    heavy = np.maximum(tokens - held, 0).astype(np.float64)
    least = heavy / PYRAMID_SLOPE
    most = 2 * heavy - least
    shape = (view.layers, -1)
    depth = np.arange(view.layers)[:, None] / (view.layers - 1)
    share = held.reshape(shape) + most.reshape(shape) - (most - least).reshape(shape) * depth
    total = np.floor(np.cumsum(share / view.block_size, axis=0) + 0.5).astype(np.int64)
    limits: Int = np.maximum(np.diff(total, axis=0, prepend=0), 1).ravel()
    return limits


def floor_blocks(policy: Policy, view: View) -> Int:
    """Return the sealed blocks that ``threshold`` and ``lowest`` leave: [N], at least one."""
    least = policy.sinks + recent_tokens(policy, view) + view.block_size
    blocks: Int = -(-np.maximum(least, policy.floor) // view.block_size)
    return blocks


def num_evictions(policy: Policy, view: View, candidates: Bool, ranks: Float32) -> Int:
    """Return how many blocks each table gives up in this round: [N], at most its candidates.

    Args:
        policy: The policy.
        view: The tables.
        candidates: [N, W] Entries that may go.
        ranks: [N, W] What `pagedkv.eviction.rank` gave.
    """
    available = np.add.reduce(candidates, axis=1, dtype=np.int32)
    count: Int = np.maximum(view.num_sealed - block_limit(policy, view), 0)
    if policy.threshold is not None:
        below = _below(policy.threshold, view, candidates, ranks)
        count = np.maximum(count, np.minimum(below, _spare(policy, view)))
    elif policy.lowest is not None:
        due = (count > 0) | (not policy.capped)
        part = np.maximum(np.floor(available * policy.lowest).astype(np.int64), 1)
        count = np.maximum(count, np.where(due, np.minimum(part, _spare(policy, view)), 0))
    return count.clip(max=available)


def _spare(policy: Policy, view: View) -> Int:
    """Return how many blocks ``threshold`` and ``lowest`` may take: [N]."""
    spare: Int = np.maximum(view.num_sealed - floor_blocks(policy, view), 0)
    return spare


def _below(threshold: float, view: View, candidates: Bool, ranks: Float32) -> Int:
    """Count candidates below a part of the mean rank of the table's observed, sealed blocks.

    For mean mass that is ``m_b < threshold / number of blocks``; for lift, lift over its mean.
    What has no finite rank is below any threshold.
    """
    finite = np.isfinite(ranks)
    heard = finite & (ranks != np.float32(UNOBSERVED)) & (view.entry < view.num_sealed[:, None])
    total: npt.NDArray[np.float64] = np.where(heard, ranks, 0).sum(axis=1, dtype=np.float64)
    mean = total / np.maximum(heard.sum(axis=1), 1)
    low = ~finite | (ranks < (threshold * mean)[:, None])
    count: Int = (candidates & low).sum(axis=1)
    return count
