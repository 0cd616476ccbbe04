"""What a block is worth: the table of scores, each a pure function on arrays.

Words. A group's step brings Q queries, and h runs over every query head of every layer in the
group. ``m[q, h, b] = exp(lse_b - lse)`` is exactly the softmax mass that query q of head h put on
block b; ``visible[q]`` counts the resident tokens that q could see, itself included, and
``r[q, b]`` is ``m`` reduced over h by the policy's ``gqa``: sum, mean or max.

A query observes a block only if it sees the whole of it: blocks before its own, and its own if it
is the token that fills it. A block's life therefore starts when it seals; its own first tokens,
which always look at themselves, do not flatter it. Of those queries, the device delivers one
number per (group, sequence, block) and step; blocks that no query observed get 0:

    none            nothing
    mass_sum        sum over q of r[q, b]
    mass_max        max over q of r[q, b]
    mass_last       r[Q - 1, b]: the step's last query alone
    mass_low        how many q have r[q, b] * visible[q] < R * block_size, where R is the number of
                    heads for ``gqa=sum`` and 1 otherwise: less than an even share
    lift_sum        sum over q of r[q, b] * visible[q] / block_size: 1 per query under uniform
                    attention, whenever the block was written
    lift_max        max over q of the same
    lobo_sum        sum over q of gqa over h of m / max(1 - m, 1e-6) * |o[q, h] - o_b[q, h]|: how
                    far the output moves if the block is left out
    key_norm        mean over the block's tokens of |k|, reduced over KV heads by gqa
    value_key_norm  the same of |v| / |k|
    key_diff        the same of cos(k, c), where c is the mean of the unit keys resident up to and
                    including this block, when it sealed

The last three depend on the block alone (``static``): they are read once, when it seals, or when a
prefix hit brings it in. All are fp32.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.errors import PolicyError
from pagedkv.eviction.rounds import Cadence
from pagedkv.eviction.view import Bool, Float32, Int, View

__all__ = ["OBSERVATIONS", "SCORES", "UNOBSERVED", "Score", "Step", "find_score"]

OBSERVATIONS = (
    "none",
    "mass_sum",
    "mass_max",
    "mass_last",
    "mass_low",
    "lift_sum",
    "lift_max",
    "lobo_sum",
    "key_norm",
    "value_key_norm",
    "key_diff",
)

UNOBSERVED = float(np.finfo(np.float32).max)
"""The rank of a block that no query has observed: it goes after all that were heard."""


class Step(Struct, frozen=True, kw_only=True, eq=False):
    """What one step, or several of one epoch added up, tells a score.

    Attributes:
        score: [N, W] First accumulator before the step.
        weight: [N, W] Second accumulator before the step.
        observation: [N, W] What the device delivered.
        seen: [N, W] fp32, queries of the step that observed each entry; 0 where none did.
        start: [N] Tokens computed before the step.
        num_prompt: [N] Tokens of the prompt.
        cadence: Where the rounds lie.
    """

    score: Float32
    weight: Float32
    observation: Float32
    seen: Float32
    start: Int
    num_prompt: Int
    cadence: Cadence


Update = Callable[[Step, float], tuple[Float32, Float32]]
Rank = Callable[[View, Cadence, float], Float32]


class Score(Struct, frozen=True, kw_only=True, eq=False):
    """One row of the table.

    Attributes:
        observe: What the device delivers each step, one of ``OBSERVATIONS``.
        update: (step, parameter) -> the two accumulators after it, [N, W] each; pure.
        rank: (view, cadence, parameter) -> [N, W], higher is kept; pure.
        parameter: The parameter's default; None if the score takes none.
        low: The least that the parameter may be.
        high: The parameter lies below it.
        lookback: How many past queries the rank depends on: 0 for position or content alone,
            None for all since the block sealed, "window" for what `Cadence.bucket` makes of the
            parameter.
        static: The observation never changes once the block is sealed.
        relative: Ranks are amounts of attention, so ``threshold`` may compare them to their mean.
        weighs: Ranks depend on how many queries observed an entry, or on where it stands; not only
            on whether any did.
    """

    observe: str
    update: Update
    rank: Rank
    parameter: float | None = None
    low: float = 0.0
    high: float = float("inf")
    lookback: int | Literal["window"] | None = None
    static: bool = False
    relative: bool = True
    weighs: bool = True

    @property
    def counts(self) -> bool:
        """Whether an update adds what was observed, by every query since an entry sealed.

        The second accumulator then is how many those are (`View.queries_since_sealed`), or
        whether there are any, where the rank asks no more (`weighs`).
        """
        return self.update is _add and self.lookback is None

    @property
    def places(self) -> bool:
        """Whether where entries stand is kept for it: to rank by, or to count who observed them."""
        return self.weighs or not self.counts


# Updates


def _add(step: Step, _: float) -> tuple[Float32, Float32]:
    return step.score + step.observation, step.weight + step.seen


def _highest(step: Step, _: float) -> tuple[Float32, Float32]:
    best = np.where(step.seen > 0, np.maximum(step.score, step.observation), step.score)
    return best, step.weight + step.seen


def _replace(step: Step, _: float) -> tuple[Float32, Float32]:
    return np.where(step.seen > 0, step.observation, step.score), step.weight + step.seen


def _once(step: Step, _: float) -> tuple[Float32, Float32]:
    """Read a static observation the first time that a block is seen."""
    fresh = (step.seen > 0) & (step.weight == 0)
    return (
        np.where(fresh, step.observation, step.score),
        np.where(fresh, np.float32(1), step.weight),
    )


def _decay(step: Step, gamma: float) -> tuple[Float32, Float32]:
    """Add, after fading all earlier epochs by gamma per query of the one that just ended."""
    faded = np.power(gamma, step.cadence.ended(step.start, step.num_prompt)).astype(np.float32)
    keep = faded[:, None]
    return step.score * keep + step.observation, step.weight * keep + step.seen


def _roll(step: Step, window: float) -> tuple[Float32, Float32]:
    """Add to the current bucket (score); where a new one begins, the old becomes weight.

    Buckets are aligned: bucket j holds the queries at positions [j * w, (j + 1) * w). Of an epoch
    only the bucket that ends it is observed (`observed_from`), so one sum per step is enough.
    """
    size = step.cadence.bucket(window)
    at_round = step.cadence.ended(step.start, step.num_prompt) > 0
    bucket = (step.cadence.next_round(step.start, step.num_prompt) - 1) // size
    turned = (at_round & (bucket != (step.start - 1) // size))[:, None]
    current = np.where(turned, np.float32(0), step.score)
    return current + step.observation, np.where(turned, step.score, step.weight)


def _keep(step: Step, _: float) -> tuple[Float32, Float32]:
    return step.score, step.weight


# Ranks


def _total(view: View, _: Cadence, __: float) -> Float32:
    return np.where(view.weight > 0, view.score, np.float32(UNOBSERVED))


def _mean(view: View, _: Cadence, __: float) -> Float32:
    seen: Bool = view.weight > 0
    return np.divide(view.score, view.weight, out=np.full_like(view.score, UNOBSERVED), where=seen)


def _negative(view: View, _: Cadence, __: float) -> Float32:
    return np.where(view.weight > 0, -view.score, np.float32(UNOBSERVED))


def _windowed(view: View, cadence: Cadence, window: float) -> Float32:
    """Return the current bucket plus the part of the one before that completes the window.

    With c queries in the current bucket: its sum + (1 - c / w) * the sum of the bucket observed
    before it. At the end of a bucket that is exactly the last w queries.
    """
    size = cadence.bucket(window)
    begin = (cadence.epoch_end(view.num_computed, view.num_prompt) - 1) // size * size
    filled = np.clip(view.num_computed - begin, 0, size)
    missing = (size - filled).astype(np.float32)[:, None]
    # Divided last: of whole numbers, which `low` counts, equal ranks are then equal in fp32 too.
    whole: Float32 = np.float32(size) * view.score + missing * view.weight
    return whole / np.float32(size)


def _windowed_negative(view: View, cadence: Cadence, window: float) -> Float32:
    return -_windowed(view, cadence, window)


def _position(view: View, _: Cadence, __: float) -> Float32:
    return view.first_position.astype(np.float32)


def _hash(view: View, _: Cadence, seed: float) -> Float32:
    """Return a number in [0, 1) that only the seed and the block's position decide.

    Ranks never change, so what survives is a uniform sample of the whole history. The mixer is
    murmur3's 32-bit finaliser (Appleby, public domain).
    """
    word = view.first_position.astype(np.uint32) + np.uint32((int(seed) * 0x9E3779B9) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> np.uint32(shift))) * np.uint32(factor)
    word ^= word >> np.uint32(16)
    ranks: Float32 = (word >> np.uint32(8)).astype(np.float32) / np.float32(2**24)
    return ranks


SCORES: dict[str, Score] = {
    # Accumulated mass. Favours the old even under uniform attention (H2O, Zhang et al. 2023).
    "sum": Score(observe="mass_sum", update=_add, rank=_total, weighs=False),
    # Mass per query that could see the block (kvpress "observed attention").
    "mean": Score(observe="mass_sum", update=_add, rank=_mean),
    # The most that any one query cared.
    "max": Score(observe="mass_max", update=_highest, rank=_total),
    # Mean that fades by the parameter per query, in steps of an epoch.
    "ema": Score(observe="mass_sum", update=_decay, rank=_mean, parameter=0.99, high=1.0),
    # The last query alone (TOVA, Oren et al. 2024).
    "last": Score(observe="mass_last", update=_replace, rank=_total, lookback=1),
    # Mean of mass relative to an even share: 1 under uniform attention, at any age.
    "lift": Score(observe="lift_sum", update=_add, rank=_mean),
    # The most that any one query cared, relative to its even share.
    "lift_max": Score(observe="lift_max", update=_highest, rank=_total),
    # Mass from the last w queries (SnapKV, Li et al. 2024).
    "window": Score(
        observe="mass_sum", update=_roll, rank=_windowed, parameter=64, low=1, lookback="window"
    ),
    # Of the last w queries, those that gave it an even share (Scissorhands, Liu et al. 2023).
    "low": Score(
        observe="mass_low",
        update=_roll,
        rank=_windowed_negative,
        parameter=400,
        low=1,
        lookback="window",
        relative=False,
    ),
    # Mean leave-one-block-out error of the attention output.
    "lobo": Score(observe="lobo_sum", update=_add, rank=_mean),
    # Small keys attract attention (Devoto et al. 2024).
    "key_norm": Score(
        observe="key_norm", update=_once, rank=_negative, lookback=0, static=True, relative=False
    ),
    # Large values behind small keys (PagedEviction, Chitty-Venkata et al. 2025).
    "value_key_norm": Score(
        observe="value_key_norm", update=_once, rank=_total, lookback=0, static=True, relative=False
    ),
    # Keys unlike the others (KeyDiff, Park et al. 2025).
    "key_diff": Score(
        observe="key_diff", update=_once, rank=_negative, lookback=0, static=True, relative=False
    ),
    # A uniform sample of the history; the parameter is the seed.
    "random": Score(
        observe="none", update=_keep, rank=_hash, parameter=0, lookback=0, relative=False
    ),
    # The newest.
    "age": Score(observe="none", update=_keep, rank=_position, lookback=0, relative=False),
}


def find_score(name: str, parameter: float | None = None) -> Score:
    """Return a score of the table, or the one that ``"module:function"`` names.

    ``function`` is a `Score`, or is called with the parameter, if the expression gave one, and
    returns a `Score`.

    Raises:
        PolicyError: No such score, module or function, or it gives something else.
    """
    if ":" not in name:
        return SCORES[name]
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
        if callable(made):
            made = made() if parameter is None else made(parameter)
    except Exception as fault:  # somebody else's module may raise anything
        raise PolicyError(
            f"score {name!r} cannot be loaded: {type(fault).__name__}: {fault}",
            where="policy.score",
            remedy="name an importable module and a function in it",
        ) from fault
    if not isinstance(made, Score) or made.observe not in OBSERVATIONS:
        raise PolicyError(
            f"score {name!r} gives {made!r}",
            where="policy.score",
            remedy=f"return a Score that observes one of {', '.join(OBSERVATIONS)}",
        )
    if made.lookback == "window" and parameter is None and made.parameter is None:
        raise PolicyError(
            f"score {name!r} looks back a window of no length",
            where="policy.score",
            remedy="give the Score a parameter, or another lookback",
        )
    return _guarded(name, made)


def _guarded(name: str, made: Score) -> Score:
    """Return an out-of-tree score whose functions fail by name, or give arrays of the right shape.

    What the table's own updates do is known, and `Score.counts` goes by their identity.
    """

    def arrays(call: Callable[[], Any], what: str, shapes: list[tuple[int, ...]]) -> Any:
        try:
            found = call()
            given = found if len(shapes) > 1 else (found,)
            given = tuple(np.asarray(each, np.float32) for each in given)
            if [each.shape for each in given] != shapes:
                raise ValueError(f"shapes {[each.shape for each in given]}, not {shapes}")
        except Exception as fault:
            raise PolicyError(
                f"{what} of score {name!r} failed: {type(fault).__name__}: {fault}",
                where="policy.score",
                remedy="mend it; see pagedkv.eviction.Score for what it is given and returns",
            ) from fault
        return given if len(shapes) > 1 else given[0]

    def update(step: Step, parameter: float) -> tuple[Float32, Float32]:
        call = functools.partial(made.update, step, parameter)
        return arrays(call, "update", [step.score.shape] * 2)  # type: ignore[no-any-return]

    def rank(view: View, cadence: Cadence, parameter: float) -> Float32:
        call = functools.partial(made.rank, view, cadence, parameter)
        return arrays(call, "rank", [view.score.shape])  # type: ignore[no-any-return]

    own = made.update in {score.update for score in SCORES.values()}
    changed = {"rank": rank} if own else {"rank": rank, "update": update}
    return msgspec.structs.replace(made, **changed)
