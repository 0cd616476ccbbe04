"""Protection, choice and what a round promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pagedkv import eviction
from pagedkv.eviction import (
    Score,
    View,
    choose,
    condemn,
    may_evict,
    policy,
    protect,
    reach,
    select,
    survivors,
)

AGAINST_THE_MEAN = Score(
    observe="mass_sum",
    update=lambda step, _: (step.score, step.weight),
    rank=lambda view, *_: np.abs(view.score - view.score.mean(axis=1, keepdims=True)),
)
"""A score from elsewhere, by which every entry's rank depends on all of its table."""
BY_LAYER = Score(observe="none", update=AGAINST_THE_MEAN.update, rank=lambda view, *_: view.score)
"""A score from elsewhere, which may rank by layer and head though it observes nothing."""


def view(resident, *, size=4, width=12, score=None, weight=1.0, computed=None, prompt=0, **more):
    """Tables that hold the first tokens of their sequences."""
    resident = np.asarray(resident)
    shape = (len(resident), width)
    return View(
        score=np.zeros(shape, np.float32) if score is None else np.asarray(score, np.float32),
        weight=np.broadcast_to(np.asarray(weight, np.float32), shape),
        first_position=np.broadcast_to(np.arange(width, dtype=np.int32) * size, shape),
        num_resident=resident,
        num_computed=resident if computed is None else np.asarray(computed),
        num_prompt=np.full(len(resident), prompt),
        block_size=size,
        **more,
    )


@pytest.mark.parametrize(
    ("sinks", "recent", "resident", "kept"),
    [
        (0, 0, 16, []),
        (0, 0, 18, [4]),  # the tail
        (1, 0, 16, [0]),  # a sink takes its whole block
        (5, 0, 16, [0, 1]),
        (0, 4, 16, [3]),
        (0, 5, 16, [2, 3]),  # floor-aligned: the window begins inside block 2
        (0, 4, 18, [3, 4]),
        (0, 99, 18, [0, 1, 2, 3, 4]),
        (4, 4, 4, [0]),
    ],
)
def test_protect(sinks, recent, resident, kept):
    chosen = policy(f"sinks={sinks} + recent={recent} + budget=128")
    stays = protect(chosen, view([resident]))[0]
    used = -(-resident // 4)
    assert np.flatnonzero(stays[:used]).tolist() == kept


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("budget=16", 20),  # the tail comes on top
        ("sinks=4 + recent=4 + score=sum + budget=16 + lowest=0.5", 20),
        ("score=sum + threshold=0.5", 0),
        ("score=sum + lowest=0.5", 0),
    ],
)
def test_a_round_is_called_off_only_if_it_could_take_nothing(text, over):
    chosen, scores = policy(text), np.random.default_rng(0).random((1, 12))
    for resident in range(1, 49):
        before = view([resident], score=scores)
        called_off = not may_evict(chosen, before)
        assert called_off == (resident < over)
        if called_off:
            used = before.entry < -(-resident // 4)
            assert (select(chosen, before)[0] == used).all()


RANKS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(
    ranks=hnp.arrays(np.float32, (3, 7), elements=RANKS),
    candidates=hnp.arrays(np.bool_, (3, 7)),
    count=hnp.arrays(np.int64, 3, elements=st.integers(0, 9)),
)
def test_choose_takes_the_lowest_and_of_equals_the_oldest(ranks, candidates, count):
    evict = choose(ranks, candidates, count)
    for row in range(3):
        found = [i for i in range(7) if candidates[row, i]]
        key = [r if np.isfinite(r) else -np.inf for r in ranks[row]]
        expected = sorted(found, key=key.__getitem__)[: count[row]]
        assert np.flatnonzero(evict[row]).tolist() == sorted(expected)


def test_ties_go_oldest_first():
    chosen = policy("sinks=4 + recent=4 + score=sum + budget=16")
    keep = select(chosen, view([32], score=np.ones((1, 12))))
    assert np.flatnonzero(keep[0]).tolist() == [0, 5, 6, 7]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("score", ["sum", "lift", "window", "max", "last", "ema"])
@pytest.mark.parametrize("rule", ["", " + lowest=0.2", " + threshold=0.5"])
def test_a_poisoned_block_goes_first_and_nothing_breaks(poison, score, rule):
    chosen = policy(f"sinks=4 + recent=4 + score={score} + budget=28{rule}")
    before = view([31], width=8, weight=0.0)
    seen = np.ones((1, 8), np.float32)
    seen[0, 4] = poison
    gained, weight = eviction.update(chosen, before, np.array([1]), seen)
    after = view([32], width=8, score=gained, weight=weight)
    keep = select(chosen, after)
    assert not keep[0, 4]
    assert keep[0, [0, 7]].all()


def test_protection_wins_over_the_budget():
    chosen = policy("sinks=5 + recent=5 + budget=10")
    keep = select(chosen, view([30]))
    assert np.flatnonzero(keep[0]).tolist() == [0, 1, 6, 7]


@given(
    score=hnp.arrays(np.float32, (2, 12), elements=st.floats(0, 1, width=32)),
    resident=st.lists(st.integers(0, 48), min_size=2, max_size=2),
    sinks=st.integers(0, 9),
    recent=st.integers(0, 9),
    spare=st.integers(1, 20),
)
def test_a_round_never_touches_what_is_protected(score, resident, sinks, recent, spare):
    budget = sinks + recent + spare
    chosen = policy(f"sinks={sinks} + recent={recent} + score=sum + budget={budget}")
    seen = view(resident, score=score)
    keep, kept = select(chosen, seen), protect(chosen, seen)
    used = np.arange(12) < -(-seen.num_resident // 4)[:, None]
    assert not (keep & ~used).any()
    assert (keep | ~(kept & used)).all()
    left = keep.sum(axis=1)
    must = (kept & used).sum(axis=1)
    assert (left <= np.maximum(-(-budget // 4) + 1, must)).all()


@pytest.mark.parametrize(
    "text",
    [
        "sinks=5 + recent=0.5 + score=sum + budget=16",
        "recent=9 + score=mean + threshold=0.7",
        "sinks=4 + recent=4 + score=sum + budget=24 + lowest=0.4",
        "recent=0.3 + score=sum + budget=16 + spread=ada",
        "sinks=2 + budget=8",
        "score=sum + ratio=0.5",
        f"recent=0.5 + score={__name__}:AGAINST_THE_MEAN + budget=16",
    ],
)
@given(
    score=hnp.arrays(np.float32, (4, 12), elements=st.floats(0, 1, width=32)),
    resident=st.lists(st.integers(0, 48), min_size=4, max_size=4),
)
def test_nothing_past_its_reach_decides_a_round(text, score, resident):
    """It goes by what lies before: entries past it neither go nor change what does."""
    chosen = policy(text)
    whole = view(resident, score=score, layers=2, heads=2)
    width = reach(chosen, whole)
    near = view(resident, score=score[:, :width], width=width, layers=2, heads=2)
    gone = condemn(chosen, whole)
    assert not gone[:, width:].any()
    assert (condemn(chosen, near) == gone[:, :width]).all()


def test_tables_agree_only_where_nothing_but_position_decides():
    assert policy("streaming").agrees
    assert policy("sinks=4 + budget=16").agrees
    for text in ("h2o", "streaming + spread=ada", f"score={__name__}:BY_LAYER + budget=16"):
        assert not policy(text).agrees


def test_survivors_keep_their_order():
    keep = np.array([[True, False, True, True, False], [False, False, False, True, False]])
    order, count = survivors(keep)
    assert count.tolist() == [3, 1]
    assert order[0, :3].tolist() == [0, 2, 3]
    assert order[1, :1].tolist() == [3]


def test_full_keeps_everything_that_is_in_use():
    assert select(policy("full"), view([30, 0])).sum(axis=1).tolist() == [8, 0]


def test_a_round_over_no_tables_is_empty():
    for spread in ("uniform", "pyramid", "ada"):
        chosen = policy(f"score=sum + budget=8 + spread={spread}")
        assert select(chosen, view([], layers=2, heads=2)).shape == (0, 12)


def test_heads_compete_and_none_starves():
    chosen = policy("score=mean + budget=24 + spread=ada")
    score = np.stack([np.full(12, 1.0), np.full(12, 0.01)])
    keep = select(chosen, view([48, 48], score=score, heads=2))
    assert keep.sum(axis=1).tolist() == [10, 2]  # six each; a fifth of six is the floor


def test_a_pyramid_falls_from_layer_to_layer_and_keeps_the_sum():
    chosen = policy("sinks=4 + recent=4 + score=mean + budget=24 + spread=pyramid")
    seen = view([48] * 5, layers=5)
    kept = select(chosen, seen).sum(axis=1)
    assert kept.tolist() == sorted(kept, reverse=True)
    assert kept.sum() == 5 * 24 // 4
    assert kept[0] > kept[-1] >= 2


@pytest.mark.parametrize(("pressure", "left"), [(0.0, 8), (0.5, 6), (1.0, 4), (7.0, 4)])
def test_an_adaptive_budget_follows_the_pool(pressure, left):
    chosen = policy("adaptive=16..32")
    assert select(chosen, view([48], pressure=pressure)).sum() == left


def test_a_ratio_is_what_goes_and_never_all():
    assert select(policy("ratio=0.25"), view([48])).sum() == 9
    assert select(policy("ratio=0.999"), view([48])).sum() == 1


def test_rows_of_a_view():
    part = view([8, 12, 16]).rows(np.array([2, 0]))
    assert part.num_sealed.tolist() == [4, 2]
