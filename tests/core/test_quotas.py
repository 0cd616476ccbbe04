"""What one tenant's quota means for its own requests, and that others never pay for it."""

import msgspec
import numpy as np
import pytest

from pagedkv import NeverFits
from tests.core.answers import Service
from tests.core.fakes import Driver, make_config, make_request

ELASTIC = "sinks=4 + recent=4 + score=lift + adaptive=16..40 + chunk=8"


def request(name, prompt=4, *, tenant="a", priority=0, eviction=None, **sampling):
    made = make_request(name, prompt, **sampling)
    return msgspec.structs.replace(made, tenant=tenant, priority=priority, eviction=eviction)


def config(num_blocks=64, *, tenants=("a=20", "b"), **limits):
    return make_config(4, num_blocks, tenants=tenants, **limits)


@pytest.mark.parametrize("admission", ["greedy", "optimistic"])
def test_the_first_of_a_tenant_enters_though_all_it_may_come_to_need_exceeds_the_quota(admission):
    driver = Driver(config(admission=admission))
    driver.run(
        request("long", 8, max_tokens=2000), request("short", 8, max_tokens=4), max_steps=400
    )
    assert driver.finished["long", 0].finish_reason == "error", "80 tokens fit"
    assert driver.finished["short", 0].finish_reason == "length"


def test_the_error_names_the_quota_that_was_outgrown():
    driver = Driver(config(tenants=("a=4",)))
    driver.run(request("x", 8, max_tokens=30))
    assert "tenant 'a' may hold 4 blocks" in driver.finished["x", 0].error
    assert "raise its quota" in driver.finished["x", 0].error
    with pytest.raises(NeverFits, match="tenant 'a' may hold 4"):
        driver.add(request("y", 40))


@pytest.mark.parametrize("quota", ["a", "a=24"])
def test_a_tenant_over_its_quota_makes_no_other_tenant_forget(quota):
    service = Service(config(200, tenants=(quota, "b")))
    service.add(
        request("elastic", 60, tenant="b", eviction=ELASTIC, max_tokens=60),
        request("one", 20, max_tokens=60),
        request("two", [9] * 20, max_tokens=60),
    )
    service.run()
    ends = {name: end for (name, _), end in service.finished.items()}
    assert ends["elastic"].num_shrinks == 0
    assert (ends["two"].num_preemptions > 0) == (quota != "a")


def test_blocks_that_several_sequences_share_count_once():
    service = Service(config(tenants=("a=16",)))
    service.add(request("x", 24, max_tokens=4, ignore_eos=True, n=4))
    most = 0
    while service.scheduler.has_unfinished():
        service.step()
        most = max(most, service.scheduler.stats().blocks_held)
    assert most <= 16
    assert {end.finish_reason for end in service.finished.values()} == {"length"}
    assert service.scheduler.stats().num_preemptions == 0


def test_nobody_is_pushed_back_for_an_urgent_one_that_its_own_tenant_s_quota_holds_up():
    service = Service(
        config(
            30,
            tenants=("a=12", "b"),
            scheduling_policy="priority",
            ageing_steps=10_000,
            prefix_caching=False,
        )
    )
    service.add(request("a0", 20, max_tokens=26))
    service.add(*(request(f"b{i}", [i] * 30, tenant="b", priority=5) for i in range(2)))
    for _ in range(4):
        service.step()
    service.add(request("a1", [7] * 40, max_tokens=8))
    service.run()
    pushed = {name: end.num_preemptions for (name, _), end in service.finished.items()}
    assert pushed["b0"] <= 1
    assert service.scheduler.stats().num_preemptions <= 2
    assert np.all([end.finish_reason == "length" for end in service.finished.values()])
