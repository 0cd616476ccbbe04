"""Accounts of tenants: what each held, by hand; Jain's index, with those who got nothing."""

import numpy as np
import pytest

import pagedkv
from pagedkv.sim.accounts import jain_index
from pagedkv.sim.cost import Accelerator, CostModel, ModelShape
from tests.sim.workloads import config, listed, request

STEP = 0.5
BEAT = CostModel(  # every step takes as long, whatever it does
    accelerator=Accelerator(flops=1e30, bandwidth=1e30, memory=1e12, host_bandwidth=1e30),
    shape=ModelShape(
        parameters=1, matmul_parameters=1, num_layers=1, hidden_size=1, num_heads=1,
        num_kv_heads=1, head_dim=1,
    ),
    overhead=STEP,
)  # fmt: skip


def simulated(*asks, **options):
    return pagedkv.simulate(config(), listed(*asks), cost=BEAT, **options)


def held(found, tenant):
    row = found.tenants[tenant]
    return row["mean_blocks_held"] * found.summary["duration"], row["most_blocks_held"]


# Blocks of 4 tokens. A prompt of 10 holds 3; its steps compute up to token 10, 11, 12, 13: the
# last needs a fourth block. A prompt of 4 and its answer of 6: 4, then 5 to 8, then 9 tokens.
TEN = (10, 4), STEP * (3 + 3 + 3 + 4), 4
FOUR = (4, 6), STEP * (1 + 2 + 2 + 2 + 2 + 3), 3


@pytest.mark.parametrize("leap", [True, False])
@pytest.mark.parametrize("name", ["", "lonely"])
def test_a_tenant_alone_holds_what_is_held(leap, name):
    (lengths, area, most) = TEN
    found = simulated(request(3.0, *lengths, 0, tenant=name), leap=leap)
    assert held(found, name) == (pytest.approx(area), most)


@pytest.mark.parametrize("leap", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_each_tenant_is_charged_for_its_own_blocks(leap, replicas):
    asks = request(0, *TEN[0], 0, tenant="a"), request(0, *FOUR[0], 1, tenant="b")
    found = simulated(*asks, leap=leap, replicas=replicas)
    assert held(found, "a") == (pytest.approx(TEN[1]), TEN[2])
    assert held(found, "b") == (pytest.approx(FOUR[1]), FOUR[2])


@pytest.mark.parametrize("leap", [True, False])
def test_what_was_held_before_anybody_else_came_counts(leap):
    early, late = request(0, *FOUR[0], 0, tenant="a"), request(1.6, *TEN[0], 1, tenant="b")
    found = simulated(early, late, leap=leap)
    assert held(found, "a") == (pytest.approx(FOUR[1]), FOUR[2])
    assert held(found, "b") == (pytest.approx(TEN[1]), TEN[2])


def test_who_runs_and_does_not_compute_holds_blocks():
    """A budget of one token: two sequences that decode take turns, and both hold on."""
    asks = request(0, 4, 4, 0, tenant="a"), request(0, 4, 4, 1, tenant="b")
    both = pagedkv.simulate(
        config(max_num_batched_tokens=1, max_num_seqs=2), listed(*asks), cost=BEAT
    )
    summary = both.summary
    total = sum(held(both, name)[0] for name in "ab")
    everything = summary["mean_kv_cache_usage"] * summary["num_blocks"] * summary["duration"]
    assert total == pytest.approx(everything)


def test_shares_are_as_equal_as_jain_says():
    assert jain_index(np.array([3.0, 3.0, 3.0])) == 1
    assert jain_index(np.array([5.0, 0.0, 0.0, 0.0])) == 0.25
    assert jain_index(np.array([1.0, 2.0, 3.0])) == pytest.approx(36 / (3 * 14))
    assert jain_index(np.zeros(2)) == 1


def test_the_index_over_tenants_by_hand():
    """14 tokens in 2 s against 10 in 3 s: 4 and 6 of them generated."""
    asks = request(0, *TEN[0], 0, tenant="a"), request(9, *FOUR[0], 1, tenant="b")
    found = simulated(*asks).summary
    assert found["jain_index_tokens"] == pytest.approx(24**2 / (2 * (14**2 + 10**2)))
    assert found["jain_index_speed"] == pytest.approx((2 + 2) ** 2 / (2 * (2**2 + 2**2)))


def test_who_got_nothing_counts_as_unfair():
    asks = request(0, *TEN[0], 0, tenant="fed"), request(0, 5000, 4, 1, tenant="starved")
    found = simulated(*asks)
    starved = found.tenants["starved"]
    assert (starved["requests"], starved["failed_requests"]) == (0, 1)
    assert found.summary["jain_index_tokens"] == found.summary["jain_index_speed"] == 0.5


def test_evictions_are_charged_to_who_ran_before_and_not_to_who_was_refused():
    """The first account is of a tenant that never ran: the blocks were the second's."""
    asks = [
        request(0.0, 5000, 2, 0, tenant="refused"),
        request(1.0, 40, 2, 1, tenant="quiet"),
        *(request(50.0 + i, 160, 2, 10 + i, tenant="loud") for i in range(4)),
    ]
    found = pagedkv.simulate(config(60), listed(*asks), cost=BEAT)
    assert found.tenants["loud"]["evictions_caused_to_others"] == 10
    assert found.tenants["quiet"]["evictions_suffered_from_others"] == 10
    assert found.tenants["refused"]["evictions_suffered_from_others"] == 0
