"""What each mode of admission promises, whoever comes."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import NeverFits
from pagedkv.core.admission import reserved_ratio
from tests.core.answers import Service
from tests.core.fakes import grouped, make_config, make_request

BOUNDED = (
    "sinks=4 + recent=8 + budget=12 + chunk=8",
    "sinks=4 + recent=4 + score=lift + budget=16 + chunk=8",
)


def traffic(seed, policies, count=14):
    rng = random.Random(seed)
    return [
        msgspec.structs.replace(
            make_request(
                f"r{i}",
                [*range(rng.choice([0, 8, 16])), *rng.choices(range(60), k=rng.randrange(1, 9))],
                seed=i,
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.randrange(1, 40),
            ),
            eviction=rng.choice(policies),
        )
        for i in range(count)
    ]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(18, 70),
    groups=st.sampled_from([1, 2]),
    budget=st.sampled_from([5, 16, 64]),
    policies=st.sampled_from([BOUNDED, ("full",), ("full", *BOUNDED)]),
)
def test_guaranteed_never_preempts(seed, num_blocks, groups, budget, policies):
    config = make_config(
        4, num_blocks * groups, admission="guaranteed", max_num_batched_tokens=budget
    )
    service = Service(grouped(config, groups)).add(*traffic(seed, policies)).run()
    assert service.stats.num_rungs == service.stats.num_preemptions == 0
    assert {end.finish_reason for end in service.finished.values()} <= {"length"}
    assert len(service.refused) < 14


def test_guaranteed_by_footprint_admits_four_times_what_reserving_the_whole_length_does():
    config = make_config(
        4, 100, admission="guaranteed", max_num_seqs=64, max_num_batched_tokens=512
    )
    requests = [
        msgspec.structs.replace(make_request(f"r{i}", [i] * 8, max_tokens=200), eviction=BOUNDED[0])
        for i in range(40)
    ]
    whole = 100 // -(-(8 + 200) // 4)
    service = Service(config).add(*requests).run()
    assert service.stats.num_preemptions == 0
    assert service.peak >= 4 * whole > 0


def test_each_mode_takes_more_risk_than_the_one_before():
    peaks, preemptions = [], []
    for mode in ("guaranteed", "optimistic", "greedy"):
        config = make_config(
            4, 60, admission=mode, max_num_seqs=32, max_num_batched_tokens=256, prefix_caching=False
        )
        requests = [make_request(f"r{i}", [i] * 6, max_tokens=40) for i in range(30)]
        service = Service(config).add(*requests).run()
        peaks.append(service.peak)
        preemptions.append(service.stats.num_preemptions)
        assert len(service.finished) == 30
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[2]
    assert preemptions == sorted(preemptions)
    assert preemptions[0] == 0 < preemptions[2]


def test_the_reserved_ratio_falls_while_all_goes_well_and_is_estimated_after_a_preemption():
    config = make_config(4, 40, admission="optimistic", prefix_caching=False)
    service = Service(config).add(
        *(make_request(f"r{i}", [i] * 6, max_tokens=60) for i in range(8))
    )
    before = service.scheduler.admission.ratio
    service.step()
    assert service.scheduler.admission.ratio < before
    while not service.stats.num_preemptions:
        lowest = service.scheduler.admission.ratio
        service.step()
    assert service.scheduler.admission.ratio > lowest
    service.run()


@pytest.mark.parametrize(
    ("generated", "left", "ratio"),
    [([0], [200], 20 / 201), ([10, 10], [40, 40], 60 / 101), ([50], [1], 1.0), ([], [], 0.0)],
)
def test_the_estimate_is_the_share_of_all_tokens_that_are_done_if_all_went_on_a_little(
    generated, left, ratio
):
    assert reserved_ratio(np.array(generated), np.array(left)) == pytest.approx(ratio)


def test_guaranteed_refuses_what_could_outgrow_the_pool_and_greedy_takes_it():
    request = make_request("r", 8, max_tokens=40)
    with pytest.raises(NeverFits, match=r"needs 12 blocks of 4 tokens and the pool has 10"):
        Service(make_config(4, 10, admission="guaranteed")).scheduler.add(request)
    Service(make_config(4, 10)).scheduler.add(request)


def test_the_last_token_is_never_computed_and_needs_no_block():
    service = Service(make_config(4, 5, admission="guaranteed"))
    service.add(make_request("r", 8, max_tokens=13)).run()
    assert service.finished["r", 0].finish_reason == "length"
    assert service.stats.blocks_held == 0


def test_hits_on_blocks_in_use_cost_nothing():
    config = make_config(4, 12, admission="guaranteed", max_num_batched_tokens=128)
    service = Service(config).add(make_request("a", [*range(24), 50], max_tokens=4))
    service.step()
    service.add(make_request("b", [*range(24), 51], max_tokens=4))
    service.step()
    assert service.stats.num_running == 2, "7 blocks each, 6 of them the same"


def test_one_that_was_preempted_waits_until_the_others_can_grow():
    """Without it they would push each other out ten times, not seven."""
    config = make_config(4, 16, prefix_caching=False)
    service = Service(config).add(
        *(make_request(f"r{i}", [i] * 3, max_tokens=30) for i in range(8))
    )
    service.run()
    assert 0 < service.stats.num_preemptions <= 8
