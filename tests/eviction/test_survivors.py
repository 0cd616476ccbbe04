"""The vectorised code keeps the blocks that the plain one keeps, step by step, for every policy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.eviction import policy, presets
from tests.eviction import naive
from tests.eviction.twin import Twin

SIZE = 4
SMALL = {"budget": 24, "chunk": 8}
CASES = {name: policy(name, **SMALL) for name in presets() if name != "full"}
CASES |= {
    "full": policy("full"),
    "snap": policy("snap", score="window(8)", **SMALL),
    "scissorhands": policy("scissorhands", score="low(16)", **SMALL),
    "seed-mean": policy("seed-streaming", recent=8, score="mean", threshold=0.8, **SMALL),
    "seed-ema": policy("seed-streaming", recent=5, score="ema(0.5)", **SMALL),
    "threshold": policy("sinks=4 + recent=6 + score=lift + threshold=0.9 + floor=20 + chunk=8"),
    "lowest": policy("sinks=1 + recent=6 + score=lift + lowest=0.4 + chunk=8"),
    "ratio": policy("sinks=1 + recent=6 + score=lift + ratio=0.4 + chunk=8"),
    "ratio-share": policy("recent=0.3 + score=sum + ratio=0.6 + chunk=16"),
    "adaptive": policy("sinks=3 + recent=0.3 + score=lift_max + adaptive=12..31 + chunk=8"),
    "pyramid": policy("sinks=2 + recent=4 + score=max + budget=30 + spread=pyramid + chunk=8"),
    "ada": policy("sinks=2 + recent=4 + score=mean + budget=26 + spread=ada + chunk=8"),
    "wide-window": policy("recent=4 + score=window(32) + budget=22 + chunk=8"),
    "odd-window": policy("recent=4 + score=window(5) + budget=22 + chunk=10"),
    "token": policy("sinks=2 + recent=5 + score=ema(0.5) + budget=13 + chunk=6"),
}


def run_both(chosen, prompts, total, seed, *, layers=1, heads=1, size=SIZE, pressure=0.4):
    """Drive the arrays in random steps and the plain tables token by token; compare at each."""
    rng = np.random.default_rng(seed)
    kwargs = {"layers": layers, "heads": heads, "seed": seed, "pressure": pressure}
    twin = Twin(chosen, size, prompts, **kwargs)
    plain = [
        [
            [
                naive.Table(chosen, size, prompt, layer * heads + head, row, seed)
                for head in range(heads)
            ]
            for layer in range(layers)
        ]
        for row, prompt in enumerate(prompts)
    ]
    while (twin.computed < total).any():
        prefill = twin.computed < twin.prompt
        count = np.where(prefill, rng.integers(0, 11, len(prompts)), rng.integers(0, 2))
        twin.step(np.minimum(count, total - twin.computed))
        for row, tables in enumerate(plain):
            catch_up(tables, twin.computed[row], pressure)
            for layer in range(layers):
                for head in range(heads):
                    firsts = [block.first for block in tables[layer][head].blocks]
                    assert twin.firsts(layer * heads + head, row) == firsts
    return twin


def catch_up(tables, computed, pressure):
    while tables[0][0].computed < computed:
        for heads in tables:
            for table in heads:
                table.add_token()
        naive.evict_row(tables, pressure)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**16),
    prompts=st.lists(st.integers(1, 50), min_size=1, max_size=2),
)
def test_every_policy_keeps_what_the_plain_one_keeps(name, seed, prompts):
    shape = {"pyramid": (3, 1), "ada": (2, 3)}.get(name, (1, 1))
    size = 1 if name == "token" else SIZE
    run_both(CASES[name], prompts, 60, seed, layers=shape[0], heads=shape[1], size=size)


@pytest.mark.parametrize("name", ["h2o", "streaming", "random", "threshold"])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 1), (2, 2)])
def test_granularities_take_the_same_path(name, layers, heads):
    run_both(CASES[name], [33, 7], 60, seed=5, layers=layers, heads=heads)


@pytest.mark.parametrize("name", CASES)
def test_survivors_do_not_depend_on_the_batch(name):
    prompts = [40, 9, 23]
    together = run_both(CASES[name], prompts, 64, seed=3)
    for row, prompt in enumerate(prompts):
        alone = Twin(CASES[name], SIZE, [prompt], seed=3, names=[row], pressure=0.4)
        while alone.computed[0] < 64:
            alone.step(np.array([64 - alone.computed[0]]))
        assert alone.firsts(0, 0) == together.firsts(0, row)


@pytest.mark.parametrize("name", CASES)
def test_permuting_the_rows_permutes_the_survivors(name):
    prompts, order = np.array([40, 9, 23, 17]), np.array([2, 0, 3, 1])
    twins = [
        Twin(CASES[name], SIZE, prompts[rows], seed=8, names=rows, pressure=0.2)
        for rows in (np.arange(4), order)
    ]
    for twin in twins:
        for _ in range(16):
            twin.step(np.full(4, 5))
    for at, row in enumerate(order):
        assert twins[1].firsts(0, at) == twins[0].firsts(0, row)


@pytest.mark.parametrize(
    "name", [name for name, p in CASES.items() if p.tokens and p.spread == "uniform"]
)
def test_a_table_stays_within_its_budget(name):
    chosen = CASES[name]
    twin = Twin(chosen, SIZE, [50, 20], seed=1)
    most = -(-chosen.tokens // SIZE) + 1
    shares = chosen.recent + int(chosen.recent_share * (chosen.tokens - chosen.sinks))
    needs = -(-chosen.sinks // SIZE) + -(-shares // SIZE) + 1
    for _ in range(80):
        twin.step(np.array([3, 2]))
        held = -(-twin.resident // SIZE)
        first_seal = (twin.prompt // SIZE + 1) * SIZE
        in_flight = np.where(twin.computed < first_seal, -(-chosen.chunk // SIZE), 0)
        assert (held <= max(most, needs) + in_flight).all()
