"""Which blocks go: protect some, rank the others, drop the lowest."""

import numpy as np

from pagedkv.eviction.budgets import block_limit, num_evictions, recent_tokens
from pagedkv.eviction.observe import rank
from pagedkv.eviction.policy import Policy
from pagedkv.eviction.view import Bool, Float32, Int, View

__all__ = ["ADA_FLOOR", "choose", "condemn", "may_evict", "protect", "reach", "select", "survivors"]

ADA_FLOOR = 0.2
"""The part of its even share that every head keeps when heads compete (AdaKV, Feng et al. 2024)."""


def protect(policy: Policy, view: View) -> Bool:
    """Return the entries that must stay: [N, W].

    The first ``ceil(sinks / block_size)`` entries, every entry that holds one of the last
    ``recent`` tokens, and the tail, if it is not full.
    """
    return ~_candidates(policy, view)


def _candidates(policy: Policy, view: View) -> Bool:
    may_go = view.before(_unprotected(policy, view))
    may_go[:, : -(-policy.sinks // view.block_size)] = False
    return may_go


def _unprotected(policy: Policy, view: View) -> Int:
    """Return how many entries lie before the recent ones and the tail: [N], sinks included."""
    begin = (view.num_resident - recent_tokens(policy, view)) // view.block_size
    end: Int = np.minimum(begin, view.num_sealed)
    return end


def reach(policy: Policy, view: View) -> int:
    """Return how many entries of each table it takes to say which go, at least 1; reads no score.

    All further ones are protected, and no other rank depends on them.
    """
    end = _unprotected(policy, view)
    # A threshold goes by the mean of all; so may a score from elsewhere.
    if policy.threshold is not None or ":" in policy.score:
        end = -(-view.num_resident // view.block_size)
    return max(1, int(end.max(initial=1)))


def choose(ranks: Float32, candidates: Bool, num_evict: Int) -> Bool:
    """Return the candidates to evict: [N, W], the lowest first, of equals the oldest.

    A rank that is no finite number counts as the lowest of all: a poisoned block is the first to
    go, and takes the poison with it.

    Args:
        ranks: [N, W] fp32.
        candidates: [N, W] Entries that may go; the others' ranks are not looked at.
        num_evict: [N] How many to take of each table; all candidates if it has fewer.
    """
    most = int(num_evict.max(initial=0))
    if most <= 0:
        return np.zeros_like(candidates)
    keys = ranks.copy("K")
    np.copyto(keys, -np.inf, where=~np.isfinite(ranks))
    np.copyto(keys, np.inf, where=~candidates)
    if most == 1:  # what decode asks for: the first of the lowest, without sorting
        lowest = keys == keys.min(axis=1)[:, None]
        evict: Bool = lowest & candidates & (num_evict > 0)[:, None]
        if np.add.reduce(evict, axis=1, dtype=np.int32).max() > 1:
            evict &= np.arange(evict.shape[1]) == evict.argmax(axis=1)[:, None]
        return evict
    order = np.argsort(keys, axis=1, kind="stable")
    lowest = np.zeros(candidates.shape, np.bool_)
    np.put_along_axis(lowest, order, np.arange(keys.shape[1]) < num_evict[:, None], axis=1)
    evict = lowest & candidates
    return evict


def may_evict(policy: Policy, view: View) -> bool:
    """Return whether `select` could take anything from these tables; reads no score.

    False is certain: all are within their cap, and what may go beyond it goes only with it.
    """
    if policy.threshold is not None or (policy.lowest is not None and not policy.capped):
        return policy.evicts
    return bool((view.num_sealed > block_limit(policy, view)).any())


def select(policy: Policy, view: View) -> Bool:
    """Return which entries stay after a round: [N, W]; entries not in use are False.

    Afterwards a table holds at most ``ceil(budget / block_size)`` sealed blocks (in a pyramid its
    layer's share; with ``ada`` the heads of a layer hold that many on average), unless protection
    demands more. Pure, and the same for a table whatever others stand in the view, ``ada`` apart,
    where the heads of a layer belong together.
    """
    return view.before(-(-view.num_resident // view.block_size)) & ~condemn(policy, view)


def condemn(policy: Policy, view: View) -> Bool:
    """Return which entries go in a round: [N, W]; all others in use `select` lets stay."""
    may_go = _candidates(policy, view)
    if not policy.evicts:
        return np.zeros_like(may_go)
    ranks = rank(policy, view)
    count = num_evictions(policy, view, may_go, ranks)
    if policy.spread == "ada" and view.heads > 1:
        return _choose_jointly(policy, view, ranks, may_go, count)
    return choose(ranks, may_go, count)


def _choose_jointly(
    policy: Policy, view: View, ranks: Float32, candidates: Bool, count: Int
) -> Bool:
    """Let the heads of a layer give up together what each would have alone: [N, W].

    A head never falls below ``ADA_FLOOR`` of its even share, so that one with little mass keeps
    some context.
    """
    limit = np.minimum(block_limit(policy, view), view.num_sealed)
    floor = np.ceil(limit * ADA_FLOOR).astype(np.int64)
    lowest = choose(ranks, candidates, np.maximum(view.num_sealed - floor, 0))
    layers, heads, (tables, width) = view.layers, view.heads, ranks.shape
    rows = tables // (layers * heads)
    # The heads of a layer side by side, entry after entry: of equals, the oldest entry first.
    shape, order = (layers, heads, rows, width), (0, 2, 3, 1)
    joint = (layers * rows, width * heads)
    gone = choose(
        ranks.reshape(shape).transpose(order).reshape(joint),
        lowest.reshape(shape).transpose(order).reshape(joint),
        count.reshape(shape[:3]).sum(axis=1).ravel(),
    )
    apart = gone.reshape(layers, rows, width, heads).transpose(0, 3, 1, 2)
    return apart.reshape(tables, width)


def survivors(keep: Bool) -> tuple[Int, Int]:
    """Return how to gather what stays: order [N, W] and how many entries [N].

    ``np.take_along_axis(column, order, axis=1)`` moves the survivors to the front in their order;
    what follows them is left over.
    """
    return np.argsort(~keep, axis=1, kind="stable"), keep.sum(axis=1)
