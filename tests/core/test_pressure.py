"""The rungs of the ladder: which is taken when blocks lack, that it costs no answer, its end."""

import random

import msgspec
import numpy as np
import pytest

from pagedkv import ConfigError
from pagedkv.core.shrink import shrink
from pagedkv.core.tiers import HostTier
from pagedkv.core.victims import VICTIMS
from pagedkv.eviction import policy
from tests.core.answers import Service, answer
from tests.core.fakes import Driver, alone, make_config, make_request
from tests.core.test_retention import POLICIES, SHAPES, Run, assert_same
from tests.core.test_retention import make_config as evicting_config
from tests.core.test_retention import make_request as evicting_request


def with_host(config, blocks, **scheduler):
    return msgspec.structs.replace(
        config,
        cache=msgspec.structs.replace(config.cache, num_cpu_blocks=blocks),
        scheduler=msgspec.structs.replace(config.scheduler, **scheduler),
    )


def crowd(count=4, length=9, max_tokens=14):
    return [make_request(f"r{i}", [i] * length, max_tokens=max_tokens) for i in range(count)]


def check(driver):
    for name, request in driver.requests.items():
        for index, expected in enumerate(alone(request, driver.scheduler.config)):
            end = driver.finished[name, index]
            assert (end.token_ids, end.finish_reason) == expected


# Swap


@pytest.mark.parametrize("caching", [False, True])
def test_a_swapped_sequence_comes_back_as_it_was_and_computes_nothing_again(caching):
    driver = Driver(with_host(make_config(4, 12, prefix_caching=caching), 40))
    driver.run(*crowd())
    stats = driver.scheduler.stats()
    assert stats.num_swapped_out == stats.num_swapped_in > 0
    assert stats.recomputed_tokens == 0
    assert len(driver.executor.computed) == len(set(driver.executor.computed))
    assert sum(end.num_swaps for end in driver.finished.values()) == stats.num_swapped_out
    assert stats.host_blocks_held == 0
    assert not driver.executor.host
    check(driver)


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_a_storm_with_a_host_tier_changes_no_answer(seed, granularity):
    """Forked, evicted, aborted, some swapped and some recomputed: each as if it were alone."""
    rng = random.Random(f"{seed} {granularity}")
    groups = SHAPES[granularity][0] * SHAPES[granularity][1]
    requests = [
        evicting_request(
            i,
            rng.randrange(18, 32),
            POLICIES[rng.choice(list(POLICIES))],
            shared=rng.choice([0, 8, 16]),
            n=rng.choice([1, 1, 2]),
            max_tokens=rng.randrange(16, 36),
        )
        for i in range(8)
    ]
    config = evicting_config(8 * groups, granularity, caching=True, max_num_batched_tokens=24)
    arrivals = {i: rng.randrange(12) for i in range(8)}
    run = Run(with_host(config, 14 * groups), requests, arrivals=arrivals, aborts={3: 20})
    stats = run.scheduler.stats()
    assert stats.num_swapped_out > 0
    assert stats.blocks_held == stats.host_blocks_held == 0
    for request in requests:
        if request.request_id not in run.refused:
            assert_same(run, request, granularity)


def test_a_sequence_is_swapped_whole_or_not_at_all():
    driver = Driver(with_host(make_config(4, 12, prefix_caching=False), 2))
    driver.run(*crowd())
    stats = driver.scheduler.stats()
    assert stats.num_swapped_out == 0 < stats.num_preemptions
    assert stats.recomputed_tokens > 0
    check(driver)


@pytest.mark.parametrize(("swap_cost", "swaps"), [(0.5, True), (1000.0, False)])
def test_the_rung_that_is_modelled_to_cost_less_is_taken(swap_cost, swaps):
    driver = Driver(with_host(make_config(4, 12, prefix_caching=False), 40, swap_cost=swap_cost))
    driver.run(*crowd())
    stats = driver.scheduler.stats()
    assert bool(stats.num_swapped_out) == swaps
    assert bool(stats.recomputed_tokens) != swaps
    check(driver)


def test_one_that_has_forgotten_is_swapped_whatever_it_costs():
    requests = [
        evicting_request(1, 8, "full", max_tokens=44),
        evicting_request(2, 8, "full", max_tokens=30),
        evicting_request(3, 34, POLICIES["h2o"], max_tokens=40),
    ]
    config = evicting_config(20, max_num_batched_tokens=17)
    run = Run(with_host(config, 20, swap_cost=1e6), requests)
    assert run.finished["3", 0].num_swaps == run.finished["3", 0].num_preemptions > 0
    assert run.finished["3", 0].num_evicted_tokens > 0
    for request in requests:
        assert_same(run, request)


def swapped_driver():
    driver = Driver(with_host(make_config(4, 12, prefix_caching=False), 40))
    for request in crowd():
        driver.add(request)
    while not driver.scheduler.stats().num_swapped_out:
        driver.step()
    return driver


def test_one_swapped_amid_its_prompt_waits_for_all_the_blocks_that_it_needs():
    config = make_config(4, 6, prefix_caching=False, max_num_batched_tokens=4)
    driver = Driver(with_host(config, 40))
    (seq_id,) = driver.add(make_request("r0", [0] * 20, max_tokens=2))
    driver.step()
    scheduler = driver.scheduler
    seq, hits = scheduler.sequence(seq_id), np.zeros((0, 1), np.int32)
    scheduler._roster.preempt(seq, swap=True)
    ids = scheduler.manager.allocate(2)  # leaves 4 blocks for the 5 of the prompt
    assert not scheduler.admission.can_admit(seq, hits)
    scheduler.manager.pool.release(ids, np.zeros(2, np.bool_))
    assert scheduler.admission.can_admit(seq, hits)
    driver.run()
    check(driver)


def test_an_abort_of_a_swapped_request_frees_its_host_blocks():
    driver = swapped_driver()
    held = driver.scheduler.stats().host_blocks_held
    assert held > 0
    driver.abort("r3")
    assert driver.scheduler.stats().host_blocks_held < held
    driver.executor.host.clear()
    requests = {name: driver.requests[name] for name in ("r0", "r1")}
    driver.run()
    for name, request in requests.items():
        assert driver.finished[name, 0].token_ids == alone(request, driver.scheduler.config)[0][0]


@pytest.mark.parametrize("direction", ["num_swapped_out", "num_swapped_in"])
def test_a_plan_with_swaps_can_be_discarded(direction):
    driver = Driver(with_host(make_config(4, 12, prefix_caching=False), 40))
    for request in crowd():
        driver.add(request)
    while True:
        plan = driver.scheduler.schedule()
        if getattr(driver.scheduler.stats(), direction):
            break
        output = driver.scheduler.commit(plan, driver.executor.execute(plan))
        for seq, token in zip(output.seq_ids.tolist(), output.token_ids.tolist(), strict=True):
            driver.executor.known[seq].append(token)
        driver._end(output.finished)
    driver.scheduler.discard(plan)
    driver.scheduler.audit()
    driver.run()
    check(driver)


def test_a_host_tier_notices_what_is_lost(auditor):
    tier = HostTier(4)
    tier.audit()
    tier._num_free -= 1
    with pytest.raises(AssertionError, match="neither held nor free"):
        tier.audit()
    auditor.excuse(tier)


# Shrink


ELASTIC = "sinks=4 + recent=4 + score=lift + adaptive=16..40 + chunk=8"


def elastic_requests(count=4, max_tokens=40):
    return [
        msgspec.structs.replace(
            make_request(f"r{i}", [i] * 9, max_tokens=max_tokens), eviction=policy(ELASTIC)
        )
        for i in range(count)
    ]


def test_elastic_sequences_shrink_before_anybody_is_preempted():
    service = Service(make_config(4, 21, prefix_caching=False)).add(*elastic_requests()).run()
    stats = service.stats
    assert stats.blocks_shrunk > 0
    assert stats.num_preemptions == stats.num_failed == 0
    assert sum(end.num_shrinks for end in service.finished.values()) > 0
    assert all(end.num_evicted_tokens for end in service.finished.values() if end.num_shrinks)


def test_blocks_with_the_least_mass_of_all_sequences_go_and_never_below_a_floor():
    service = Service(make_config(4, 200, prefix_caching=False)).add(*elastic_requests(3))
    for _ in range(24):
        service.step()
    scheduler, table = service.scheduler, service.scheduler.table
    rows = table.running
    before = {row: table.block_table[0, row, : table.num_blocks[0, row]].tolist() for row in rows}
    mass = {block: table.mass[0, row, i] for row in rows for i, block in enumerate(before[row])}
    free = [block for row in rows for block in before[row][1:-2]]
    assert shrink(scheduler.retention, 4, rows) == 4
    after = {
        block for row in rows for block in table.block_table[0, row, : table.num_blocks[0, row]]
    }
    gone = set(mass) - after
    assert gone <= set(free)
    assert gone == set(sorted(free, key=mass.__getitem__)[:4])
    shrink(scheduler.retention, 1000, rows)
    assert (table.num_resident[0, rows] >= 16).all()
    assert (table.num_resident[0, rows] < 20).all()
    assert shrink(scheduler.retention, 1000, rows) == 0
    service.run()


def test_what_a_shrunk_sequence_was_made_to_forget_it_forgets_again_in_a_replay():
    def serve(preempt):
        request = evicting_request(1, 20, policy(ELASTIC), max_tokens=40)
        run = Run.__new__(Run)
        seen = []

        class Watched(Run):
            def step(self):
                if len(self.plans) == 13:
                    rows = self.scheduler.table.running
                    assert shrink(self.scheduler.retention, 2, rows) == 2
                    seen.append(int(self.scheduler.table.num_computed[0]))
                if len(self.plans) == 17 and preempt:
                    self.scheduler._roster.preempt(self.scheduler.sequence(0))
                self.survivors.clear()
                super().step()

        run = Watched(evicting_config(64), [request])
        assert seen[0] % 4, "not at a round"
        return run.finished["1", 0]

    plain, replayed = serve(False), serve(True)
    assert replayed.num_preemptions == 1
    assert replayed.token_ids == plain.token_ids
    assert replayed.num_evicted_tokens == plain.num_evicted_tokens
    assert replayed.forfeited_mass == pytest.approx(plain.forfeited_mass)


# Victims


@pytest.mark.parametrize("name", VICTIMS)
def test_any_victim_function_serves_all(name):
    driver = Driver(make_config(4, 14, prefix_caching=False))
    driver.scheduler._pressure._victim = VICTIMS[name]
    driver.run(*(make_request(f"r{i}", [i] * (5 + 3 * i), max_tokens=16) for i in range(4)))
    assert driver.scheduler.stats().num_preemptions > 0
    check(driver)


def test_victims_are_those_their_names_say():
    service = Service(make_config(4, 60))
    lengths = {"a": 9, "b": 17, "c": 5, "d": 17, "e": 9}
    for i, (name, length) in enumerate(lengths.items()):
        request = make_request(name, [i] * length)
        service.add(msgspec.structs.replace(request, priority=(0, 2, 2, 1, 0)[i]))
    service.step()
    table, rows = service.scheduler.table, service.scheduler.table.running
    chosen = {name: "abcde"[victim(table, rows)] for name, victim in VICTIMS.items()}
    assert chosen == {
        "last_admitted": "e",
        "least_urgent": "c",
        "most_blocks": "d",
        "fewest_computed": "c",
    }
    service.run()


def test_a_victim_function_that_names_somebody_else_is_refused():
    service = Service(make_config(4, 12, prefix_caching=False), victim=lambda table, rows: 77)
    with pytest.raises(ConfigError, match="it chose row 77"):
        service.add(*crowd()).run()


# Nothing livelocks


def adversary(rng, i, policies):
    """Bursts, giants, forks, beams, streams, the urgent and the greedy, of several tenants."""
    length = int(rng.choice([1, 3, 9, 17, 40, 90], p=[0.2, 0.2, 0.25, 0.2, 0.1, 0.05]))
    shared = int(rng.integers(0, length + 1))
    ids = [*(j % 60 for j in range(shared)), *rng.integers(0, 60, length - shared).tolist()]
    return msgspec.structs.replace(
        make_request(
            f"r{i}",
            ids,
            seed=i,
            salt=str(rng.choice(["", "salt"])),
            max_tokens=int(rng.choice([1, 4, 16, 60])),
            **rng.choice([{}, {}, {"n": 2}, {"n": 4}, {"n": 1, "best_of": 3}, {"beam_width": 3}]),
        ),
        priority=int(rng.integers(-2, 3)),
        tenant=str(rng.choice(["a", "b", "c"])),
        eviction=str(rng.choice(policies)),
    )


def watchdog(policy_name, admission, steps, seed=0):
    """Drive a small pool for so many steps; every request must end within a bound of being sent."""
    rng = np.random.default_rng(seed)
    config = with_host(
        make_config(
            4,
            40,
            scheduling_policy=policy_name,
            admission=admission,
            max_skips=2,
            ageing_steps=16,
            tenants=("a=30", "b", "c"),
            max_num_batched_tokens=24,
            long_prefill_token_threshold=8,
        ),
        16,
    )
    policies = ["full", "sinks=4 + recent=8 + budget=12 + chunk=8", ELASTIC]
    service = Service(config)
    sent, i = {}, 0
    while service.stats.num_steps < steps:
        while service.stats.num_waiting < 12:
            request = adversary(rng, i, policies)
            i += 1
            service.add(request)
            if request.request_id not in service.refused:
                sent[request.request_id] = service.stats.num_steps
        if rng.random() < 0.02 and sent:
            name = str(rng.choice(list(sent)))
            service.scheduler.abort(name)
            del sent[name]
        plan = service.scheduler.schedule()
        if rng.random() < 0.01:
            service.scheduler.discard(plan)
            continue
        output = service.scheduler.commit(plan, answer(plan))
        if plan.step % 50 == 0:
            service.scheduler.audit()
        for end in output.finished:
            if end.request_id not in service.scheduler._roster.requests:
                sent.pop(end.request_id, None)
        assert plan.num_tokens or output.finished or not service.stats.num_running
        oldest = min(sent.values(), default=plan.step)
        assert plan.step - oldest < 4000, "a request is stuck"
    while service.scheduler.has_unfinished():
        service.step()
    return service.stats


@pytest.mark.slow
@pytest.mark.parametrize("policy_name", ["fcfs", "priority", "lpm", "fair"])
@pytest.mark.parametrize("admission", ["greedy", "optimistic", "guaranteed"])
def test_nothing_livelocks(policy_name, admission):
    """50,000 steps in all."""
    stats = watchdog(policy_name, admission, steps=4_200)
    assert stats.num_finished > 100
    if admission == "guaranteed":
        assert stats.num_rungs == 0
    if admission == "greedy":
        assert stats.num_swapped_in > 0
        assert stats.blocks_shrunk > 0


@pytest.mark.parametrize("host", [0, 64])
@pytest.mark.parametrize("eviction", [None, "sinks=4 + recent=4 + score=lift + ratio=0.6"])
def test_what_runs_alone_to_its_end_does_so_after_others_pushed_it_back(eviction, host):
    """It has known more tokens than the pool has room for, and holds far fewer."""
    model = {"num_layers": 2, "sliding_window": (8, 0)} if eviction is None else None
    pool = 48 if eviction is None else 32
    config = with_host(make_config(4, pool, model=model, prefix_caching=False), host)

    def serve(*requests):
        service = Service(config).add(*requests)
        service.run()
        return {name: end for (name, _), end in service.finished.items()}

    second = make_request("second", [2] * 60, max_tokens=70 if eviction is None else 90)
    second = msgspec.structs.replace(second, eviction=eviction)
    alone = serve(second)["second"]
    ends = serve(make_request("first", [1] * 4, max_tokens=110), second)
    assert ends["second"].num_preemptions > 0
    assert ends["second"].finish_reason == alone.finish_reason == "length"
    assert ends["second"].token_ids == alone.token_ids
