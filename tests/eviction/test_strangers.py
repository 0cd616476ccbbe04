"""Numbers, types and out-of-tree scores that nobody should give, and what is said to them."""

import sys
from types import ModuleType

import numpy as np
import pytest

from pagedkv.errors import PolicyError
from pagedkv.eviction import SCORES, View, find_score, policy

HUGE = "99999999999999999999999"


@pytest.mark.parametrize(
    "expression",
    [
        f"budget={HUGE}",
        f"chunk={HUGE} + budget=64",
        f"sinks={HUGE} + lowest=0.5 + score=sum",
        f"recent={HUGE} + lowest=0.5 + score=sum",
        f"adaptive=16..{HUGE}",
        "score=window(1e30) + budget=64",
        "score=low(1e18) + budget=64",
    ],
)
def test_numbers_beyond_any_context(expression):
    with pytest.raises(PolicyError):
        policy(expression)


@pytest.mark.parametrize("given", [None, 3, 1.5, ["h2o"], {}, True, b"h2o"])
def test_a_policy_that_is_no_text(given):
    with pytest.raises(PolicyError, match="the policy is"):
        policy(given)


@pytest.mark.parametrize("pair", [(), (1,), [64, 128, 256]])
def test_a_range_has_two_ends(pair):
    with pytest.raises(PolicyError):
        policy("h2o", adaptive=pair)


def failing(*_):
    raise RuntimeError("no")


@pytest.fixture
def stranger(monkeypatch):
    module = ModuleType("stranger")
    monkeypatch.setitem(sys.modules, "stranger", module)
    return module


def view():
    entries = np.zeros((2, 3), np.float32)
    facts = np.full(2, 12, np.int32)
    return View(
        score=entries,
        weight=entries,
        first_position=np.zeros((2, 3), np.int32),
        num_resident=facts,
        num_computed=facts,
        num_prompt=facts,
        block_size=4,
        layers=1,
        heads=1,
        pressure=0.0,
    )


@pytest.mark.parametrize("made", [failing, len, 5], ids=["raises", "wants more", "no score"])
def test_a_score_that_cannot_be_made(stranger, made):
    stranger.score = made
    with pytest.raises(PolicyError, match="stranger:score"):
        find_score("stranger:score")


def test_a_window_of_no_length(stranger):
    from msgspec.structs import replace

    stranger.score = lambda: replace(SCORES["sum"], lookback="window", parameter=None)
    with pytest.raises(PolicyError, match="no length"):
        find_score("stranger:score")


@pytest.mark.parametrize(
    "given",
    [failing, lambda *_: None, lambda *_: np.zeros((1, 3))],
    ids=["raises", "gives nothing", "gives another shape"],
)
def test_a_score_that_fails_when_asked(stranger, given):
    from msgspec.structs import replace

    stranger.score = lambda: replace(SCORES["sum"], rank=given, update=given)
    score = find_score("stranger:score")
    with pytest.raises(PolicyError, match="rank of score 'stranger:score' failed"):
        score.rank(view(), policy("h2o").cadence(4), 0.0)
    with pytest.raises(PolicyError, match="update of score 'stranger:score' failed"):
        score.update(view(), 0.0)


def test_a_sound_score_gives_what_it_gave(stranger):
    from msgspec.structs import replace

    stranger.score = lambda: replace(SCORES["sum"], rank=lambda v, c, p: (v.score + 1).tolist())
    score = find_score("stranger:score")
    assert score.update is SCORES["sum"].update
    assert (score.rank(view(), policy("h2o").cadence(4), 0.0) == 1).all()
