"""Who is next, who may pass whom, and that nobody waits for ever."""

from collections import Counter

import msgspec
import numpy as np
import pytest

from pagedkv import ConfigError, InvalidRequest, NeverFits
from pagedkv.core.tenants import NO_QUOTA, Tenants
from tests.core.answers import Service
from tests.core.fakes import Driver, make_config, make_request


def request(name, prompt=4, *, priority=0, tenant="", arrival=0.0, **sampling):
    made = make_request(name, prompt, **sampling)
    return msgspec.structs.replace(made, priority=priority, tenant=tenant, arrival=arrival)


def order_of_ends(service):
    return sorted(service.ended_at, key=service.ended_at.__getitem__)


def one_at_a_time(policy, **limits):
    return make_config(4, 64, scheduling_policy=policy, max_num_seqs=1, **limits)


# First come, first served


def test_equals_go_by_arrival_and_then_by_the_order_they_were_added():
    service = Service(one_at_a_time("fcfs"))
    service.add(request("second", arrival=1.0), request("third", arrival=1.0), request("first"))
    assert order_of_ends(service.run()) == ["first", "second", "third"]


def test_an_earlier_arrival_passes_those_of_its_own_step_alone():
    """So nobody waits for ever behind requests that give earlier times, or none."""
    service = Service(one_at_a_time("fcfs"))
    service.add(request("runs", max_tokens=4), request("late", arrival=10.0))
    service.step()
    service.add(request("later", arrival=2.0), request("first of those", arrival=1.0))
    assert order_of_ends(service.run()) == ["runs", "late", "first of those", "later"]


# Priority


def test_the_lowest_number_goes_first():
    service = Service(one_at_a_time("priority"))
    service.add(*(request(str(p), priority=p, max_tokens=2) for p in (3, -1, 0, 2)))
    assert order_of_ends(service.run()) == ["-1", "0", "2", "3"]


def test_waiting_is_worth_a_level_per_ageing_steps():
    service = Service(one_at_a_time("priority", ageing_steps=10))
    service.add(request("runs", priority=-9, max_tokens=12), request("old", priority=1))
    for _ in range(11):
        service.step()
    service.add(request("young", priority=0))
    assert order_of_ends(service.run()) == ["runs", "old", "young"]


def test_a_waiting_request_pushes_back_less_urgent_ones_and_no_more_of_them_than_it_must():
    config = make_config(4, 12, scheduling_policy="priority", prefix_caching=False)
    driver = Driver(config)
    for i in range(4):
        driver.add(request(f"r{i}", [i] * 8, priority=i, max_tokens=4))
    driver.step()
    driver.add(request("urgent", [9] * 12, priority=-1, max_tokens=2))
    driver.step()
    assert driver.plans[-1].seq_ids.tolist() == [0, 1, 2, 4]
    driver.run()
    preempted = {name: end.num_preemptions for (name, _), end in driver.finished.items()}
    assert (preempted["r0"], preempted["r1"], preempted["r3"], preempted["urgent"]) == (0, 0, 1, 0)


@pytest.mark.parametrize("admission", ["greedy", "optimistic", "guaranteed"])
def test_what_was_reserved_for_those_pushed_back_is_not_held_against_the_urgent_one(admission):
    config = make_config(4, 30, scheduling_policy="priority", admission=admission)
    service = Service(config)
    service.add(request("low", [1] * 20, priority=10, max_tokens=90))
    service.step()
    service.add(request("urgent", [2] * 40, priority=-10, max_tokens=20))
    plan = service.step()
    assert 1 in plan.seq_ids
    service.run()
    assert service.ended_at["urgent"] < service.ended_at["low"]


@pytest.mark.parametrize("priority", [0, 1])
def test_equals_and_the_less_urgent_push_nobody_back(priority):
    service = Service(make_config(4, 4, scheduling_policy="priority", prefix_caching=False))
    service.add(request("runs", [1] * 12, max_tokens=3))
    service.step()
    service.add(request("waits", [2] * 12, priority=priority, max_tokens=3))
    service.run()
    assert service.stats.num_preemptions == 0


def test_nobody_is_pushed_back_for_one_that_would_not_fit_even_then():
    service = Service(make_config(4, 8, scheduling_policy="priority", prefix_caching=False))
    service.add(request("equal", [1] * 16, priority=-1, max_tokens=3), request("less", [2] * 4))
    service.step()
    service.add(request("urgent", [3] * 24, priority=-1, max_tokens=1))
    service.step()
    assert service.stats.num_preemptions == 0
    service.run()


# Longest prefix match


def test_the_longest_cached_prefix_goes_first_and_age_weighs_a_block_per_ageing_steps():
    ends = {}
    for ageing in (1000, 1):
        service = Service(one_at_a_time("lpm", ageing_steps=ageing))
        service.add(request("warms", 17, max_tokens=1)).run()
        service.add(request("runs", [50] * 4, max_tokens=9))
        service.step()
        service.add(request("cold", [51] * 17, max_tokens=1))
        for _ in range(6):
            service.step()
        service.add(request("warm", 17, max_tokens=1))
        ends[ageing] = order_of_ends(service.run())[2:]
    assert ends == {1000: ["warm", "cold"], 1: ["cold", "warm"]}


def test_equal_prefixes_of_one_batch_are_computed_once():
    computed = {}
    for policy in ("fcfs", "lpm"):
        driver = Driver(make_config(4, 64, scheduling_policy=policy))
        driver.run(*(request(f"r{i}", [*range(16), 20 + i]) for i in range(4)))
        computed[policy] = sum(position < 16 for _, position in driver.executor.computed)
    assert computed == {"fcfs": 64, "lpm": 16}


# Fair share


def shares(weights_of_tenants, steps=200, **limits):
    """Tokens generated per tenant while every tenant has work waiting."""
    service = Service(
        make_config(4, 64, scheduling_policy="fair", max_num_seqs=2, prefix_caching=False, **limits)
    )
    got = Counter()
    sent = Counter()
    for _ in range(steps):
        for tenant, (length, output, count) in weights_of_tenants.items():
            while sent[tenant] < count:
                sent[tenant] += 1
                service.add(
                    request(f"{tenant}{sent[tenant]}", length, tenant=tenant, max_tokens=output)
                )
        service.step()
    names = {number: name for name, number in service.scheduler.tenants._ids.items()}
    for number, served in enumerate(service.scheduler.tenants.served.tolist()):
        got[names[number]] = served
    return got


def test_tenants_are_served_alike_however_many_requests_they_send():
    got = shares({"one": (4, 4, 60), "many": (4, 4, 600), "long": (12, 12, 60)})
    assert max(got.values()) - min(got.values()) <= 2 * (12 + 12)


def test_what_was_not_asked_for_while_idle_is_not_saved_up():
    service = Service(make_config(4, 64, scheduling_policy="fair", max_num_seqs=1))
    service.add(*(request(f"busy{i}", tenant="busy") for i in range(40)))
    for _ in range(80):
        service.step()
    served = service.scheduler.tenants.served.max()
    service.add(*(request(f"late{i}", tenant="late") for i in range(40)))
    for _ in range(80):
        service.step()
    busy, late = service.scheduler.tenants.served.tolist()
    assert abs((busy - served) - (late - served)) <= 2 * 12


def test_computing_again_after_a_preemption_is_not_charged():
    service = Service(make_config(4, 10, scheduling_policy="fair", prefix_caching=False))
    service.add(*(request(f"r{i}", [i] * 8, tenant="t", max_tokens=14) for i in range(3))).run()
    assert service.stats.recomputed_tokens > 0
    assert service.scheduler.tenants.served.tolist() == [3 * (8 + 13 + 14)]


# Quotas


def test_a_tenant_never_holds_more_than_its_quota_and_holds_up_nobody():
    config = make_config(
        4, 40, tenants=("small=6", "large"), prefix_caching=False, max_num_batched_tokens=128
    )
    service = Service(config)
    service.add(*(request(f"s{i}", [i] * 6, tenant="small", max_tokens=8) for i in range(8)))
    service.add(*(request(f"l{i}", [i] * 6, tenant="large", max_tokens=8) for i in range(4)))
    table, most = service.scheduler.table, 0
    while service.scheduler.has_unfinished():
        service.step()
        small = table.running[table.tenant[table.running] == 0]
        most = max(most, int(table.num_blocks[:, small].sum()))
        assert most <= 6
    assert most == 6
    assert max(service.ended_at[f"l{i}"] for i in range(4)) < service.ended_at["s7"]
    assert len(service.finished) == 12


def test_guaranteed_admission_keeps_to_quotas_without_preempting():
    config = make_config(4, 60, tenants=("small=12", "large"), admission="guaranteed")
    service = Service(config)
    for tenant in ("small", "large"):
        service.add(
            *(request(f"{tenant}{i}", [i] * 6, tenant=tenant, n=1 + i % 2) for i in range(6))
        )
    service.run()
    assert service.stats.num_rungs == 0
    assert len(service.finished) == 18


def test_a_lone_request_that_outgrows_its_quota_fails_and_the_others_go_on():
    service = Service(make_config(4, 40, tenants=("small=3", "large")))
    service.add(request("grows", 8, tenant="small", max_tokens=30))
    service.add(request("other", 8, tenant="large", max_tokens=30)).run()
    assert service.finished["grows", 0].finish_reason == "error"
    assert service.finished["other", 0].finish_reason == "length"
    assert service.stats.num_failed == 1


def test_a_request_that_its_quota_can_never_hold_is_refused():
    scheduler = Service(make_config(4, 40, tenants=("small=3",))).scheduler
    with pytest.raises(NeverFits, match="tenant 'small' may hold 3"):
        scheduler.add(request("large", 13, tenant="small"))


def test_an_unknown_tenant_is_refused():
    scheduler = Service(make_config(4, 40, tenants=("a", "b=5"))).scheduler
    with pytest.raises(InvalidRequest, match="tenant 'c' is not one") as caught:
        scheduler.add(request("r", tenant="c"))
    assert "'a', 'b'" in caught.value.remedy


@pytest.mark.parametrize("wrong", ["a=41", "a=0", "a=-1", "a=x", "a=", "a=1.5", "a=²"])
def test_a_quota_that_is_none_or_over_the_pool_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"scheduler.tenants"):
        Service(make_config(4, 40, tenants=(wrong,)))


def test_a_tenant_named_twice_is_refused():
    with pytest.raises(ConfigError, match="each tenant once"):
        Service(make_config(4, 40, tenants=("a", "a=3")))


# Passing


@pytest.mark.parametrize("skips", [0, 2])
def test_one_that_lacks_blocks_is_passed_by_no_more_than_max_skips(skips):
    service = Service(make_config(4, 12, max_skips=skips, prefix_caching=False))
    service.add(
        request("holder", [1] * 13, max_tokens=20), request("large", [2] * 40, max_tokens=1)
    )
    service.add(*(request(f"small{i}", [3 + i] * 2, max_tokens=2) for i in range(6)))
    order = order_of_ends(service.run())
    passed = [name for name in order[: order.index("large")] if name.startswith("small")]
    assert len(passed) == skips


# Nobody starves


@pytest.mark.parametrize("policy", ["fcfs", "priority", "lpm", "fair"])
@pytest.mark.parametrize("skips", [0, 3])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_others_send_a_request_is_served_within_a_bound(policy, skips, seed):
    """Every step brings one that the order prefers; the victim is cold, large, unimportant."""
    config = make_config(
        4, 24, scheduling_policy=policy, max_skips=skips, ageing_steps=8, max_num_seqs=4
    )
    service = Service(config)
    rng = np.random.default_rng(seed)
    service.add(request("warms", 9, tenant="other", max_tokens=1))
    for step in range(60):
        service.add(request(f"early{step}", 9, tenant="other", priority=-2, max_tokens=6))
    service.add(request("victim", [55] * 40, tenant="own", priority=2, max_tokens=5))
    added = service.scheduler.stats().num_steps
    for step in range(500):
        name = f"late{step}"
        service.add(
            request(name, 9, tenant="other", priority=-2, max_tokens=int(rng.integers(2, 8)))
        )
        service.step()
        if ("victim", 0) in service.finished:
            break
    assert service.finished["victim", 0].finish_reason == "length"
    # 61 before it at 2 a step, 4 levels of 8 steps each, and the ends of those that run.
    assert service.ended_at["victim"] - added < 300


def test_tenants_that_come_and_go_do_not_starve_one_that_stays():
    service = Service(make_config(4, 64, scheduling_policy="fair", max_num_seqs=2))
    service.add(*(request(f"heavy{i}", 8, tenant="heavy", max_tokens=8) for i in range(20)))
    passers = 0
    for _ in range(2500):
        while service.scheduler.stats().num_waiting < 6 + sum(
            f"heavy{i}" not in service.ended_at for i in range(20)
        ):
            service.add(request(f"p{passers}", 8, tenant=f"passer{passers}", max_tokens=4))
            passers += 1
        service.step()
        if "heavy19" in service.ended_at:
            break
    # Twenty requests of nine steps each, an eighth of two rows, and as long again to catch up.
    assert service.ended_at["heavy19"] < 2000


def test_tenants_that_were_not_named_come_in_one_by_one_without_quotas():
    tenants = Tenants((), 10)
    charged = Counter()
    for i in range(40):
        number = tenants.welcome(f"{i % 25}", [])
        assert number == i % 25
        tenants.charge(np.array([number, 0], np.int32), 2)
        tenants.charge(np.array([number], np.int32), np.array([i], np.int32))
        charged.update({number: 2 + i})
        charged.update({0: 2})
        assert tenants.served.tolist() == [charged[n] for n in range(min(25, i + 1))]
        assert tenants.quota_of(f"{number}") == NO_QUOTA
    assert not tenants.limited
