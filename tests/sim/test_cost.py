"""Step times: the published table, the closed form's own arithmetic, and the fit."""

import csv
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pagedkv import CacheConfig, ConfigError
from pagedkv.core.batch import Batch
from pagedkv.core.leap import Leap
from pagedkv.core.planner import Decision
from pagedkv.core.table import SequenceTable
from pagedkv.sim.calibration import fit, stacked
from pagedkv.sim.cost import StepWork, leap_work
from pagedkv.sim.presets import COSTS, cost_preset

TABLE = Path(__file__).parent / "data/step_times.csv"


def measured():
    with TABLE.open() as text:
        rows = list(csv.DictReader(text))
    for row in rows:
        length, batch = int(row["length"]), int(row["batch"])
        decode = row["phase"] == "decode"
        work = StepWork(
            num_tokens=batch if decode else batch * length,
            context_tokens=batch * (length + decode),
            attention_pairs=batch * (length + 0.5 if decode else length * length / 2),
        )
        yield row["hardware"], work, float(row["milliseconds"]) / 1000


def test_presets_are_within_five_percent_of_forty_published_step_times():
    errors = {}
    for name, work, seconds in measured():
        error = abs(float(COSTS[name].seconds(work)) - seconds) / seconds
        errors.setdefault(name, []).append(error)
    assert sum(map(len, errors.values())) == 40
    assert len(errors) == 4
    for name, found in errors.items():
        assert np.mean(found) < 0.05, name
        assert max(found) < 0.15, name


def test_a_step_reads_its_weights_at_least_and_grows_with_everything():
    cost = cost_preset("a100-llama3-8b")
    small = StepWork(num_tokens=1, context_tokens=1, attention_pairs=1)
    weights = 7.505e9 * 2 / 2.039e12
    assert float(cost.seconds(small)) > weights
    for field in ("num_tokens", "context_tokens", "attention_pairs"):
        assert cost.seconds(msgspec.structs.replace(small, **{field: 1e6})) > cost.seconds(small)
    for field in ("copied_tokens", "swapped_tokens"):
        assert cost.seconds(msgspec.structs.replace(small, **{field: 1e4})) > cost.seconds(small)


def test_swapping_takes_its_bytes_over_the_host_link():
    cost = cost_preset("a100-llama3-8b")
    still = StepWork(num_tokens=1, context_tokens=1, attention_pairs=1)
    moved = msgspec.structs.replace(still, swapped_tokens=1000)
    extra = float(cost.seconds(moved) - cost.seconds(still))
    assert extra == pytest.approx(1000 * 131_072 / 32e9)


def test_the_work_of_a_leap_is_each_step_s_own():
    """Two rows decode, a prompt of 100 tokens goes on with 20 and then 8 at a time."""
    nothing, counts = np.zeros((0, 2), np.int64), np.array([1, 1, 20], np.int32)
    decision = Decision(
        step=7,
        batch=Batch(SequenceTable(3, 16), np.arange(3, dtype=np.int32), counts),
        moves=nothing,
        swaps=(nothing, np.ones((3, 2), np.int32)),
        copies=nothing,
    )
    leap = Leap(
        decision=decision,
        then=np.array([1, 1, 8], np.int32),
        more=10,
        drawing=np.array([0, 1]),
        room=9,
        resident=np.array([[6, 18, 120]], np.int32),
        known=np.array([6, 18], np.int32),
        steps=4,
    )
    work = leap_work(leap, 16)
    resident = [5, 17, 100]
    for step in range(4):
        counts = [1, 1, 20 if step == 0 else 8]
        pairs = sum(c * r + c * c / 2 for c, r in zip(counts, resident, strict=True))
        resident = [r + c for r, c in zip(resident, counts, strict=True)]
        assert work.num_tokens[step] == sum(counts)
        assert work.context_tokens[step] == sum(resident)
        assert work.attention_pairs[step] == pairs
        assert work.swapped_tokens[step] == (48 if step == 0 else 0)


def test_a_fit_finds_the_numbers_that_made_the_times():
    truth = cost_preset("h100-llama3-8b")
    works = [work for name, work, _ in measured() if name == "h100-llama3-8b"]
    work = stacked(works)
    start = msgspec.structs.replace(truth, weight_efficiency=0.5, kv_efficiency=0.5, overhead=0.0)
    found = fit(start, work, np.asarray(truth.seconds(work)))
    assert found.mean_error < 0.01


@pytest.mark.parametrize(
    ("seconds", "match"),
    [([1.0, 2.0], "2 step times for 5 unknowns"), ([1.0] * 5 + [0.0], "not a positive number")],
)
def test_a_fit_of_too_little_or_of_nonsense_is_refused(seconds, match):
    work = stacked([StepWork(num_tokens=1, context_tokens=1, attention_pairs=1)] * len(seconds))
    with pytest.raises(ConfigError, match=match):
        fit(cost_preset("a100-llama3-8b"), work, np.array(seconds))


def test_the_pool_is_what_the_weights_leave():
    cost = cost_preset("rtx4090-llama3-8b")
    room = 0.9 * 24e9 - 8.03e9 * 2
    assert cost.num_blocks(16) == int(room // (131_072 * 16))
    with pytest.raises(ConfigError, match="leave no room"):
        msgspec.structs.replace(cost_preset("a100-llama3-70b"), tensor_parallel=1).num_blocks(16)


def test_keys_and_values_stored_narrow_are_more_blocks_and_quicker_to_read():
    cost, work = (
        cost_preset("a100-llama3-8b"),
        StepWork(
            num_tokens=8, context_tokens=8 * 4096, attention_pairs=8 * 4096, swapped_tokens=100
        ),
    )
    plain, seconds = cost.num_blocks(16), cost.terms(work)
    for dtype, bytes_per_vector in (("float16", 256), ("int8", 132), ("int4", 68)):
        narrow = cost.storing(CacheConfig(kv_cache_dtype=dtype))
        share = bytes_per_vector / 256
        assert narrow.num_blocks(16) == pytest.approx(plain / share, abs=1)
        assert narrow.terms(work)["kv"] == pytest.approx(share * seconds["kv"])
        assert narrow.terms(work)["fixed"] == pytest.approx(share * seconds["fixed"])
        assert narrow.terms(work)["weights"] == seconds["weights"]


def test_a_fraction_is_of_what_the_weights_leave():
    cost = cost_preset("rtx4090-llama3-8b")
    shape, left = cost.shape, cost.accelerator.memory
    left -= shape.parameters * shape.bytes_per_element
    assert cost.num_blocks(16, fraction=0.5) == int(left / 2 // (131_072 * 16))


def test_unknown_hardware_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="a100-llama3-8b"):
        cost_preset("abacus")
