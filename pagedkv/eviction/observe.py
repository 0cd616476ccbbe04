"""From what the device delivers to what selection compares: update accumulators, rank blocks."""

import numpy as np

from pagedkv.eviction.policy import Policy
from pagedkv.eviction.scores import Step
from pagedkv.eviction.view import Float32, Int, View

__all__ = ["observe_from", "observing_queries", "rank", "update"]


def observe_from(policy: Policy, view: View, count: Int) -> Int:
    """Return the first query of a step that the score needs: [N], from 0 to ``count``.

    Windowed scores need the last bucket before each round alone, so most of a prompt runs without
    scoring; a policy that never evicts, and one that ranks by position, need no query at all.

    Args:
        policy: The policy.
        view: The tables before the step.
        count: [N] Queries of the step; it crosses no round.
    """
    score = policy.scorer()
    if score.observe == "none" or not policy.evicts:
        return np.asarray(count)
    if score.lookback != "window":
        return np.zeros_like(count)
    cadence = policy.cadence(view.round_size)
    size = cadence.bucket(policy.parameter or 1)
    end = cadence.next_round(view.num_computed, view.num_prompt)
    return np.clip((end - 1) // size * size - view.num_computed, 0, count)


def observing_queries(policy: Policy, view: View, count: Int) -> Float32:
    """Return how many queries of a step observe each entry: [N, W] fp32.

    A query observes the entries that it sees whole: those sealed before it or by it.
    """
    first = view.num_resident + observe_from(policy, view, count)
    end = (view.num_resident + count).astype(np.float32)
    sealer = ((view.entry + 1) * view.block_size - 1).astype(np.float32)
    # In place: at a thousand tables, fresh pages cost more than the arithmetic.
    seen: Float32 = np.maximum(sealer, first.astype(np.float32)[:, None])
    np.subtract(end[:, None], seen, out=seen)
    return np.maximum(seen, 0, out=seen)


def update(policy: Policy, view: View, count: Int, observation: Float32) -> tuple[Float32, Float32]:
    """Return score and weight after a step: [N, W] each. Pure: writes into neither.

    Updates of one epoch add up, so observations may be gathered over several steps, as long as
    none of them crosses a round, and given at once with their counts added.

    Args:
        policy: The policy of all N tables.
        view: The tables before the step; ``score`` and ``weight`` already as wide as after it,
            and 0 in new entries.
        count: [N] Queries of the step, 0 where a table took no part.
        observation: [N, W] What ``policy.scorer().observe`` names; 0 where nothing was observed.
    """
    score = policy.scorer()
    if score.observe == "none":
        return view.score, view.weight
    step = Step(
        score=view.score,
        weight=view.weight,
        observation=observation.astype(np.float32, copy=False),
        seen=observing_queries(policy, view, count),
        start=np.where(count > 0, view.num_computed, 0),
        num_prompt=view.num_prompt,
        cadence=policy.cadence(view.round_size),
    )
    return score.update(step, policy.parameter or 0.0)


def rank(policy: Policy, view: View) -> Float32:
    """Return what blocks are compared by: [N, W] fp32, higher is kept.

    A block that no query observed yet ranks above all that were heard. Means are taken over the
    queries that observed a block, so few of them weigh as much as many; sums and counts are not,
    so they put a new block behind: give their policies ``recent``.
    """
    ranks = policy.scorer().rank(view, policy.cadence(view.round_size), policy.parameter or 0.0)
    return ranks.astype(np.float32, copy=False)
