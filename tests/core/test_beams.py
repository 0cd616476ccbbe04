"""Beams of one request step together: what they find is what a plain search alone would find."""

import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import pagedkv.core.beams as beams_module
from pagedkv import InvalidRequest, InvalidTransition, NeverFits, SamplingParams
from pagedkv.core.runlog import RunLog, plan_bytes, replay
from tests.core.fakes import VOCAB, Driver, RecordingExecutor, alone, make_config, make_request


def logprobs_after(prefix):
    """A distribution over the vocabulary that any change in the prefix changes."""
    noise = np.random.default_rng(zlib.crc32(np.asarray(prefix, np.int32).tobytes()))
    logits = 3 * noise.standard_normal(VOCAB)
    return logits - np.log(np.exp(logits).sum())


def named(prefix, count):
    """The likeliest next tokens and their log-probabilities."""
    logprobs = logprobs_after(prefix)
    best = np.argsort(-logprobs, kind="stable")[:count]
    return best, logprobs[best]


class NamingExecutor(RecordingExecutor):
    """Reads every beam's past back from its blocks, and names what may follow it."""

    def execute(self, plan):
        result = super().execute(plan)
        wanted = plan.sampling.num_logprobs
        width = max(0, int(wanted.max(initial=0)))
        ids = np.full((len(wanted), width), -1, np.int32)
        logprobs = np.full((len(wanted), width), np.nan, np.float32)
        member = np.searchsorted(plan.query_start, plan.sample_index, side="right") - 1
        for i, b in enumerate(member.tolist()):
            count = max(0, int(wanted[i]))
            ids[i, :count], logprobs[i, :count] = named(self._read(plan, b), count)
        return replace(result, top_ids=ids, top_logprobs=logprobs)


class BeamDriver(Driver):
    """Beams change their tokens under way, so what they must see is asked of the table."""

    def __init__(self, config, *, num_groups=1):
        super().__init__(config, num_groups=num_groups)
        cache = config.cache
        self.executor = NamingExecutor(cache.num_blocks, cache.block_size, num_groups)
        self.peak = 0

    def add(self, request):
        first = self.scheduler.num_added
        ids = super().add(request)
        for seq_id in range(first, self.scheduler.num_added):
            self.executor.salts[seq_id] = request.cache_salt
        return ids

    def step(self, between=lambda: None):
        def look():
            table = self.scheduler.table
            for seq in filter(None, table.sequences):
                if seq.beams:
                    known = table.token_ids[seq.row, : table.num_known[seq.row]].tolist()
                    self.executor.known[seq.seq_id] = known
                    for key in [key for key in self.executor._chains if key[0] == seq.seq_id]:
                        del self.executor._chains[key]
            self.peak = max(self.peak, self.scheduler.stats().blocks_held)
            between()

        return super().step(look)


def search(request):
    """A plain search: [(tokens, sum, reason)] of the n best."""
    asked, prompt = request.sampling, list(request.prompt_token_ids)
    width, stops = asked.beam_width, set(asked.stop_token_ids)
    count = width * (1 + max(1, len(stops)))
    beams, found = [(0.0, [])], []
    while True:
        every = []
        for total, tokens in beams:
            ids, logprobs = named(prompt + tokens, count)
            # As a device gives them.
            every += [
                (total + float(np.float32(p)), [*tokens, t])
                for t, p in zip(ids.tolist(), logprobs, strict=True)
            ]
        every = sorted(every, key=lambda each: -each[0])[:count]
        last = len(every[0][1]) == asked.max_tokens
        over = [last or tokens[-1] in stops for _, tokens in every]
        length = len(every[0][1])
        for (total, tokens), ends in list(zip(every, over, strict=True))[:width]:
            if ends:
                reason = "stop" if tokens[-1] in stops else "length"
                found.append((total / length**asked.length_penalty, total, tokens, reason))
        found = sorted(found, key=lambda each: -each[0])[:width]
        beams = [each for each, ends in zip(every, over, strict=True) if not ends][:width]
        ahead = length
        if asked.early_stopping == "never" and asked.length_penalty > 0:
            ahead = asked.max_tokens
        full = len(found) == width
        if not beams or (full and asked.early_stopping is True):
            break
        if full and beams[0][0] / ahead**asked.length_penalty <= found[-1][0]:
            break
    return [(tokens, total, reason) for _, total, tokens, reason in found[: asked.n]]


def beams(name, prompt, width=3, **fields):
    fixed = {"beam_width": width, "n": width, "temperature": 0.0, "max_tokens": 9}
    return make_request(name, prompt, **(fixed | {"stop_token_ids": (1, 2, 3, 4)} | fields))


def check(driver):
    for name, request in driver.requests.items():
        if request.sampling.beam_width is None:
            answers = alone(request, driver.scheduler.config)
            got = [driver.finished[name, i].token_ids for i in range(request.sampling.n)]
            assert got == [tokens for tokens, _ in answers]
            continue
        for i, (tokens, total, reason) in enumerate(search(request)):
            end = driver.finished[name, i]
            assert (end.token_ids, end.finish_reason) == (tokens, reason)
            assert end.cumulative_logprob == pytest.approx(total)
    stats = driver.scheduler.stats()
    assert stats.blocks_held == 0
    assert len(driver.scheduler.table.free_rows) == driver.scheduler.table.num_rows


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 20),  # tokens of the prompt
        st.sampled_from([None, 2, 3, 4]),  # beams
        st.integers(1, 14),  # most tokens
        st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
        st.sampled_from([True, False, "never"]),
        st.integers(0, 8),  # the step it comes at
    ),
    min_size=1,
    max_size=5,
)


@given(
    requests=REQUESTS,
    num_blocks=st.integers(40, 60),
    budget=st.sampled_from([3, 9, 64]),
    caching=st.booleans(),
    admission=st.sampled_from(["greedy", "optimistic", "guaranteed"]),
)
def test_whatever_else_runs_a_search_finds_what_it_would_alone(
    requests, num_blocks, budget, caching, admission
):
    config = make_config(
        4,
        num_blocks,
        prefix_caching=caching,
        max_num_batched_tokens=budget,
        admission=admission,
    )
    driver, waiting = BeamDriver(config), []
    for i, (length, width, most, penalty, early, comes) in enumerate(requests):
        prompt = [(i * 7 + j) % VOCAB for j in range(length)]
        made = make_request(f"r{i}", prompt, seed=i, max_tokens=most)
        if width is not None:
            made = beams(
                f"r{i}",
                prompt,
                width,
                n=(width + 1) // 2,
                max_tokens=most,
                length_penalty=penalty,
                early_stopping=early,
            )
        waiting.append((comes, made))
    for step in range(9):
        for comes, made in waiting:
            if comes == step:
                driver.add(made)
        driver.step()
    driver.run()
    check(driver)
    if admission == "guaranteed":
        assert driver.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("budget", [2, 5, 64])
def test_searches_that_are_pushed_back_come_back_to_where_they_were(num_groups, budget):
    driver = BeamDriver(
        make_config(4, 16 * num_groups, max_num_batched_tokens=budget), num_groups=num_groups
    )
    driver.run(*(beams(f"r{i}", [i] * 9, max_tokens=24, stop_token_ids=()) for i in range(2)))
    stats = driver.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.recomputed_tokens > 0
    check(driver)


def test_beams_hold_a_tree_and_not_a_copy_each():
    driver = BeamDriver(make_config(4, 200))
    driver.run(beams("a", [5] * 60, width=6, max_tokens=5, stop_token_ids=()))
    assert driver.peak <= 60 // 4 + 6 * 2
    copies = sum(len(plan.copies) for plan in driver.plans)
    assert copies <= 5 * len(driver.plans), "more than the tails are copied"


def test_equal_searches_step_side_by_side_and_in_one_plan():
    driver = BeamDriver(make_config(4, 60))
    driver.run(*(beams(f"r{i}", [i] * 5, max_tokens=6, stop_token_ids=()) for i in range(2)))
    assert [plan.num_tokens for plan in driver.plans] == [10] + [6] * 5
    check(driver)


def test_beams_wait_for_those_whom_the_budget_leaves_out():
    driver = BeamDriver(make_config(4, 60, max_num_batched_tokens=2))
    driver.run(beams("a", 3, width=4, max_tokens=4, stop_token_ids=()))
    assert max(plan.num_tokens for plan in driver.plans) == 2
    check(driver)


def test_a_search_that_outgrows_the_pool_fails_alone():
    driver = BeamDriver(make_config(4, 12))
    driver.add(beams("big", [5] * 9, width=4, max_tokens=30, stop_token_ids=()))
    driver.add(make_request("small", 4, max_tokens=8))
    driver.run()
    ends = [driver.finished["big", i] for i in range(4)]
    assert {end.finish_reason for end in ends} == {"error"}
    assert "outgrown" in ends[0].error
    assert driver.finished["small", 0].finish_reason == "length"


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("in_flight", [False, True])
def test_an_abort_ends_all_beams_at_any_moment(steps, in_flight):
    driver = BeamDriver(make_config(4, 14, max_num_batched_tokens=6))
    driver.add(beams("a", [9] * 7, stop_token_ids=()))
    driver.add(beams("b", [8] * 7, n=2, stop_token_ids=()))
    for _ in range(steps):
        driver.step()
    if in_flight:
        driver.step(between=lambda: driver.abort("b"))
    else:
        driver.abort("b")
    ended = {key: end.finish_reason for key, end in driver.finished.items() if key[0] == "b"}
    assert ended == {("b", 0): "abort", ("b", 1): "abort"}
    del driver.requests["b"]
    driver.run()
    check(driver)


def test_a_discarded_plan_takes_the_whole_search_back():
    driver = BeamDriver(make_config(4, 40, max_num_batched_tokens=5))
    driver.add(beams("a", 6, stop_token_ids=()))
    for _ in range(4):
        driver.step()
    plan = driver.scheduler.schedule()
    driver.scheduler.discard(plan)
    driver.scheduler.audit()
    assert driver.scheduler.stats().num_running == 0
    driver.run()
    check(driver)


def test_a_stop_of_a_beam_ends_its_search_and_tells_each_of_its_answers():
    driver = BeamDriver(make_config(4, 60))
    ids = driver.add(beams("a", 5, n=2))
    driver.step()
    driver.step()
    ends = driver.scheduler.stop(ids[1], "END")
    assert [(end.seq_id, end.index, end.stop_reason) for end in ends] == [
        (ids[0], 0, "END"),
        (ids[1], 1, "END"),
    ]
    assert not driver.scheduler.has_unfinished()


@pytest.mark.parametrize("fault", ["token", "nan", "draw"])
def test_a_beam_whose_logits_failed_ends_its_search_alone(fault):
    driver = BeamDriver(make_config(4, 60))
    driver.add(beams("bad", [5] * 5))
    driver.add(beams("good", [6] * 5))
    driver.step()
    execute = driver.executor.execute

    def broken(plan):
        result = execute(plan)
        top_ids, top_logprobs = result.top_ids.copy(), result.top_logprobs.copy()
        drawn, bad = result.token_ids.copy(), plan.sample_rows.tolist().index(1)
        if fault == "token":
            top_ids[bad, 2] = VOCAB
        elif fault == "nan":
            top_logprobs[bad, 0] = np.nan
        else:
            drawn[bad] = -1
        return replace(result, token_ids=drawn, top_ids=top_ids, top_logprobs=top_logprobs)

    driver.executor.execute = broken
    driver.step()
    driver.executor.execute = execute
    assert {driver.finished["bad", i].finish_reason for i in range(3)} == {"error"}
    del driver.requests["bad"]
    driver.run()
    check(driver)


def test_a_result_without_candidates_is_refused_and_the_right_one_still_taken():
    driver = BeamDriver(make_config(4, 60))
    driver.add(beams("a", 5))
    plan = driver.scheduler.schedule()
    result = driver.executor
    result.known.update({i: list(range(5)) for i in range(3)})
    result = result.execute(plan)
    for wrong in (
        replace(result, top_ids=None),
        replace(result, top_ids=result.top_ids[:, :2]),
        replace(result, top_logprobs=result.top_logprobs[:1]),
    ):
        with pytest.raises(InvalidTransition, match="top_"):
            driver.scheduler.commit(plan, wrong)
    driver.scheduler.commit(plan, result)
    driver.run()
    check(driver)


def test_a_logged_search_replays_byte_for_byte(tmp_path):
    driver = BeamDriver(make_config(4, 14, max_num_batched_tokens=6))
    with RunLog(driver.scheduler, tmp_path / "run") as driver.scheduler:
        driver.run(*(beams(f"r{i}", [i] * 9, max_tokens=12) for i in range(3)))
    plans = [plan_bytes(plan) for plan in replay(tmp_path / "run")]
    assert plans == [plan_bytes(plan) for plan in driver.plans]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"beam_width": 1}, "beam_width is 1"),
        ({"beam_width": 2, "n": 3}, "beam_width is 2 and n is 3"),
        ({"beam_width": 2, "best_of": 2}, "best_of is 2"),
        ({"beam_width": 2, "temperature": 0.5}, "temperature is 0.5"),
        ({"beam_width": 2, "top_p": 0.9}, "top_p is 0.9"),
        ({"beam_width": 2, "stop": "x"}, "stop is"),
        ({"beam_width": 2, "logprobs": 1}, "logprobs is 1"),
        ({"beam_width": 2, "repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"beam_width": 2, "logit_bias": {1: 1.0}}, "logit_bias is"),
        ({"beam_width": 2, "allowed_token_ids": [1]}, "allowed_token_ids is"),
        ({"beam_width": 2, "min_tokens": 1}, "min_tokens is 1"),
        ({"beam_width": 2, "early_stopping": "always"}, "early_stopping is 'always'"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
    ],
)
def test_parameters_that_mean_nothing_to_a_search_are_refused(fields, match):
    with pytest.raises(InvalidRequest, match=match):
        SamplingParams(**fields)


def test_more_beams_than_rows_or_tokens_are_refused():
    driver = BeamDriver(make_config(4, 60, max_num_seqs=4))
    with pytest.raises(InvalidRequest, match="beam_width is 5 and 4 sequences run at once"):
        driver.add(beams("a", 5, width=5))
    with pytest.raises(InvalidRequest, match="for which each beam names 64 tokens"):
        driver.add(beams("a", 5, width=4, stop_token_ids=tuple(range(15))))
    assert not driver.scheduler.has_unfinished()


def test_guaranteed_admission_refuses_a_search_that_could_outgrow_the_pool():
    driver = BeamDriver(make_config(4, 12, admission="guaranteed"))
    with pytest.raises(NeverFits):
        driver.add(beams("a", 9, width=4, max_tokens=30))


def test_a_step_without_beams_asks_only_whether_there_are_any():
    """Nothing else of `core/beams.py` is entered, so no array is made for them."""

    def entered(count):
        driver = Driver(make_config(4, 100))
        for i in range(count):
            driver.add(make_request(f"r{i}", [i] * 5, max_tokens=9))
        for _ in range(3):
            driver.step()
        plan = driver.scheduler.schedule()
        result = driver.executor.execute(plan)
        seen, before = [], sys.gettrace()

        def trace(frame, event, _):
            if frame.f_code.co_filename == beams_module.__file__:
                seen.append(frame.f_code.co_name)

        sys.settrace(trace)
        try:
            driver.scheduler.commit(plan, result)
            driver.scheduler.schedule()
        finally:
            sys.settrace(before)
        return seen

    assert entered(1) == entered(8)
    assert set(entered(1)) == {"__bool__"}


def test_blocks_that_beams_share_count_once_against_a_quota():
    driver = BeamDriver(make_config(4, 64, tenants=("a=16",)))
    searches = replace(make_request("x", 24, max_tokens=4, beam_width=4), tenant="a")
    driver.run(searches)
    assert driver.peak <= 16
    assert driver.finished["x", 0].finish_reason == "length"
