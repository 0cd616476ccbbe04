"""A plan is plain data, and making one costs the same Python for 8 sequences as for 128."""

import sys
from collections import Counter

import numpy as np
import pytest

from pagedkv import SamplingBatch, Scheduler, StepPlan, StepResult
from tests.core.fakes import Driver, grouped, make_config, make_request


def steady(num_seqs, *, block_size=16, num_groups=1, penalty=0.0, prefix_caching=True):
    """A scheduler in which ``num_seqs`` sequences do nothing but decode."""
    config = make_config(
        block_size,
        num_seqs * num_groups * 40,
        max_num_seqs=128,
        max_num_batched_tokens=128 * 16,
        prefix_caching=prefix_caching,
    )
    scheduler = Scheduler(grouped(config, num_groups))
    for i in range(num_seqs):
        prompt = [i % 50] * 9
        scheduler.add(make_request(f"r{i}", prompt, max_tokens=100, presence_penalty=penalty))
    step(scheduler)
    return scheduler


def step(scheduler):
    plan = scheduler.schedule()
    return scheduler.commit(plan, StepResult(token_ids=np.ones(len(plan.sample_rows), np.int32)))


def python_lines(call):
    """Count the lines of pagedkv that run during a call, and the Python functions entered."""
    counts = Counter()

    def trace(frame, event, _):
        if "pagedkv" in frame.f_code.co_filename:
            counts[event] += 1
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return counts["line"], counts["call"]


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_decode_step_runs_the_same_lines_for_8_sequences_as_for_128(num_groups, penalty):
    """No loop over sequences, anywhere between `schedule` and the end of `commit`."""
    few, many = (steady(n, num_groups=num_groups, penalty=penalty) for n in (8, 128))
    lines = python_lines(lambda: step(few))
    assert lines[0] > 50
    assert python_lines(lambda: step(many)) == lines


def test_crossing_a_block_boundary_runs_the_same_lines_as_well():
    """Every sequence takes a new block here; sealing is the only work per block."""
    few, many = (steady(n, block_size=9, prefix_caching=False) for n in (8, 128))
    held = few.manager.pool.num_held
    lines = python_lines(lambda: step(few))
    assert few.manager.pool.num_held == 2 * held
    assert python_lines(lambda: step(many)) == lines


def test_the_counter_sees_a_loop():
    def loop(n):
        return python_lines(lambda: Counter(pagedkv_loop(n)))

    code = compile("def pagedkv_loop(n):\n for i in range(n):\n  yield i\n", "pagedkv", "exec")
    scope = {}
    exec(code, scope)
    pagedkv_loop = scope["pagedkv_loop"]
    assert loop(8) != loop(9)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_plans_arrays_have_the_documented_types_and_shapes(num_groups):
    driver = Driver(make_config(4, 60), num_groups=num_groups)
    driver.add(make_request("a", 9, n=2))
    driver.add(make_request("b", 3))
    for _ in range(3):
        driver.step()
    for plan in driver.plans:
        b, t, s, g = len(plan.rows), plan.num_tokens, len(plan.sample_rows), num_groups
        width = plan.block_table.shape[2]
        expected = {
            "copies": (np.int32, (len(plan.copies), 2)),
            "rows": (np.int32, (b,)),
            "seq_ids": (np.int64, (b,)),
            "query_start": (np.int32, (b + 1,)),
            "token_ids": (np.int32, (t,)),
            "positions": (np.int32, (t,)),
            "slot_mapping": (np.int64, (g, t)),
            "block_table": (np.int32, (g, b, width)),
            "num_resident": (np.int32, (g, b)),
            "sample_index": (np.int32, (s,)),
            "sample_rows": (np.int32, (s,)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(plan, name)
            assert (name, array.dtype, array.shape) == (name, dtype, shape)
        assert width == -(-plan.num_resident.max() // 4)
        assert plan.query_start[-1] == t
        assert plan.sampling.most_logprobs == max([*plan.sampling.num_logprobs.tolist(), -1])
        for name in set(SamplingBatch.__struct_fields__) - {"most_logprobs"}:
            column = getattr(plan.sampling, name)
            assert column is None or column.shape == (s,), name


def test_an_empty_plan_has_the_same_types():
    full = Driver(make_config())
    full.add(make_request("a", 5))
    full.step()
    empty = Scheduler(make_config()).schedule()
    assert empty.num_tokens == 0
    assert empty.query_start.tolist() == [0]
    for name in StepPlan.__struct_fields__:
        one, other = getattr(empty, name), getattr(full.plans[0], name)
        if isinstance(one, np.ndarray):
            assert (name, one.dtype, one.ndim) == (name, other.dtype, other.ndim)


def test_entries_past_a_sequences_blocks_are_zero():
    driver = Driver(make_config(4, 60))
    # The rows and their tables have been used before.
    driver.run(*(make_request(f"earlier {i}", [i] * 20, max_tokens=1) for i in range(2)))
    driver.add(make_request("long", [40] * 20))
    driver.add(make_request("short", [41] * 2))
    driver.step()
    table = driver.plans[-1].block_table[0]
    assert table.shape == (2, 5)
    assert table[1, 0] != 0
    assert table[1, 1:].tolist() == [0] * 4


def arrays_of(struct):
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, np.ndarray):
            yield value
        elif hasattr(value, "__struct_fields__"):
            yield from arrays_of(value)


def test_a_plan_and_an_output_share_no_memory_with_the_scheduler():
    driver = Driver(make_config(4, 60), num_groups=3)
    driver.add(make_request("a", 6, n=3, presence_penalty=0.5))
    outputs = [driver.step() for _ in range(3)]
    table, pool = driver.scheduler.table, driver.scheduler.manager.pool
    inner = [v for o in (table, pool) for v in vars(o).values() if isinstance(v, np.ndarray)]
    inner += table.sampling.values()
    assert len(inner) > 15
    for struct in driver.plans + outputs:
        for outer in arrays_of(struct):
            assert not any(np.shares_memory(outer, array) for array in inner)


def test_penalised_samples_bring_the_tokens_they_have_seen():
    driver = Driver(make_config(4, 60))
    driver.add(make_request("plain", [1, 2]))
    driver.add(make_request("repeats", [3, 3, 4], repetition_penalty=1.2))
    driver.step()
    driver.step()
    penalties = driver.plans[-1].sampling.penalties
    drawn = driver.executor.known[1][3]
    assert penalties.sample.tolist() == [1] * 4
    assert penalties.token.tolist() == [3, 3, 4, drawn]
    assert penalties.generated.tolist() == [False, False, False, True]


def test_nobody_pays_for_penalties_that_nobody_asked_for():
    driver = Driver(make_config(4, 60))
    driver.add(make_request("plain", [1, 2]))
    driver.step()
    assert driver.plans[-1].sampling.penalties is None


def test_a_plans_slots_lie_group_after_group_whichever_rows_run():
    driver = Driver(make_config(4, 200), num_groups=3)
    for name in "abcd":
        driver.add(make_request(name, 6))
    driver.step()
    driver.scheduler.abort("b")
    driver.step()
    plan = driver.plans[-1]
    assert plan.rows.tolist() == [0, 2, 3]
    assert plan.num_tokens == 3
    assert plan.slot_mapping.flags.c_contiguous
