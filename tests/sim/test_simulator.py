"""The simulated engine: hand-computed clocks, leaps that change nothing, users that wait."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import pagedkv
from pagedkv import ConfigError, TraceError
from pagedkv.sim.cost import StepWork
from pagedkv.sim.generators import Lengths, random_requests, sessions, tenants
from pagedkv.sim.presets import cost_preset
from pagedkv.sim.processes import in_processes
from pagedkv.sim.recorder import LATENCIES
from pagedkv.sim.simulator import Replica
from pagedkv.sim.slo import objective
from tests.sim.workloads import config, listed, request

COST = cost_preset("a100-llama3-8b")


def prefill(tokens, history=0):
    pairs = tokens * (history + tokens / 2)
    work = StepWork(
        num_tokens=tokens, context_tokens=history + tokens, attention_pairs=float(pairs)
    )
    return float(COST.seconds(work))


def decode(context):
    work = StepWork(num_tokens=1, context_tokens=context, attention_pairs=context - 0.5)
    return float(COST.seconds(work))


def test_one_request_takes_the_sum_of_its_steps():
    found = pagedkv.simulate(config(), listed(request(2.0, 100, 3, 0)))
    first = prefill(64) + prefill(36, 64)
    rest = decode(101) + decode(102)
    assert found.summary["mean_ttft_ms"] == pytest.approx(1000 * first)
    assert found.summary["mean_e2el_ms"] == pytest.approx(1000 * (first + rest))
    assert found.summary["mean_tpot_ms"] == pytest.approx(1000 * rest / 2)
    assert found.summary["duration"] == pytest.approx(first + rest)
    assert found.summary["num_steps"] == 4
    assert found.latency["itl"].count == 2


def test_whoever_comes_during_a_step_is_served_from_the_next():
    late = prefill(10) / 2
    found = pagedkv.simulate(config(), listed(request(0.0, 10, 1, 0), request(late, 20, 1, 1)))
    second = prefill(10) - late + prefill(20)
    assert found.latency["ttft"].greatest == pytest.approx(second)
    assert found.latency["queue"].greatest == pytest.approx(prefill(10) - late)


def outcome(found):
    """All that a leap could change, and the sums whose order of addition it does change."""
    exact = {
        name: found.summary[name]
        for name in found.summary
        if name.startswith(("p", "median", "num_", "total", "completed", "failed", "re", "max"))
        and name not in ("num_leaps", "peak_kv_cache_usage")
    }
    close = [found.occupancy.means[name] for name in found.occupancy.names]
    close += [found.latency[name].mean for name in LATENCIES]
    close += [row["mean_blocks_held"] for row in found.tenants.values()]
    exact |= {name: (each.least, each.greatest) for name, each in found.latency.items()}
    counts = [
        (name, row["requests"], row["evictions_caused_to_others"], row["preemptions"])
        for name, row in found.tenants.items()
    ]
    return exact, close, counts


def make_workload(kind, seed, rate):
    lengths = {
        "input_len": Lengths(30, "lognormal", 1.0),
        "output_len": Lengths(25, "lognormal", 1.0),
    }
    if kind == "sessions":
        return sessions(num_prompts=40, rate=rate, think=0.5, prefix_len=24, seed=seed, **lengths)
    if kind == "tenants":
        return tenants(
            num_prompts=40, rate=rate, num_tenants=3, prefix_len=24, seed=seed, **lengths
        )
    return random_requests(num_prompts=40, rate=rate, seed=seed, **lengths)


def pools(schedulers):
    """Who would be given which block next, what can be found where, and what admission goes by."""
    found = []
    for scheduler in schedulers:
        scheduler.audit()
        pool, index = scheduler.manager.pool, scheduler.manager.index
        cached = [(block, index.digest_of(block)) for block in pool.cached.all().tolist()]
        blank = pool._blank[: pool.num_available - pool.num_cached].tolist()
        adapts = scheduler.config.scheduler.admission == "optimistic"
        ratio = scheduler.admission.ratio if adapts else None
        # With several tenants it depends on who was idle when; only `fair`, planned singly, asks.
        served = scheduler.tenants.served.tolist()
        found.append((blank, cached, ratio, served if len(served) == 1 else None))
    return found


def both_ways(setup, asked, **options):
    """Simulate with leaps and without; return what differs if leaps change anything."""
    found = []
    for leap in (False, True):
        schedulers = []
        ran = pagedkv.simulate(setup, asked, leap=leap, prepare=schedulers.append, **options)
        found.append((*outcome(ran), pools(schedulers), ran.summary["num_leaps"]))
    return found


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    kind=st.sampled_from(["random", "tenants", "sessions"]),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([1.0, 5.0, 40.0, math.inf]),
    num_blocks=st.sampled_from([60, 90, 150, 2000]),
    reclaim=st.sampled_from(["lru", "fifo", "lfu", "slru"]),
    replicas=st.sampled_from([1, 1, 2]),
    max_concurrency=st.sampled_from([None, None, 3]),
    num_cpu_blocks=st.sampled_from([0, 40]),
    granularity=st.sampled_from(["sequence", "sequence", "layer"]),
    scheduler=st.fixed_dictionaries(
        {
            "max_num_seqs": st.sampled_from([2, 8]),
            "max_num_batched_tokens": st.sampled_from([8, 20, 64]),
            "scheduling_policy": st.sampled_from(["fcfs", "fcfs", "priority", "lpm", "fair"]),
            "admission": st.sampled_from(["greedy", "optimistic", "guaranteed"]),
            "long_prefill_token_threshold": st.sampled_from([0, 0, 7]),
            "max_skips": st.sampled_from([0, 0, 2]),
            "watermark": st.sampled_from([0.0, 0.1]),
        }
    ),
)
def test_leaps_change_nothing(
    kind,
    seed,
    rate,
    num_blocks,
    reclaim,
    replicas,
    max_concurrency,
    num_cpu_blocks,
    granularity,
    scheduler,
):
    setup = config(num_blocks, reclaim=reclaim, **scheduler)
    cache = msgspec.structs.replace(
        setup.cache, num_cpu_blocks=num_cpu_blocks, granularity=granularity
    )
    model = msgspec.structs.replace(setup.model, num_layers=2)
    setup = msgspec.structs.replace(setup, cache=cache, model=model)
    slow, fast = both_ways(
        setup,
        make_workload(kind, seed, rate),
        replicas=replicas,
        max_concurrency=max_concurrency,
    )
    assert slow[-1] == 0
    slow_exact, slow_close, slow_counts, slow_pools, _ = slow
    fast_exact, fast_close, fast_counts, fast_pools, _ = fast
    assert fast_exact == slow_exact
    assert fast_counts == slow_counts
    assert fast_pools == slow_pools
    assert fast_close == pytest.approx(slow_close)


def test_leaps_are_taken():
    found = pagedkv.simulate(config(), listed(request(0, 10, 200, 0), request(0, 10, 200, 1)))
    assert found.summary["num_leaps"] > 0
    assert found.summary["num_steps"] == 200


def test_a_leap_ends_with_whoever_ends():
    """Among few users somebody waits for each end; else one stride takes all."""
    asks = [request(0, 10, outputs, key) for key, outputs in enumerate((50, 100, 100, 200))]
    alone = pagedkv.simulate(config(400), listed(*asks))
    assert (alone.summary["num_steps"], alone.summary["num_leaps"]) == (200, 1)
    users = pagedkv.simulate(config(400), listed(*asks), max_concurrency=4)
    assert (users.summary["num_steps"], users.summary["num_leaps"]) == (200, 3)
    assert outcome(alone)[0] == outcome(users)[0]


def test_everything_asked_is_served_or_counted():
    huge = request(0.5, 5000, 4, 9)
    found = pagedkv.simulate(config(), listed(request(0, 10, 5, 0), huge, request(1, 10, 5, 1)))
    assert found.summary["completed"] == 2
    assert found.summary["failed"] == 1
    assert found.summary["refused"] == {"larger than the pool": 1}


def test_a_refused_turn_takes_its_follow_ups_along_and_they_are_counted():
    last = request(0, 10, 4, 3, think=1.0)
    second = request(0, 5000, 4, 2, think=1.0, then=last)
    first = request(0, 10, 4, 1, then=second)
    found = pagedkv.simulate(config(), listed(first, closed_loop=True))
    assert found.summary["completed"] == 1
    assert found.summary["refused"] == {"larger than the pool": 1}
    assert found.summary["unsent_follow_ups"] == 1
    assert found.summary["failed"] == 2
    assert found.tenants[""]["failed_requests"] == 2


def test_nobody_goes_on_with_a_conversation_that_outgrew_the_pool():
    second = request(0, 10, 4, 2, think=1.0)
    first = request(0, 10, 4000, 1, then=second)
    found = pagedkv.simulate(config(20), listed(first, closed_loop=True))
    assert found.summary["completed"] == 0
    assert found.summary["refused"] == {}
    assert found.summary["unsent_follow_ups"] == 1
    assert found.summary["failed"] == 2


def test_a_follow_up_comes_its_think_time_after_the_answer():
    second = request(0, 30, 1, 2, think=7.0)
    first = request(0, 10, 4, 1, then=second)
    found = pagedkv.simulate(config(), listed(first, closed_loop=True))
    ended = prefill(10) + sum(decode(c) for c in (11, 12, 13))
    assert found.summary["duration"] == pytest.approx(ended + 7 + prefill(30))
    assert found.latency["queue"].greatest == 0


def test_few_users_wait_for_their_answers():
    asks = [request(0.0, 10, 4, key) for key in range(6)]
    found = pagedkv.simulate(config(), listed(*asks), max_concurrency=2)
    assert found.summary["max_concurrent_requests"] == 2
    assert found.summary["completed"] == 6
    assert found.occupancy.peaks["running"] == 2


@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    kind=st.sampled_from(["random", "sessions"]),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([5.0, 40.0, math.inf]),
    replicas=st.integers(1, 3),
    routing=st.sampled_from(["round_robin", "least_loaded"]),
    limit=st.sampled_from([None, 1, 3, 7]),
)
def test_nobody_is_served_before_coming(kind, seed, rate, replicas, routing, limit):
    asked = make_workload(kind, seed, rate)
    options = {"replicas": replicas, "routing": routing, "max_concurrency": limit}
    found = pagedkv.simulate(config(4000), asked, watch=True, **options)
    lives = {}
    for phase in (phase for phases in found.phases for phase in phases):
        assert phase.begin <= phase.end
        begin, end = lives.get(phase.request, (math.inf, 0.0))
        lives[phase.request] = min(begin, phase.begin), max(end, phase.end)
    assert len(lives) == found.summary["completed"] == 40
    if limit is None or rate < math.inf or kind == "sessions":
        return  # who comes during the step with which another ends counts from when it came
    edges = [(begin, 1) for begin, _ in lives.values()] + [(end, -1) for _, end in lives.values()]
    in_flight = np.cumsum([step for _, step in sorted(edges)])
    assert in_flight.max() <= limit


def test_who_is_held_back_comes_when_the_end_is_reached_everywhere():
    """Replica 0 is behind when replica 1 ends; what comes then is dealt to replica 0."""
    asks = [request(0.0, 60, 30, 0), request(0.0, 10, 2, 1), request(0.0, 10, 2, 2)]
    found = pagedkv.simulate(config(), listed(*asks), replicas=2, max_concurrency=2, watch=True)
    (freed,) = (phase.end for phase in found.phases[1] if phase.kind == "decode")
    (queued,) = (p for p in found.phases[0] if (p.request, p.kind) == ("2", "queued"))
    assert queued.begin == freed <= queued.end


@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    kind=st.sampled_from(["random", "tenants", "sessions"]),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.5, 5.0, 40.0, math.inf]),
    num_blocks=st.sampled_from([120, 4000]),
    replicas=st.integers(1, 3),
    limit=st.sampled_from([None, 3]),
    leap=st.booleans(),
)
def test_littles_law(kind, seed, rate, num_blocks, replicas, limit, leap):
    """The mean number in the system is the rate times the mean time in it, idle time included."""
    setup = config(num_blocks, max_num_batched_tokens=20)
    options = {"replicas": replicas, "max_concurrency": limit, "leap": leap}
    found = pagedkv.simulate(setup, make_workload(kind, seed, rate), **options).summary
    assume(not found["failed"])  # whose time in the system is not among the latencies
    in_system = found["mean_running"] + found["mean_waiting"]
    mean = found["request_throughput"] * found["mean_e2el_ms"] / 1000
    assert in_system == pytest.approx(mean)


def test_replicas_add_up_and_idle_time_counts():
    """One replica works a little, the other more; both wait for most of the time."""
    asks = [request(float(i // 2), 30, 15 if i % 2 else 2, i) for i in range(20)]
    both = pagedkv.simulate(config(4000), listed(*asks), replicas=2)
    apart = [pagedkv.simulate(config(4000), listed(*asks[i::2])) for i in (0, 1)]
    spans = [each.summary["duration"] for each in apart]
    for name in ("held", "running", "tokens"):
        means = [each.occupancy.means[name] for each in apart]
        assert both.occupancy.means[name] == pytest.approx(np.dot(spans, means) / max(spans))
    assert both.summary["mean_running"] < 0.5
    held = both.summary["mean_kv_cache_usage"] * both.summary["num_blocks"]
    assert held == pytest.approx(both.tenants[""]["mean_blocks_held"])
    table = both.occupancy.table()
    assert np.diff(table["cached"]).min() > -1e-9, "cached blocks stay while nobody asks"
    assert table["cached"][-1] > 0


def test_a_conversation_finds_its_own_history_in_the_cache():
    lengths = {"input_len": Lengths(40), "output_len": Lengths(40)}
    talk = sessions(num_prompts=30, rate=1.0, turns=30, think=1.0, prefix_len=0, **lengths)
    found = pagedkv.simulate(config(4000), talk)
    assert found.summary["prefix_cache_hit_rate"] > 0.7


def test_replicas_share_the_load():
    asks = [request(0.0, 40, 20, key) for key in range(16)]
    one = pagedkv.simulate(config(), listed(*asks), routing="least_loaded")
    four = pagedkv.simulate(config(), listed(*asks), replicas=4, routing="least_loaded")
    assert four.summary["completed"] == one.summary["completed"] == 16
    assert four.summary["duration"] < one.summary["duration"]
    assert four.summary["num_blocks"] == 4 * one.summary["num_blocks"]


def test_goodput_counts_requests_that_keep_every_bound():
    asks = listed(request(0, 10, 5, 0), request(0, 60, 5, 1), request(5, 10, 5, 2))
    alone = prefill(10)
    found = pagedkv.simulate(config(), asks, slo=objective([f"ttft:{alone * 1000 + 0.01}"]))
    assert found.summary["good_fraction"] == pytest.approx(1 / 3)
    assert found.summary["request_goodput"] == pytest.approx(1 / found.summary["duration"])


def test_evictions_are_charged_to_the_tenant_that_took_the_blocks():
    steady = request(0.0, 40, 2, 0, tenant="quiet")
    flood = [request(10.0 + i, 160, 2, 10 + i, tenant="loud") for i in range(4)]
    found = pagedkv.simulate(config(60), listed(steady, *flood))
    loud, quiet = found.tenants["loud"], found.tenants["quiet"]
    assert loud["evictions_caused_to_others"] == 10
    assert quiet["evictions_suffered_from_others"] == 10
    assert quiet["evictions_caused_to_others"] == 0


def test_scores_are_said_to_be_made_up():
    talk = listed(request(0, 200, 50, 0))
    plain = pagedkv.simulate(config(), talk)
    judged = pagedkv.simulate(config(eviction="sinks=4 + recent=16 + heavy=32:sum"), talk)
    assert plain.summary["synthetic_scores"] is False
    assert judged.summary["synthetic_scores"] is True
    assert judged.occupancy.peaks["held"] < plain.occupancy.peaks["held"]


@pytest.mark.parametrize(
    "eviction", ["h2o + budget=32 + unit=token", "sinks=4 + budget=16 + unit=token"]
)
def test_policies_that_rank_tokens_are_shown_masses_of_tokens(eviction):
    asked = listed(*(request(0.1 * i, 70 + i, 60, i) for i in range(4)))
    runs = [pagedkv.simulate(config(eviction=eviction), asked, leap=leap) for leap in (True, False)]
    assert runs[0].summary["completed"] == 4
    assert runs[0].summary["synthetic_scores"] is True
    assert outcome(runs[0]) == outcome(runs[1])


def test_a_replica_has_the_blocks_that_its_storage_leaves_room_for():
    asked = listed(request(0, 1000, 20, 0))

    def served(**cache):
        made = pagedkv.EngineConfig(cache=pagedkv.CacheConfig(**cache))
        return pagedkv.simulate(made, asked).summary

    usual, narrow, half = (
        served(),
        served(kv_cache_dtype="int8"),
        served(kv_cache_memory_fraction=0.5),
    )
    assert narrow["num_blocks"] == pytest.approx(usual["num_blocks"] * 256 / 132, abs=2)
    assert narrow["mean_tpot_ms"] < usual["mean_tpot_ms"]
    assert half["num_blocks"] == COST.num_blocks(16, fraction=0.5) < usual["num_blocks"]


def test_preempted_requests_are_served_and_counted():
    asks = [request(0.0, 40, 60, key) for key in range(6)]
    found = pagedkv.simulate(config(60), listed(*asks), watch=True)
    assert found.summary["num_preemptions"] > 0
    assert found.summary["completed"] == 6
    assert found.latency["itl"].count == 6 * 59
    assert {phase.kind for phase in found.phases[0]} == {"queued", "prefill", "decode", "preempted"}
    assert all(phase.end >= phase.begin for phase in found.phases[0])


def test_swapping_is_counted_and_takes_its_time():
    asks = [request(0.0, 40, 60, key) for key in range(6)]
    setup = config(60, swap_cost=0.0)
    roomy = msgspec.structs.replace(setup.cache, num_cpu_blocks=200)
    found = pagedkv.simulate(msgspec.structs.replace(setup, cache=roomy), listed(*asks))
    assert found.summary["completed"] == 6
    assert found.summary["num_swapped_out"] > 0
    assert found.summary["swapped_tokens"] >= 2 * 40 * found.summary["num_swapped_out"]


def test_unsorted_arrivals_are_refused():
    with pytest.raises(TraceError, match="arrives at 1 s after one at 2 s"):
        pagedkv.simulate(config(), listed(request(2, 5, 5, 0), request(1, 5, 5, 1)))


@pytest.mark.parametrize(
    "options", [{"routing": "magic"}, {"max_concurrency": 0}, {"cost": "abacus"}, {"replicas": 0}]
)
def test_nonsense_is_refused(options):
    with pytest.raises(ConfigError):
        pagedkv.simulate(config(), listed(request(0, 5, 5, 0)), **options)


@pytest.mark.parametrize("words", [["ttft"], ["ttft:0"], ["ttft:1", "ttft:2"], ["speed:3"]])
def test_bounds_that_cannot_be_read_are_refused(words):
    with pytest.raises(ConfigError, match="goodput"):
        objective(words)


def test_equal_runs_are_equal():
    runs = [pagedkv.simulate(config(90), make_workload("tenants", 5, 9.0)) for _ in range(2)]
    assert msgspec.json.encode(runs[0].to_json()) == msgspec.json.encode(runs[1].to_json())


def test_memory_does_not_grow_with_the_number_of_requests():
    replica = Replica(config(), COST)
    lengths = {"input_len": Lengths(8), "output_len": Lengths(3)}
    for number, each in enumerate(random_requests(num_prompts=500, rate=50.0, **lengths)):
        while replica.busy and replica.clock < each.arrival:
            replica.advance(each.arrival)
        replica.add(each, str(number))
    recorder = replica.recorder
    assert len(recorder._lives) < 20
    assert len(replica._requests) < 20
    assert not recorder.phases
    assert np.isfinite(recorder.latency["ttft"].percentile(99))


@pytest.mark.parametrize("processes", [2, 3, 9])
@pytest.mark.parametrize("kind", ["random", "tenants"])
def test_processes_change_nothing(kind, processes):
    setup = config(num_blocks=90)
    asked = make_workload(kind, seed=3, rate=40.0)
    one = pagedkv.simulate(setup, asked, replicas=4)
    many = pagedkv.simulate(setup, asked, replicas=4, processes=processes)
    assert many.to_json() == one.to_json()


def test_replicas_that_depend_on_each_other_stay_in_one_process(monkeypatch):
    asked = make_workload("sessions", seed=3, rate=40.0)
    one = pagedkv.simulate(config(), asked, replicas=2)
    monkeypatch.setattr(pagedkv.sim.result, "in_processes", lambda serve, count: [serve(0)] * count)
    for changed in ({}, {"routing": "least_loaded"}, {"max_concurrency": 3}, {"watch": True}):
        many = pagedkv.simulate(config(), asked, replicas=2, processes=2, **changed)
        assert many.summary["completed"] == one.summary["completed"]


def test_a_fault_in_another_process_is_raised_here():
    def serve(number):
        if number:
            raise TraceError("a bad row", where="file:7")
        return number

    with pytest.raises(TraceError, match="a bad row"):
        in_processes(serve, 2)
