"""A policy is plain data: what is protected, how the rest is scored, how much may stay."""

from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

from pagedkv.errors import PolicyError, shown
from pagedkv.eviction.rounds import Cadence
from pagedkv.eviction.scores import SCORES, Score, find_score

__all__ = ["Policy", "check", "lookback"]

MOST_TOKENS = 2**30
Tokens = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
Limit = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
Fraction = Annotated[float, Meta(gt=0, lt=1)]


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be forgotten; `pagedkv.eviction.policy` reads one from an expression or a preset.

    At most one of ``tokens``, ``ratio`` and ``adaptive`` caps what stays; at most one of
    ``threshold`` and ``lowest`` decides how much more goes in a round. With neither, nothing is
    ever evicted. Protection wins over every budget.

    Attributes:
        sinks: The first tokens, never evicted; they take whole blocks.
        recent: The last tokens, never evicted; every block that holds one of them stays.
        recent_share: The same as a share of the cap less the sinks; instead of ``recent``.
        score: A name of the table of scores, or "module:function".
        parameter: The score's parameter; None takes the table's default.
        tokens: The cap: tokens that stay per sequence and group.
        ratio: The cap as the fraction of all computed tokens that is *removed*.
        adaptive: The cap from (floor, ceiling): the ceiling while the pool is empty, less in
            proportion to how full it is. What stays then depends on who else runs.
        threshold: In each round, evict what scores below this part of the table's mean score.
        lowest: In each round that finds the cap exceeded, or in every round if there is no cap,
            evict this fraction of the candidates, at least one block.
        floor: ``threshold`` and ``lowest`` leave this many tokens, and at least one block more
            than sinks and recent.
        spread: How layers or heads share a cap: "uniform"; "pyramid", the lower layers more;
            "ada", the heads of a layer compete for it.
        gqa: How mass is reduced over the query heads, and layers, that share a table.
        positions: "cache" closes the gaps that eviction leaves, "original" keeps them; "auto" is
            "cache" if the model has rotary positions and whole blocks are evicted.
        unit: Evict whole blocks ("block"), or tokens, repacking what is left ("token"); every
            count of blocks in these words is then one of tokens. Tokens keep their original
            positions: their keys are moved as they are, and each would want a turn of its own.
        chunk: Prompt tokens between two rounds of eviction; rounded up to whole blocks.

    Raises:
        PolicyError: A value is out of range or the parts contradict each other.
    """

    sinks: Tokens = 0
    recent: Tokens = 0
    recent_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    score: str = "age"
    parameter: float | None = None
    tokens: Limit | None = None
    ratio: Fraction | None = None
    adaptive: tuple[Limit, Limit] | None = None
    threshold: Annotated[float, Meta(gt=0)] | None = None
    lowest: Fraction | None = None
    floor: Tokens = 0
    spread: Literal["uniform", "pyramid", "ada"] = "uniform"
    gqa: Literal["sum", "mean", "max"] = "mean"
    positions: Literal["auto", "cache", "original"] = "auto"
    unit: Literal["block", "token"] = "block"
    chunk: Limit = 256

    def __post_init__(self) -> None:
        for name, hint in _HINTS.items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, hint)
            except msgspec.ValidationError as fault:
                expected = str(fault).split(" - at ")[0].removeprefix("Expected ")
                raise _fault(name, f"{name} is {shown(value)}", f"give {expected}") from None
            except OverflowError:
                raise _fault(name, f"{name} is {shown(value)}", "give less") from None
        if self.score in SCORES and self.parameter is None:
            msgspec.structs.force_setattr(self, "parameter", SCORES[self.score].parameter)
        _check_score(self)
        _check_unit(self)
        _check_budget(self)
        _check_protection(self)

    @property
    def evicts(self) -> bool:
        """Whether the policy can evict at all."""
        return self.capped or self.threshold is not None or self.lowest is not None

    @property
    def capped(self) -> bool:
        """Whether the policy bounds what stays."""
        return not (self.tokens is None and self.ratio is None and self.adaptive is None)

    @property
    def shrinks(self) -> bool:
        """Whether sequences can be made to forget more between rounds.

        None that ranks tokens: packing what it keeps may take blocks.
        """
        return self.adaptive is not None and self.unit == "block"

    @property
    def agrees(self) -> bool:
        """Whether all tables of a sequence give up the same entries, windows apart.

        A score from elsewhere may rank by layer and head, even where it observes nothing.
        """
        by_position = self.scorer().observe == "none" and ":" not in self.score
        return by_position and self.spread == "uniform" and not self.shrinks

    @property
    def scores_errors(self) -> bool:
        """Whether entries are ranked by how far the output moves without them."""
        return self.evicts and self.scorer().observe == "lobo_sum"

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that a cap in tokens lets stay; None if nothing bounds them."""
        return self.tokens if self.adaptive is None else self.adaptive[1]

    def cadence(self, block_size: int) -> Cadence:
        """Return where the rounds lie for blocks of this size."""
        return Cadence(-(-self.chunk // block_size) * block_size, block_size)

    def scorer(self) -> Score:
        """Return the row of the table that ranks blocks; loads an out-of-tree one."""
        return find_score(self.score, self.parameter)


_HINTS: dict[str, Any] = {
    name: hint
    for name, hint in get_type_hints(Policy, include_extras=True).items()
    if name in Policy.__struct_fields__
}


def _fault(field: str, what: str, remedy: str) -> PolicyError:
    return PolicyError(what, where=f"policy.{field}", remedy=remedy)


def _check_score(policy: Policy) -> None:
    if ":" in policy.score:
        return
    if policy.score not in SCORES:
        raise _fault("score", f"unknown score {policy.score!r}", f"give one of {', '.join(SCORES)}")
    row, value = SCORES[policy.score], policy.parameter
    if row.parameter is None:
        if value is not None:
            raise _fault("score", f"score {policy.score!r} takes no parameter", "leave it out")
    elif value is None or not row.low <= value < min(row.high, MOST_TOKENS):
        bound = f", below {min(row.high, MOST_TOKENS):g}"
        raise _fault(
            "score",
            f"the parameter of score {policy.score!r} is {value}",
            f"give a number from {row.low:g}{bound}",
        )
    if policy.threshold is not None and not row.relative:
        raise _fault(
            "threshold",
            f"score {policy.score!r} is no amount of attention that a threshold could divide",
            f"score by one of {', '.join(n for n, s in SCORES.items() if s.relative)}",
        )


def _check_unit(policy: Policy) -> None:
    if policy.unit == "token" and policy.positions == "cache":
        raise _fault(
            "positions",
            "cache positions close gaps between blocks, and unit=token leaves them between tokens",
            "give positions=original, or unit=block",
        )


def _check_budget(policy: Policy) -> None:
    caps = [name for name in ("tokens", "ratio", "adaptive") if getattr(policy, name) is not None]
    if len(caps) > 1:
        raise _fault(caps[1], f"{caps[0]} and {caps[1]} are both given", "give one of them")
    if policy.threshold is not None and policy.lowest is not None:
        raise _fault("lowest", "threshold and lowest are both given", "give one of them")
    if policy.threshold is not None and policy.threshold >= 1:
        raise _fault(
            "threshold",
            f"threshold={policy.threshold:g} would evict every block of an evenly attended "
            "sequence",
            "give a number below 1, the even share",
        )
    if policy.adaptive is not None and policy.adaptive[0] > policy.adaptive[1]:
        low, high = policy.adaptive
        raise _fault("adaptive", f"the floor {low} is above the ceiling {high}", "swap them")
    if policy.spread != "uniform" and not policy.capped:
        raise _fault("spread", f"there is no budget to spread by {policy.spread!r}", "give one")


def _check_protection(policy: Policy) -> None:
    if policy.recent and policy.recent_share:
        raise _fault("recent", "recent is given in tokens and as a share", "give one of them")
    if policy.recent_share and not policy.capped:
        raise _fault("recent", "recent is a share of a budget that is not given", "give a budget")
    least = policy.tokens if policy.adaptive is None else policy.adaptive[0]
    if least is None:
        return
    held = policy.sinks + policy.recent
    if held > least:
        raise _fault(
            "recent" if policy.recent else "sinks",
            f"sinks={policy.sinks} and recent={policy.recent} keep {held} tokens, over the budget "
            f"of {least}",
            f"lower them, or raise the budget to {held}",
        )
    if policy.floor > least:
        raise _fault("floor", f"floor={policy.floor} is over the budget of {least}", "lower it")


def check(
    policy: Policy,
    block_size: int,
    *,
    has_rope: bool = True,
    windowed: bool = False,
    granularity: str | None = None,
) -> Policy:
    """Return the policy with "auto" positions resolved, if it can serve this cache and model.

    Args:
        policy: The policy.
        block_size: Tokens in a block.
        has_rope: Whether the model rotates queries and keys by position.
        windowed: Whether any of its layers has a sliding window, which is measured in positions:
            closing gaps would move keys into it.
        granularity: "sequence", "layer" or "head"; None leaves ``spread`` unchecked.

    Raises:
        PolicyError: A budget of blocks is under one block, ``cache`` positions are asked of a
            model without rotary positions or with sliding windows, ``spread`` has nothing to
            spread over, or an out-of-tree score cannot be loaded.
    """
    least = policy.tokens if policy.adaptive is None else policy.adaptive[0]
    if least is not None and least < block_size and policy.unit == "block":
        raise _fault(
            "tokens" if policy.adaptive is None else "adaptive",
            f"a budget of {least} tokens is under one block of {block_size}",
            f"give at least {block_size}, smaller blocks, or unit=token",
        )
    closes = has_rope and not windowed
    if policy.positions == "cache" and not closes:
        raise _fault(
            "positions",
            "cache positions would move keys within the model's sliding windows"
            if has_rope
            else "cache positions need a model with rotary positions",
            "give positions=original, or auto",
        )
    needs = {"pyramid": ("layer", "head"), "ada": ("head",)}.get(policy.spread)
    if needs and granularity is not None and granularity not in needs:
        raise _fault(
            "spread",
            f"spread={policy.spread} has nothing to spread over with one table per {granularity}",
            f"set granularity to {' or '.join(needs)}",
        )
    policy.scorer()
    if policy.positions != "auto":
        return policy
    closes &= policy.unit == "block"
    return msgspec.structs.replace(policy, positions="cache" if closes else "original")


def lookback(policy: Policy, block_size: int) -> int | None:
    """Return how many past queries decide what the policy keeps; None if all of them do.

    Scores that did not see the queries of a cached prefix rank as if they had, if at least this
    many are computed again before the first round that evicts.
    """
    score = policy.scorer()
    if not policy.evicts:
        return 0
    if score.lookback == "window":
        cadence = policy.cadence(block_size)
        return cadence.chunk + 2 * cadence.bucket(policy.parameter or 1)
    return score.lookback
