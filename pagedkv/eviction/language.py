"""The expression language of policies: read it, point at faults, write it back.

    expression := [preset +] term + term + ...
    term       := name=value          sinks=4, recent=252, recent=0.25, budget=512, score=ema(0.9)
                | heavy=tokens:score  short for a score and a budget of sinks + recent + heavy

`TERMS` lists every name. A later term never repeats an earlier one, but replaces a preset's.
"""

import re
from collections.abc import Callable
from typing import Any, NoReturn

from pagedkv.errors import PolicyError, closest, shown
from pagedkv.eviction.policy import Policy
from pagedkv.eviction.presets import PRESETS
from pagedkv.eviction.scores import SCORES

__all__ = ["format_policy", "policy", "presets"]

CAPS = ("tokens", "ratio", "adaptive", "heavy")
RULES = ("threshold", "lowest")
RECENT = ("recent", "recent_share")
MOST_DIGITS = 18  # of a count; longer ones are beyond every limit, and may not even be read
SCORE = re.compile(r"(?P<name>[\w.]+(:\w+)?)\s*(\(\s*(?P<parameter>[^()]*?)\s*\))?")


class _Fault(Exception):
    """A value cannot be read; ``at`` counts characters from its beginning."""

    def __init__(self, what: str, remedy: str, at: int = 0) -> None:
        super().__init__(what)
        self.what, self.remedy, self.at = what, remedy, at


def presets() -> dict[str, str]:
    """Return the expression behind each preset's name."""
    return dict(PRESETS)


def policy(expression: str | Policy, /, **overrides: Any) -> Policy:
    """Read a policy.

    Args:
        expression: A preset's name, an expression, or a policy to vary.
        **overrides: Terms by name, such as ``budget=512``, ``recent=0.25``, ``score="ema(0.9)"``
            or ``adaptive=(256, 512)``; each replaces the expression's. A budget replaces any
            other kind of budget.

    Raises:
        PolicyError: The expression cannot be read, and a caret shows where; a name is unknown, and
            the nearest is suggested; or the parts contradict each other.
    """
    if isinstance(expression, Policy):
        expression = format_policy(expression)
    if not isinstance(expression, str):
        raise PolicyError(
            f"the policy is {expression!r:.80}",
            where="policy",
            remedy="give a preset's name, an expression or a Policy",
        )
    reader = _Reader(expression)
    reader.read()
    for name, value in overrides.items():
        reader.override(name, value)
    return reader.build()


class _Reader:
    """Collects the fields of one policy, and where in the text each was given."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields: dict[str, Any] = {}
        self.places: dict[str, int] = {}
        self.own: set[str] = set()
        self.overrides: set[str] = set()

    def read(self) -> None:
        start = 0
        for index, piece in enumerate(self.text.split("+")):
            at = start + len(piece) - len(piece.lstrip())
            start += len(piece) + 1
            term = piece.strip()
            if not term:
                self._fail("a term is missing", "write terms as name=value, joined by +", at)
            elif "=" in term:
                self._term(term, at)
            elif index == 0 and term in PRESETS:
                self._preset(term, at)
            else:
                self._fail_bare(term, at, first=index == 0)

    def _preset(self, name: str, at: int) -> None:
        if PRESETS[name] == name:
            return
        base = _Reader(PRESETS[name])
        base.read()
        self.fields = base.fields
        self.places = dict.fromkeys(base.fields, at)

    def _term(self, term: str, at: int) -> None:
        name, _, value = term.partition("=")
        begin = at + len(name) + 1 + len(value) - len(value.lstrip())
        name = name.strip()
        if name not in TERMS:
            self._fail(f"unknown term {name!r}", _nearest(name, TERMS), at)
        try:
            fields = TERMS[name](value.strip())
        except _Fault as fault:
            self._fail(fault.what, fault.remedy, begin + fault.at)
        for field in fields:
            for rival in _rivals(field):
                if rival in self.own:
                    what = "is given twice" if rival == field else f"stands beside {_name(rival)}"
                    self._fail(f"{name} {what}", "give one of them", at)
        self._replace(fields)
        self.own |= fields.keys()
        self.places |= dict.fromkeys(fields, begin)

    def _replace(self, fields: dict[str, Any]) -> None:
        for field in fields:
            for rival in _rivals(field):
                self.fields.pop(rival, None)
        if "score" in fields:
            self.fields.pop("parameter", None)
        self.fields |= fields

    def override(self, name: str, value: Any) -> None:
        if name not in TERMS:
            raise PolicyError(
                f"unknown term {name!r}", where="policy", remedy=_nearest(name, TERMS)
            )
        text = "..".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        try:
            fields = TERMS[name](text)
        except _Fault as fault:
            raise PolicyError(fault.what, where=f"policy({name}=)", remedy=fault.remedy) from None
        for field in fields:
            for rival in _rivals(field):
                if rival in self.overrides:
                    what = f"{_name(rival)} and {name} are both given"
                    raise PolicyError(what, where=f"policy({name}=)", remedy="give one of them")
                self.places.pop(rival, None)
        self._replace(fields)
        self.overrides |= fields.keys()

    def build(self) -> Policy:
        fields = dict(self.fields)
        heavy = fields.pop("heavy", None)
        if heavy is not None:
            if "recent_share" in fields:
                remedy = "give recent in tokens, or a budget instead of heavy"
                self._fail("recent is a share of what heavy adds to", remedy, self._at("recent"))
            fields["tokens"] = fields.get("sinks", 0) + fields.get("recent", 0) + heavy
        try:
            return Policy(**fields)
        except PolicyError as fault:
            at = self._at(fault.where.removeprefix("policy."))
            if at is None:
                raise
            self._fail(fault.what, fault.remedy, at)

    def _at(self, field: str) -> int | None:
        names = (field, "recent_share" if field == "recent" else field, "heavy")
        return next((self.places[name] for name in names if name in self.places), None)

    def _fail(self, what: str, remedy: str, at: int | None) -> NoReturn:
        caret = "" if at is None else f"\n    {self.text}\n    {' ' * at}^"
        raise PolicyError(what, where="policy", remedy=remedy + caret) from None

    def _fail_bare(self, term: str, at: int, *, first: bool) -> NoReturn:
        if term in PRESETS:
            self._fail(f"preset {term!r} is not the first term", "begin with the preset", at)
        if term in TERMS:
            self._fail(f"{term} has no value", f"write {term}=value", at)
        if first and closest(term, [*PRESETS, *TERMS], cutoff=0.5) in TERMS:
            remedy = f"{_nearest(term, TERMS)} Presets are {', '.join(PRESETS)}"
            self._fail(f"{term!r} is neither a preset nor a term", remedy, at)
        kind, known = ("preset", PRESETS) if first else ("term", TERMS)
        self._fail(f"unknown {kind} {term!r}", _nearest(term, known), at)


def _rivals(field: str) -> tuple[str, ...]:
    return next((slot for slot in (CAPS, RULES, RECENT) if field in slot), (field,))


def _nearest(name: str, known: Any) -> str:
    close = closest(name, list(known), cutoff=0.5)
    return f"did you mean {close!r}?" if close else f"give one of {', '.join(known)}"


# Values


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > MOST_DIGITS:
        raise _Fault(f"{shown(text)} is not a whole number of tokens", "give one, such as 256")
    return int(text)


def _number(text: str) -> float:
    scale = 100 if text.endswith("%") else 1
    try:
        return float(text.removesuffix("%")) / scale
    except ValueError:
        raise _Fault(f"{text!r} is not a number", "give one, such as 0.1 or 10%") from None


def _recent(text: str) -> dict[str, Any]:
    if text.isascii() and text.isdigit():
        return {"recent": _count(text)}
    share = _number(text)
    if not 0 < share <= 1:
        raise _Fault(f"recent={text} is no share of a budget", "give tokens, or a share up to 1.0")
    return {"recent_share": share}


def _score(text: str) -> dict[str, Any]:
    match = SCORE.fullmatch(text)
    if match is None:
        raise _Fault(f"{text!r} is not a score", "write a name, as in lift or ema(0.9)")
    name, parameter = match["name"], match["parameter"]
    if ":" not in name and name not in SCORES:
        raise _Fault(f"unknown score {name!r}", _nearest(name, SCORES))
    if parameter is None:
        return {"score": name}
    try:
        return {"score": name, "parameter": _number(parameter)}
    except _Fault as fault:
        raise _Fault(fault.what, fault.remedy, match.start("parameter")) from None


def _heavy(text: str) -> dict[str, Any]:
    count, colon, score = text.partition(":")
    fields: dict[str, Any] = {"heavy": _count(count.strip())}
    if not colon:
        return fields
    try:
        return fields | _score(score.strip())
    except _Fault as fault:
        at = len(count) + 1 + len(score) - len(score.lstrip()) + fault.at
        raise _Fault(fault.what, fault.remedy, at) from None


def _range(text: str) -> dict[str, Any]:
    low, dots, high = text.partition("..")
    if not dots:
        raise _Fault(f"{text!r} is not a range of tokens", "write floor..ceiling, as in 256..512")
    return {"adaptive": (_count(low.strip()), _count(high.strip()))}


def _into(field: str, read: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    return lambda text: {field: read(text)}


def _word(field: str, *known: str) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        if text not in known:
            raise _Fault(f"unknown {field} {text!r}", _nearest(text, known))
        return {field: text}

    return read


TERMS: dict[str, Callable[[str], dict[str, Any]]] = {
    "sinks": _into("sinks", _count),
    "recent": _recent,
    "heavy": _heavy,
    "score": _score,
    "budget": _into("tokens", _count),
    "ratio": _into("ratio", _number),
    "adaptive": _range,
    "threshold": _into("threshold", _number),
    "lowest": _into("lowest", _number),
    "floor": _into("floor", _count),
    "spread": _word("spread", "uniform", "pyramid", "ada"),
    "gqa": _word("gqa", "sum", "mean", "max"),
    "positions": _word("positions", "auto", "cache", "original"),
    "unit": _word("unit", "block", "token"),
    "chunk": _into("chunk", _count),
}


def format_policy(policy: Policy) -> str:
    """Return the canonical expression: ``pagedkv.eviction.policy`` of it equals the policy."""
    default = Policy()
    if policy == default:
        return "full"
    terms = []
    for field in Policy.__struct_fields__:
        value = getattr(policy, field)
        if field == "score":
            terms.append(f"score={_call(policy)}")
        elif field != "parameter" and value != getattr(default, field):
            terms.append(f"{_name(field)}={_written(value)}")
    if policy.score == default.score and len(terms) > 1:
        terms.remove(f"score={default.score}")
    return " + ".join(terms)


def _name(field: str) -> str:
    return {"tokens": "budget", "recent_share": "recent"}.get(field, field)


def _call(policy: Policy) -> str:
    table = SCORES.get(policy.score)
    if policy.parameter is None or (table and table.parameter == policy.parameter):
        return policy.score
    return f"{policy.score}({_written(policy.parameter)})"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}..{value[1]}"
    if isinstance(value, float) and value.is_integer() and value > 1:
        return str(int(value))
    return repr(value) if isinstance(value, float) else str(value)
