"""Draws against a slow reading of the same rules, one row and one token at a time."""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.core.plan import Adjustments, Penalties, SamplingBatch, StepResult
from pagedkv.device.sampling import sample, uniforms
from pagedkv.errors import InvalidRequest

ONE = 1 << 40
MASK = (1 << 64) - 1
INF = float("inf")


@dataclass(frozen=True)
class Row:
    """What one sequence asks for."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    num_logprobs: int = -1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()


COLUMNS: dict[str, Any] = {
    "temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int32,
    "min_p": np.float32,
    "seed": np.uint64,
    "position": np.int32,
    "num_logprobs": np.int32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
}


def batch_of(rows: list[Row]) -> SamplingBatch:
    columns = {name: np.array([getattr(r, name) for r in rows], t) for name, t in COLUMNS.items()}
    seen = [
        (i, token, made)
        for i, r in enumerate(rows)
        for made, tokens in ((False, r.prompt), (True, r.generated))
        for token in tokens
    ]
    penalties = None
    if seen:
        member, token, made = zip(*seen, strict=True)
        penalties = Penalties(
            sample=np.array(member, np.int32),
            token=np.array(token, np.int32),
            generated=np.array(made, np.bool_),
        )
    kept = [(i, token) for i, r in enumerate(rows) for token in r.allowed]
    biased = [(i, *pair) for i, r in enumerate(rows) for pair in r.bias]
    adjustments = None
    if kept or biased:
        kept_sample, kept_token = np.array(kept, np.int32).reshape(-1, 2).T
        sample, token, bias = np.array(biased, np.float32).reshape(-1, 3).T
        adjustments = Adjustments(
            kept_sample=kept_sample,
            kept_token=kept_token,
            sample=sample.astype(np.int32),
            token=token.astype(np.int32),
            bias=bias,
        )
    return sampling_batch(columns, penalties, adjustments)


def sampling_batch(
    columns: dict[str, npt.NDArray[Any]],
    penalties: Penalties | None = None,
    adjustments: Adjustments | None = None,
) -> SamplingBatch:
    most = int(columns["num_logprobs"].max(initial=-1))
    return SamplingBatch(
        penalties=penalties, adjustments=adjustments, most_logprobs=most, **columns
    )


def drawn(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return sample(logits, batch_of(rows)).token_ids.tolist()


def splitmix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def slow_uniform(seed: int, position: int) -> float:
    return (splitmix((splitmix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def slow_penalties(logits: np.ndarray, row: Row) -> np.ndarray:
    x = logits.copy()
    for token in range(len(x)):
        if row.allowed and token not in row.allowed:
            x[token] = -INF
    for token, bias in row.bias:
        x[token] += np.float32(bias)
    for token in {*row.prompt, *row.generated}:
        factor = np.float32(row.repetition_penalty)
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token, count in Counter(row.generated).items():
        x[token] = x[token] - np.float32(row.frequency_penalty) * np.float32(count)
        x[token] = x[token] - np.float32(row.presence_penalty)
    return x


def slow_kept(x: np.ndarray, row: Row) -> tuple[list[int], list[int]]:
    """The tokens that pass the filters, likeliest first (by id if nothing filters), and weights."""
    y = (x - x.max()) / np.float32(row.temperature)
    share = torch.from_numpy(y).exp().tolist()
    weight = [int(s * ONE) for s in share]
    order = sorted(range(len(x)), key=(-y).tolist().__getitem__)
    order = [i for i in order if share[i] >= np.float32(row.min_p)]
    k_on = 0 < row.top_k < len(x)
    order = order[: row.top_k] if k_on else order
    limit = float(np.float32(row.top_p)) * sum(weight[i] for i in order)
    kept, before = [], 0
    for i in order:
        if before < limit:
            kept.append(i)
        before += weight[i]
    if not (k_on or row.min_p > 0 or row.top_p < 1):
        kept.sort()
    return kept, [weight[i] for i in kept]


def slow_draws(logits: np.ndarray, row: Row, positions: range) -> list[int]:
    x = slow_penalties(logits, row)
    if not math.isfinite(max(x)):
        return [-1] * len(positions)
    if row.temperature < 1e-5:
        return [int(np.argmax(x))] * len(positions)
    kept, weight = slow_kept(x, row)
    ends = list(accumulate(weight))
    targets = (slow_uniform(row.seed, position) * ends[-1] for position in positions)
    return [kept[bisect_right(ends, min(int(t), ends[-1] - 1))] for t in targets]


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[Row]]:
    vocab = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 200, 700]))
    count = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(0, draw(st.sampled_from([0.1, 1.0, 2.0, 3.0, 12.0])), (count, vocab))
    if draw(st.booleans()):
        logits = logits.round()  # many ties
    if draw(st.booleans()):
        logits[rng.random(logits.shape) < 0.4] = -INF
        logits[:, rng.integers(vocab)] = 0.0
    penalty = st.sampled_from([-2.0, -0.3, 0.0, 0.7, 2.0])
    tokens = st.lists(st.integers(0, vocab - 1), max_size=5).map(tuple)
    row = st.builds(
        Row,
        temperature=st.sampled_from([0.0, 1e-4, 0.3, 1.0, 5.0]),
        top_p=st.sampled_from([1e-30, 0.1, 0.5, 0.95, 1.0]),
        top_k=st.sampled_from([-1, 0, 1, 2, 20, 300, 5000]),
        min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.2, 1.0]),
        seed=st.integers(0, MASK),
        repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
        presence_penalty=penalty,
        frequency_penalty=penalty,
        prompt=tokens,
        generated=tokens,
        allowed=tokens,
        bias=st.lists(
            st.tuples(st.integers(0, vocab - 1), st.sampled_from([-100.0, -1.5, 2.0, -INF])),
            max_size=4,
        ).map(tuple),
    )
    return torch.tensor(logits, dtype=torch.float32), [draw(row) for _ in range(count)]


@settings(max_examples=80, deadline=None)
@given(cases())
def test_draws_what_the_slow_reading_draws(case: tuple[torch.Tensor, list[Row]]) -> None:
    logits, rows = case
    positions = range(12)
    slow = [slow_draws(x, row, positions) for x, row in zip(logits.numpy(), rows, strict=True)]
    moved = [replace(row, position=position) for row in rows for position in positions]
    fast = drawn(logits.repeat_interleave(len(positions), 0), moved)
    assert fast == [token for draws in slow for token in draws]


FILTERS = [
    Row(),
    Row(temperature=0.7),
    Row(top_k=4),
    Row(top_p=0.8),
    Row(min_p=0.15),
    Row(temperature=1.3, top_k=7, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("row", FILTERS, ids=["all", "cool", "top_k", "top_p", "min_p", "each"])
def test_frequencies_are_the_filtered_distribution(row: Row) -> None:
    count = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, 0.2, -0.4, -3.0, 0.9])
    kept, weight = slow_kept(logits.numpy(), row)
    one = batch_of([row])
    columns = {name: np.repeat(getattr(one, name), count) for name in COLUMNS}
    columns["seed"], columns["position"] = np.divmod(np.arange(count), 3000)
    columns = {name: column.astype(COLUMNS[name]) for name, column in columns.items()}
    batch = sampling_batch(columns)
    got = np.bincount(sample(logits.expand(count, -1), batch).token_ids, minlength=10)
    expected = np.zeros(10)
    expected[kept] = np.array(weight) / sum(weight) * count
    assert (got[expected == 0] == 0).all()
    live = expected > 0
    chi_square = ((got[live] - expected[live]) ** 2 / expected[live]).sum()
    assert chi_square < 28  # 99.9 % of honest samples stay below, with 9 degrees of freedom


def bits(result: StepResult, i: int, asked: int) -> tuple[Any, ...]:
    if result.logprobs is None or asked < 0:
        return (int(result.token_ids[i]),)
    assert result.top_ids is not None
    assert result.top_logprobs is not None
    return (
        int(result.token_ids[i]),
        result.logprobs[i].tobytes(),
        result.top_ids[i, :asked].tobytes(),
        result.top_logprobs[i, :asked].tobytes(),
    )


@pytest.mark.parametrize("vocab", [50, 5_003])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_a_row_answers_the_same_in_any_batch(vocab: int, spread: float) -> None:
    rng = np.random.default_rng(vocab)
    rows = [
        Row(
            temperature=rng.choice([0.0, 0.5, 1.0]),
            top_p=rng.choice([0.3, 0.9, 0.999, 1.0]),
            top_k=rng.choice([0, 1, 40, 700]),
            min_p=rng.choice([0.0, 0.0, 0.01]),
            seed=int(rng.integers(2**62)),
            position=int(rng.integers(100)),
            num_logprobs=int(rng.integers(-1, 21)),
            repetition_penalty=rng.choice([1.0, 1.2]),
            prompt=tuple(rng.integers(vocab, size=3).tolist()),
        )
        for _ in range(33)
    ]
    logits = torch.from_numpy(rng.normal(0, spread, (33, vocab)).astype(np.float32))
    whole = sample(logits, batch_of(rows))
    for size in (1, 1, 2, 9, 33):
        pick = rng.permutation(33)[:size]
        part = sample(logits[torch.from_numpy(pick)], batch_of([rows[i] for i in pick]))
        for i, j in enumerate(pick):
            asked = rows[j].num_logprobs
            assert bits(part, i, asked) == bits(whole, int(j), asked)


@pytest.mark.parametrize(
    "row",
    [Row(top_p=1e-6), Row(min_p=1.0), Row(top_k=1), Row(temperature=0.0)],
    ids=["top_p", "min_p", "top_k", "temperature"],
)
def test_the_tightest_filter_keeps_exactly_the_argmax(row: Row) -> None:
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 1, (50, 300)).astype(np.float32))
    rows = [replace(row, seed=i) for i in range(50)]
    assert drawn(logits, rows) == logits.argmax(-1).tolist()


def test_equal_logits_rank_by_id() -> None:
    rows = [Row(temperature=0.0), Row(top_k=1, seed=5), Row(top_p=0.005, seed=6)]
    logits = torch.zeros(3, 200)
    logits[:, :17] = -1
    assert drawn(logits, rows) == [17, 17, 17]
    many = [replace(Row(top_k=3), seed=i) for i in range(60)]
    assert set(drawn(logits[:1].expand(60, -1), many)) == {17, 18, 19}


def test_a_nucleus_that_is_full_takes_no_more() -> None:
    rows = [Row(top_p=0.5, seed=i) for i in range(60)]
    assert set(drawn(torch.zeros(60, 4), rows)) == {0, 1}


@pytest.mark.parametrize(
    "row", [Row(top_k=900), Row(top_p=0.95), Row(min_p=1e-4)], ids=["top_k", "top_p", "min_p"]
)
def test_a_long_tail_keeps_its_weight(row: Row) -> None:
    logits = torch.full((1, 1000), -6.0)
    logits[0, 500] = 0.0
    kept, weight = slow_kept(logits[0].numpy(), row)
    expected = ONE / sum(weight)
    drew = drawn(logits.expand(2000, -1), [replace(row, position=i) for i in range(2000)])
    assert drew.count(500) / 2000 == pytest.approx(expected, abs=0.04)
    assert set(drew) <= set(kept)


def test_sums_do_not_depend_on_the_order_of_the_tokens() -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 1, (20, 20_000)).astype(np.float32))
    logits[:, 0] = 11.0
    rows = [Row(temperature=0.0, num_logprobs=0)] * 20
    logprobs = sample(logits, batch_of(rows)).logprobs
    for _ in range(3):
        shuffled = logits[:, torch.from_numpy(rng.permutation(20_000))]
        np.testing.assert_array_equal(sample(shuffled, batch_of(rows)).logprobs, logprobs)


def test_seeds_and_positions_give_different_draws() -> None:
    flat = torch.zeros(64, 4096)
    by_seed = drawn(flat, [Row(seed=i) for i in range(64)])
    by_position = drawn(flat, [Row(position=i) for i in range(64)])
    assert len(set(by_seed)) > 58
    assert len(set(by_position)) > 58
    assert len(set(by_seed) & set(by_position)) < 6
    assert by_seed == drawn(flat, [Row(seed=i) for i in range(64)])


def test_uniforms_are_splitmix64() -> None:
    # The first outputs for the seed 1234567, as published with the generator.
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix((1234567 + i * golden) & MASK) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seed = np.array([0, 1, 2**63, MASK, 7, 7], np.uint64)
    position = np.array([0, 0, 5, 2**31 - 1, 1, 2], np.int32)
    slow = [slow_uniform(int(s), int(p)) for s, p in zip(seed, position, strict=True)]
    assert uniforms(seed, position).tolist() == slow


def test_uniforms_fill_the_interval_whichever_way_they_are_walked() -> None:
    count = np.arange(8192)
    for seed, position in ((count, count * 0), (count * 0, count), (count // 64, count % 64)):
        u = uniforms(seed.astype(np.uint64), position.astype(np.int32))
        bins = np.bincount((u * 64).astype(int), minlength=64)
        assert ((bins - 128) ** 2 / 128).sum() < 103.4  # 99.9 %, 63 degrees of freedom
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.04


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_is_marked_and_harms_no_other(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (9, 130)).astype(np.float32))
    row = Row(temperature=temperature, num_logprobs=2)
    rows = [
        replace(row, seed=i, top_k=[0, 20, 0][i % 3], top_p=[1, 1, 0.9][i % 3]) for i in range(9)
    ]
    healthy = sample(logits, batch_of(rows))
    logits[1, 7] = math.nan
    logits[3, 0] = INF
    logits[5] = -INF
    logits[8] = math.nan
    broken = sample(logits, batch_of(rows))
    for i in range(9):
        if i in (1, 3, 5, 8):
            assert broken.token_ids[i] == -1
            assert np.isnan(broken.logprobs[i])
            assert (broken.top_ids[i] == -1).all()
        else:
            assert bits(broken, i, 2) == bits(healthy, i, 2)


def test_all_rows_broken() -> None:
    result = sample(torch.full((2, 5), math.nan), batch_of([Row(num_logprobs=1), Row()]))
    assert result.token_ids.tolist() == [-1, -1]
    assert np.isnan(result.logprobs).all()


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((400, 100), -INF)
    logits[:, [3, 70]] = torch.tensor([0.0, -1.0])
    rows = [replace(FILTERS[i % 4], seed=i) for i in range(400)]
    assert set(drawn(logits, rows)) == {3, 70}


def test_logprobs_are_the_models_own() -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 4, (4, 999)).astype(np.float32))
    logits[2, 100:] = -INF
    rows = [
        Row(temperature=0.0, num_logprobs=0),
        Row(temperature=0.2, top_k=3, num_logprobs=5, repetition_penalty=1.5, prompt=(1, 2, 3)),
        Row(seed=4, num_logprobs=64),
        Row(num_logprobs=-1),
    ]
    result = sample(logits, batch_of(rows))
    exact = logits.double().log_softmax(-1).numpy()
    assert result.logprobs is not None
    assert result.logprobs.dtype == np.float32
    assert result.top_ids.shape == result.top_logprobs.shape == (4, 64)
    for i in range(3):
        assert result.logprobs[i] == pytest.approx(exact[i, result.token_ids[i]], abs=2e-6)
        asked = rows[i].num_logprobs
        order = np.argsort(-exact[i], kind="stable")[:asked]
        assert result.top_ids[i, :asked].tolist() == order.tolist()
        np.testing.assert_allclose(result.top_logprobs[i, :asked], exact[i, order], atol=2e-6)
        assert (result.top_ids[i, asked:] == -1).all()
    assert np.isnan(result.logprobs[3])


def test_no_more_alternatives_than_tokens() -> None:
    logits = torch.tensor([[0.0, -INF, 1.0]])
    result = sample(logits, batch_of([Row(temperature=0.0, num_logprobs=20)]))
    assert result.top_ids.tolist() == [[2, 0, 1]]
    assert result.top_logprobs[0, 2] == -INF


def test_the_logits_are_left_alone() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = logits.detach().clone()
    row = Row(repetition_penalty=2.0, prompt=(1, 5), generated=(5, 5), num_logprobs=3)
    result = sample(logits, batch_of([row, replace(row, top_k=5), replace(row, top_p=0.5)]))
    assert torch.equal(logits, before)
    assert result.token_ids.dtype == np.int32


def test_nothing_asked_nothing_reported() -> None:
    result = sample(torch.zeros(2, 4), batch_of([Row(), Row(temperature=0.0)]))
    assert result.logprobs is result.top_ids is result.top_logprobs is None
    assert sample(torch.zeros(0, 4), batch_of([])).token_ids.shape == (0,)


def test_rows_must_match() -> None:
    with pytest.raises(InvalidRequest, match="logits of shape"):
        sample(torch.zeros(2, 4), batch_of([Row()]))
