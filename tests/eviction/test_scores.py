"""What scores mean, and the defects that this project grew from, each shut out."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from pagedkv import eviction
from pagedkv.eviction import OBSERVATIONS, SCORES, UNOBSERVED, Cadence, View, policy, rank, update

SIZE, BLOCKS = 16, 32


def tables(resident, score=None, weight=None, *, prompt=0, width=BLOCKS):
    empty = np.zeros((1, width), np.float32)
    return View(
        score=empty if score is None else score,
        weight=empty if weight is None else weight,
        first_position=np.arange(width, dtype=np.int32)[None] * SIZE,
        num_resident=np.array([resident]),
        num_computed=np.array([resident]),
        num_prompt=np.array([prompt]),
        block_size=SIZE,
    )


def under_uniform_attention(score):
    """Ranks after each query in turn spread its mass evenly over all that it sees."""
    chosen = policy(f"score={score} + budget=64")
    kept, weight = (np.zeros((1, BLOCKS), np.float32) for _ in range(2))
    for query in range(SIZE * BLOCKS):
        before = tables(query, kept, weight)
        visible = query + 1
        whole = (np.arange(BLOCKS) + 1) * SIZE <= visible
        mass = np.where(whole, SIZE / visible, 0)
        lifted = np.where(whole, mass * visible / SIZE, 0)
        given = lifted if chosen.scorer().observe.startswith("lift") else mass
        seen = given.astype(np.float32)[None]
        kept, weight = update(chosen, before, np.array([1]), seen)
    return rank(chosen, tables(SIZE * BLOCKS, kept, weight))[0]


def test_lift_is_unbiased_and_sum_favours_the_old():
    assert (under_uniform_attention("lift") == 1).all()
    assert (under_uniform_attention("lift_max") == 1).all()
    sums = under_uniform_attention("sum")
    assert (np.diff(sums) < 0).all()
    assert sums[0] > 100 * sums[-1]
    means = under_uniform_attention("mean")
    assert means[0] > 3 * means[-1]


@pytest.mark.parametrize("pieces", [[64], [16] * 4, [5, 11, 40, 8], [1] * 64])
@pytest.mark.parametrize("score", ["sum", "mean", "max", "last", "ema(0.9)", "window(32)"])
def test_cutting_a_prompt_into_steps_changes_no_score(score, pieces):
    chosen = policy(f"score={score} + budget=64 + chunk=64")
    masses = np.random.default_rng(1).integers(0, 9, (64, 4)).astype(np.float32)
    kept, weight = (np.zeros((1, 4), np.float32) for _ in range(2))
    at = 0
    for count in pieces:
        before = tables(at, kept, weight, prompt=64, width=4)
        start = at + eviction.observe_from(chosen, before, np.array([count]))[0]
        seen = np.zeros((1, 4), np.float32)
        for query in range(start, at + count):
            whole = (np.arange(4) + 1) * SIZE <= query + 1
            kind = chosen.scorer().observe
            if kind == "mass_sum":
                seen += np.where(whole, masses[query], 0)
            elif kind == "mass_max":
                seen = np.maximum(seen, np.where(whole, masses[query], 0))
            else:
                seen = np.where(whole, masses[query], 0)[None]
        kept, weight = update(chosen, before, np.array([count]), seen.astype(np.float32))
        at += count
    whole = [masses[SIZE * (b + 1) - 1 :, b] for b in range(4)]
    expected = {
        "sum": [m.sum() for m in whole],
        "mean": [m.mean() for m in whole],
        "max": [m.max() for m in whole],
        "last": [m[-1] for m in whole],
        "ema(0.9)": [m.mean() for m in whole],  # one epoch: nothing has faded yet
        "window(32)": [m[-32:].sum() for m in whole],
    }[score]
    ranks = rank(chosen, tables(64, kept, weight, prompt=64, width=4))
    np.testing.assert_allclose(ranks[0], expected, rtol=1e-6)


def test_a_window_scores_little_of_a_prompt():
    chosen = policy("score=window(64) + budget=512 + chunk=256")
    first = eviction.observe_from(chosen, tables(256, prompt=2000), np.array([256]))
    assert first.tolist() == [192]
    early = eviction.observe_from(chosen, tables(256, prompt=2000), np.array([100]))
    assert early.tolist() == [100]  # none of these
    decode = eviction.observe_from(chosen, tables(256, prompt=9), np.array([1]))
    assert decode.tolist() == [0]
    for name in ("streaming", "full", "random"):
        unseen = eviction.observe_from(policy(name), tables(0, prompt=500), np.array([256]))
        assert unseen.tolist() == [256]


def test_a_block_is_observed_from_the_query_that_fills_it():
    seen = eviction.observing_queries(
        policy("h2o"), tables(20, prompt=999, width=4), np.array([30])
    )
    assert seen.tolist() == [[30, 19, 3, 0]]  # 16 was full; 31 and 47 fill the next; 63 is far


def test_the_unobserved_are_judged_last():
    score = np.array([[9, 0, 1]], np.float32)
    weight = np.array([[3, 0, 1]], np.float32)
    for name in ("sum", "mean", "max", "last", "lift", "ema", "lobo", "key_norm"):
        ranks = rank(policy(f"score={name} + budget=64"), tables(48, score, weight, width=3))
        assert ranks[0, 1] == np.float32(UNOBSERVED)
        assert np.argmax(ranks[0]) == 1


def test_few_observations_weigh_as_much_as_many_in_a_mean():
    score, weight = np.array([[100, 2]], np.float32), np.array([[100, 1]], np.float32)
    seen = tables(32, score, weight, width=2)
    assert rank(policy("score=mean + budget=64"), seen).tolist() == [[1, 2]]
    assert rank(policy("score=sum + budget=64"), seen).tolist() == [[100, 2]]


def test_static_scores_are_read_once():
    chosen = policy("knorm")
    first = tables(0, width=2)
    score, weight = update(chosen, first, np.array([16]), np.array([[5, 9]], np.float32))
    assert score.tolist() == [[5, 0]]
    later = tables(16, score, weight, width=2)
    score, weight = update(chosen, later, np.array([16]), np.array([[7, 3]], np.float32))
    assert score.tolist() == [[5, 3]]


def test_update_writes_into_nothing():
    for name in SCORES:
        before = tables(64, np.ones((1, 4), np.float32), np.ones((1, 4), np.float32), width=4)
        update(policy(f"score={name} + budget=64"), before, np.array([9]), np.ones((1, 4)))
        assert (before.score == 1).all()
        assert (before.weight == 1).all()


def test_the_table_is_sound():
    for name, score in SCORES.items():
        assert score.observe in OBSERVATIONS, name
        assert score.static == score.observe.startswith(("key", "value")), name


# Rounds


def test_rounds_lie_at_chunks_in_the_prompt_and_at_seals_beyond():
    cadence = Cadence(chunk=8, block_size=4)
    prompt = np.full(40, 21)
    at = np.flatnonzero(cadence.is_round(np.arange(40), prompt))
    assert at.tolist() == [8, 16, 24, 28, 32, 36]
    following = cadence.next_round(np.arange(40), prompt)
    for computed in range(36):
        assert following[computed] == at[at > computed][0]
    lengths = cadence.ended(np.arange(40), prompt)
    assert lengths[at].tolist() == np.diff(at, prepend=0).tolist()
    assert lengths.sum() == 36


@pytest.mark.parametrize(
    ("window", "bucket"), [(1, 16), (16, 16), (17, 32), (48, 64), (64, 64), (200, 256), (300, 512)]
)
def test_buckets_fit_the_rounds(window, bucket):
    assert Cadence(chunk=256, block_size=16).bucket(window) == bucket


# The seed article's systems, without their defects


def seed_streaming(score, **rule):
    return policy("seed-streaming", recent=16, score=score, budget=128, **rule)


@pytest.mark.parametrize("score", ["max", "mean", "ema"])
@pytest.mark.parametrize("rule", [{"lowest": 0.1}, {"threshold": 0.99}])
def test_the_seeds_rules_never_evict_everything(score, rule):
    """Its threshold of 0.01 on raw mass evicts all once a hundred keys share it evenly."""
    chosen = seed_streaming(score, **rule)
    even = np.full((1, BLOCKS), 1e-5, np.float32)
    seen = tables(SIZE * 8, even, np.full_like(even, 3))
    kept = eviction.select(chosen, seen)
    assert kept.sum() == 8  # at capacity, even: the lowest tenth of none over, none below
    falling = np.linspace(1e-5, 0, BLOCKS, dtype=np.float32)[None]
    for _ in range(20):
        keep = eviction.select(chosen, tables(SIZE * 8, falling, np.ones_like(falling)))
        assert keep.sum() >= 2


@pytest.mark.parametrize("rule", ["lowest=0.5", "threshold=0.9"])
def test_uncapped_rules_stop_at_the_floor(rule):
    chosen = policy(f"sinks=4 + recent=16 + score=mean + floor=80 + {rule}")
    score = np.array([[9, 1, 2, 1, 1, 1, 1, 1, 1, 1]], np.float32)
    resident = SIZE * 10
    for _ in range(12):
        keep = eviction.select(chosen, tables(resident, score, np.ones_like(score), width=10))
        resident = int(keep.sum()) * SIZE
    assert resident == 80
    bare = policy(f"score=mean + {rule}")
    keep = eviction.select(bare, tables(SIZE, score, np.ones_like(score), width=10))
    assert keep.sum() == 1


def test_the_lowest_tenth_goes_when_the_buffer_is_full():
    chosen = policy("score=max + budget=320 + lowest=0.25")
    score = np.arange(BLOCKS, dtype=np.float32)[None]
    ones = np.ones_like(score)
    assert eviction.select(chosen, tables(SIZE * 20, score, ones)).sum() == 20
    assert eviction.select(chosen, tables(SIZE * 21, score, ones)).sum() == 21 - 5


def test_the_seeds_ring_keeps_the_last_tokens_whole():
    """Its ring lost its place when a write crossed the end, and its empty slots were attended."""
    chosen = policy("seed-h2o", budget=64)
    for resident in range(1, SIZE * 8):
        keep = eviction.select(chosen, tables(resident))[0]
        held = np.flatnonzero(keep)
        assert held.max() == (resident - 1) // SIZE
        assert (np.diff(held) == 1).all()
        assert held.min() * SIZE <= max(0, resident - 64)


def test_the_seeds_scores_follow_keys_and_not_the_batch():
    """It deleted score rows as if they were keys, and indexed them by batch."""
    chosen = policy("score=max + budget=16")
    score = np.array([[1, 9, 2], [9, 1, 2]], np.float32)
    both = View(
        score=score,
        weight=np.ones_like(score),
        first_position=np.tile(np.arange(3, dtype=np.int32) * SIZE, (2, 1)),
        num_resident=np.array([48, 48]),
        num_computed=np.array([48, 48]),
        num_prompt=np.zeros(2, np.int64),
        block_size=SIZE,
    )
    keep = eviction.select(chosen, both)
    assert [np.flatnonzero(row).tolist() for row in keep] == [[1], [0]]


@pytest.mark.parametrize("name", [name for name, each in SCORES.items() if not each.weighs])
def test_who_does_not_weigh_asks_only_who_was_observed(name):
    """Neither how many queries observed an entry nor where it stands changes its rank."""
    rng, chosen = np.random.default_rng(3), policy(f"score={name} + budget=64")
    score = rng.random((1, BLOCKS), np.float32)
    weight = rng.integers(0, 3, (1, BLOCKS)).astype(np.float32)
    ranks = rank(chosen, tables(SIZE * BLOCKS, score, weight))
    bare = tables(SIZE * BLOCKS, score, (weight > 0).astype(np.float32))
    bare = msgspec.structs.replace(bare, first_position=np.zeros((0, 0), np.int32))
    assert (rank(chosen, bare) == ranks).all()


@pytest.mark.parametrize("filled", range(13))
def test_equal_counts_in_a_window_rank_equal(filled):
    """Counts of the current bucket and the one before, weighed by twelfths, as whole numbers."""
    now, before = (each.ravel() for each in np.meshgrid(np.arange(13.0), np.arange(13.0)))
    exact = 12 * now + (12 - filled) * before
    view = SimpleNamespace(
        score=now[None].astype(np.float32),
        weight=before[None].astype(np.float32),
        num_computed=np.array([48 + filled]),
        num_prompt=np.array([120]),
    )
    cadence = policy("score=low(12) + budget=64 + chunk=12").cadence(1)
    (ranks,) = SCORES["low"].rank(view, cadence, 12)
    order = np.argsort(exact, kind="stable")
    steps, told = np.diff(exact[order]), -np.diff(ranks[order])
    assert ((told > 0) == (steps > 0)).all()
