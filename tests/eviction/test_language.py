"""Reading policies, pointing at faults, writing them back."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.errors import PolicyError
from pagedkv.eviction import SCORES, Policy, Score, check, format_policy, lookback, policy, presets


def test_the_example_of_the_design():
    assert policy("sinks=4 + recent=252 + heavy=256:lift") == Policy(
        sinks=4, recent=252, score="lift", tokens=512
    )


@pytest.mark.parametrize("name", presets())
def test_presets_read_and_round_trip(name):
    chosen = policy(name)
    assert policy(format_policy(chosen)) == chosen
    assert msgspec.json.decode(msgspec.json.encode(chosen), type=Policy) == chosen
    if chosen.tokens:
        assert policy(name, budget=1024).tokens == 1024


SHARE = st.floats(0.01, 0.99)


@st.composite
def policies(draw):
    score = draw(st.sampled_from(sorted(SCORES)))
    fields = {"score": score, "sinks": draw(st.integers(0, 40)), "chunk": draw(st.integers(1, 999))}
    if SCORES[score].parameter is not None and draw(st.booleans()):
        fields["parameter"] = draw(SHARE if score == "ema" else st.integers(1, 500))
    cap = draw(st.sampled_from(["tokens", "ratio", "adaptive", None]))
    values = {"tokens": st.integers(200, 900), "ratio": SHARE, "adaptive": st.just((200, 300))}
    if cap:
        fields[cap] = draw(values[cap])
        fields["spread"] = draw(st.sampled_from(["uniform", "pyramid", "ada"]))
    recent = draw(st.sampled_from(["recent", "recent_share"] if cap else ["recent"]))
    fields[recent] = draw(st.integers(0, 99) if recent == "recent" else SHARE)
    rules = ["lowest", None] + ["threshold"] * SCORES[score].relative
    if rule := draw(st.sampled_from(rules)):
        fields[rule] = draw(SHARE)
    fields["gqa"] = draw(st.sampled_from(["sum", "mean", "max"]))
    fields["unit"] = unit = draw(st.sampled_from(["block", "token"]))
    kinds = ["auto", "original"] + ["cache"] * (unit == "block")
    fields["positions"] = draw(st.sampled_from(kinds))
    return Policy(floor=draw(st.integers(0, 200)), **fields)


@given(chosen=policies())
def test_every_policy_round_trips(chosen):
    text = format_policy(chosen)
    assert policy(text) == chosen
    assert format_policy(policy(text)) == text
    assert policy(chosen) == chosen


def test_overrides_replace_a_part_and_keep_the_split():
    small = policy("h2o", budget=256)
    assert (small.tokens, small.recent_share, small.score) == (256, 0.5, "sum")
    assert policy(small, score="ema(0.9)", recent=8).recent == 8
    assert policy("h2o", recent=0.25).recent_share == 0.25
    assert policy("h2o", adaptive=(64, 512)).adaptive == (64, 512)
    assert policy("h2o", ratio=0.5).tokens is None
    assert policy("seed-streaming", threshold=0.3).lowest is None
    assert policy("h2o + sinks=16 + recent=25%").recent_share == 0.25
    assert policy("streaming", heavy="64:lift", recent=32).tokens == 100
    assert policy("snap", score="lift").parameter is None


FAULTS = [
    ("sinks=4 + heavy=256:lfit", 20, "unknown score 'lfit'; did you mean 'lift'?"),
    ("h2", 0, "unknown preset 'h2'; did you mean 'h2o'?"),
    ("streeming + sinks=8", 0, "did you mean 'streaming'?"),
    ("foo", 0, "'foo' is neither a preset nor a term; did you mean 'floor'? Presets are full, "),
    ("xyz", 0, "unknown preset 'xyz'; give one of full, window, "),
    ("sinks=4 + h2o", 10, "'h2o' is not the first term"),
    ("sinks=4 +", 9, "a term is missing"),
    ("", 0, "a term is missing"),
    ("sinks=4 + lift", 10, "unknown term 'lift'"),
    ("sink=4", 0, "did you mean 'sinks'?"),
    ("sinks", 0, "sinks has no value"),
    ("sinks=four", 6, "'four' is not a whole number"),
    ("sinks=-4", 6, "'-4' is not a whole number"),
    ("sinks=4 + sinks=5", 10, "sinks is given twice"),
    ("budget=9 + ratio=0.5", 11, "ratio stands beside budget"),
    ("threshold=0.1 + lowest=0.1 + score=max", 16, "lowest stands beside threshold"),
    ("heavy=256:ema(x)", 14, "'x' is not a number"),
    ("score=ema(1.5) + budget=64", 6, "parameter of score 'ema' is 1.5"),
    ("score=lift(2) + budget=64", 6, "'lift' takes no parameter"),
    ("score=a b + budget=64", 6, "'a b' is not a score"),
    ("sinks=4 + recent=600 + budget=512", 17, "keep 604 tokens, over the budget of 512"),
    ("sinks=40 + budget=32", 6, "keep 40 tokens, over the budget of 32"),
    ("threshold=1.5 + score=lift", 10, "would evict every block"),
    ("threshold=0.5 + score=key_norm", 10, "no amount of attention"),
    ("ratio=1.0", 6, "ratio is 1.0"),
    ("ratio=x", 6, "'x' is not a number"),
    ("recent=1.5 + budget=64", 7, "no share of a budget"),
    ("recent=0.5 + lowest=0.1", 7, "a share of a budget that is not given"),
    ("recent=0.5 + heavy=64:sum", 7, "a share of what heavy adds to"),
    ("adaptive=64", 9, "not a range"),
    ("adaptive=64..32", 9, "the floor 64 is above the ceiling 32"),
    ("floor=99 + budget=64 + lowest=0.1", 6, "floor=99 is over the budget of 64"),
    ("spread=ada", 7, "no budget to spread"),
    ("budget=64 + spread=adda", 19, "did you mean 'ada'?"),
    ("budget=0", 7, "tokens is 0"),
    ("chunk=0", 6, "chunk is 0"),
]


@pytest.mark.parametrize(("text", "at", "message"), FAULTS)
def test_faults_are_pointed_at(text, at, message):
    with pytest.raises(PolicyError) as caught:
        policy(text)
    said = str(caught.value)
    assert message in said
    assert said.splitlines()[-2:] == [f"    {text}", "    " + " " * at + "^"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"budgt": 5}, "did you mean 'budget'?"),
        ({"budget": "x"}, "policy(budget=): 'x' is not a whole number"),
        ({"recent": 600}, "over the budget of 512"),
        ({"gqa": "median"}, "did you mean 'mean'?"),
        ({"budget": 64, "ratio": 0.5}, "budget and ratio are both given"),
    ],
)
def test_overrides_are_checked_alike(overrides, message):
    with pytest.raises(PolicyError) as caught:
        policy("streaming", **overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 64, "ratio": 0.5}, "tokens and ratio are both given"),
        ({"threshold": 0.5, "lowest": 0.5, "score": "max"}, "threshold and lowest"),
        ({"recent": 4, "recent_share": 0.5, "tokens": 64}, "in tokens and as a share"),
        ({"score": "nope"}, "unknown score 'nope'"),
        ({"sinks": -1}, "sinks is -1"),
        ({"gqa": "median"}, "gqa is 'median'"),
        ({"unit": "token", "positions": "cache"}, "unit=token leaves them between tokens"),
    ],
)
def test_a_struct_made_by_hand_is_checked_too(fields, message):
    with pytest.raises(PolicyError, match="policy") as caught:
        Policy(**fields)
    assert message in str(caught.value)


def test_check_against_a_cache_and_a_model():
    streaming = policy("streaming")
    assert check(streaming, 16).positions == "cache"
    assert check(streaming, 16, has_rope=False).positions == "original"
    assert check(streaming, 16, windowed=True).positions == "original"
    by_token = check(policy("streaming + budget=8 + unit=token"), 16)
    assert (by_token.positions, by_token.tokens) == ("original", 8)
    faults = [
        (("streaming + budget=8", 16, {}), "a budget of 8 tokens is under one block of 16"),
        (("adaptive=8..64", 16, {}), "a budget of 8 tokens is under one block of 16"),
        (("streaming + positions=cache", 16, {"has_rope": False}), "rotary positions"),
        (("streaming + positions=cache", 16, {"windowed": True}), "sliding windows"),
        (("h2o + spread=ada", 16, {"granularity": "layer"}), "set granularity to head"),
        (("h2o + spread=pyramid", 16, {"granularity": "sequence"}), "layer or head"),
    ]
    for (text, size, facts), message in faults:
        with pytest.raises(PolicyError) as caught:
            check(policy(text), size, **facts)
        assert message in str(caught.value)


def keep_oldest(parameter=1.0):
    return Score(
        observe="none",
        update=lambda step, _: (step.score, step.weight),
        rank=lambda view, cadence, scale: -scale * view.first_position.astype("float32"),
        lookback=0,
    )


NOT_A_SCORE = 3


def test_scores_from_outside():
    here = __name__
    chosen = policy(f"heavy=64:{here}:keep_oldest(2)")
    assert (chosen.score, chosen.parameter) == (f"{here}:keep_oldest", 2.0)
    assert policy(format_policy(chosen)) == chosen
    assert check(chosen, 16).scorer().observe == "none"
    for name in (f"{here}:missing", "no_such_module:x", f"{here}:NOT_A_SCORE"):
        with pytest.raises(PolicyError, match=r"policy.score"):
            check(policy(f"score={name} + budget=64"), 16)


def test_lookback_says_how_much_history_a_score_needs():
    assert lookback(policy("streaming"), 16) == 0
    assert lookback(policy("knorm"), 16) == 0
    assert lookback(policy("tova"), 16) == 1
    assert lookback(policy("h2o"), 16) is None
    assert lookback(policy("full + score=lift"), 16) == 0
    assert lookback(policy("snap"), 16) == 256 + 2 * 64
