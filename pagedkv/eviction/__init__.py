"""Eviction: pure functions on arrays that say which blocks a sequence may forget.

A policy is protect x score x budget. It keeps two fp32 columns per block-table entry, ``score``
and ``weight`` (0 in a new entry, gathered with the table, copied by a fork), and is called twice
in a step, once per distinct policy, on the rows that have it::

    policy = eviction.check(policy, block_size, has_rope=True, granularity="layer")
    cadence = policy.cadence(block_size)          # no step crosses a round:
    count = np.minimum(count, cadence.next_round(num_computed, num_prompt) - num_computed)
    first = eviction.observe_from(policy, before, count)      # [N], to the plan for the device
    ...                                           # runs; gives policy.scorer().observe as [N, W]
    score, weight = eviction.update(policy, before, count, observation)
    rows = rows[cadence.is_round(num_computed, num_prompt)]   # counted after the step
    keep = eviction.select(policy, after)         # [N, W] over those rows: what stays
    order, num_blocks = eviction.survivors(keep)
    column = np.take_along_axis(column, order, axis=1)        # ids, score, first_position ...
    num_resident -= block_size * (num_blocks_before - num_blocks)   # only full blocks go

``before`` and ``after`` are `View` objects: the [groups, rows, W] columns of the chosen rows,
reshaped to [N, W], and facts of a row repeated for each group. A ``spread`` other than "uniform"
needs the view's ``layers`` and ``heads``. To shrink a sequence out of turn, call `select` at any
time with a lower budget: ``eviction.policy(p, budget=n)``. Nothing here imports torch.
"""

from pagedkv.eviction.budgets import block_limit, floor_blocks, num_evictions, recent_tokens
from pagedkv.eviction.language import format_policy, policy, presets
from pagedkv.eviction.observe import observe_from, observing_queries, rank, update
from pagedkv.eviction.policy import Policy, check, lookback
from pagedkv.eviction.rounds import Cadence
from pagedkv.eviction.scores import OBSERVATIONS, SCORES, UNOBSERVED, Score, Step, find_score
from pagedkv.eviction.select import choose, condemn, may_evict, protect, reach, select, survivors
from pagedkv.eviction.view import View

__all__ = [
    "OBSERVATIONS",
    "SCORES",
    "UNOBSERVED",
    "Cadence",
    "Policy",
    "Score",
    "Step",
    "View",
    "block_limit",
    "check",
    "choose",
    "condemn",
    "find_score",
    "floor_blocks",
    "format_policy",
    "lookback",
    "may_evict",
    "num_evictions",
    "observe_from",
    "observing_queries",
    "policy",
    "presets",
    "protect",
    "rank",
    "reach",
    "recent_tokens",
    "select",
    "survivors",
    "update",
]
