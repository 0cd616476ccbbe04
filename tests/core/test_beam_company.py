"""Beams beside all else that a scheduler does: orders, tenants, salts, host blocks, aborts."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.core.fakes import VOCAB, make_config, make_request
from tests.core.test_beams import BeamDriver, beams, check

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 16),  # tokens of the prompt
        st.sampled_from([None, 2, 3]),  # beams
        st.integers(1, 12),  # most tokens
        st.integers(-1, 1),  # priority
        st.sampled_from("ab"),  # tenant
        st.sampled_from(["", "salt"]),
        st.integers(0, 8),  # the step it comes at
        st.sampled_from([None, None, 1, 3, 6]),  # steps after which it is aborted
    ),
    min_size=2,
    max_size=6,
)


def made(index, length, width, most, priority, tenant, salt):
    prompt = [j % VOCAB for j in range(length)]  # all begin alike
    if width is None:
        request = make_request(f"r{index}", prompt, seed=index, max_tokens=most)
    else:
        request = beams(f"r{index}", prompt, width, max_tokens=most)
    return replace(request, priority=priority, tenant=tenant, cache_salt=salt)


@given(
    requests=REQUESTS,
    num_blocks=st.integers(24, 40),
    budget=st.sampled_from([2, 7, 64]),
    policy=st.sampled_from(["fcfs", "priority", "lpm", "fair"]),
    quota=st.sampled_from(["", "=24"]),
    host=st.sampled_from([0, 8]),
    num_groups=st.sampled_from([1, 2]),
    trouble=st.sampled_from([None, "discard", "reset"]),
)
def test_a_search_finds_the_same_in_any_company(
    requests, num_blocks, budget, policy, quota, host, num_groups, trouble
):
    config = make_config(
        4,
        num_blocks * num_groups,
        max_num_batched_tokens=budget,
        num_cpu_blocks=host,
        scheduling_policy=policy,
        ageing_steps=4,
        max_skips=2,
        tenants=(f"a{quota}", f"b{quota}") if num_groups == 1 else (),
    )
    driver = BeamDriver(config, num_groups=num_groups)
    for now in range(16):
        for i, (*facts, comes, stays) in enumerate(requests):
            name = f"r{i}"
            in_work = name in driver.requests and (name, 0) not in driver.finished
            if comes == now:
                driver.add(made(i, *facts))
            elif in_work and stays is not None and comes + stays == now:
                driver.abort(name)
                del driver.requests[name]
        if now == 6 and trouble == "discard":
            driver.scheduler.discard(driver.scheduler.schedule())
            driver.scheduler.audit()
        if now == 6 and trouble == "reset":
            driver.scheduler.reset_prefix_cache()
        driver.step()
    driver.run()
    check(driver)
