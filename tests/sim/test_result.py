"""What a result counts, and from when on."""

import msgspec
import numpy as np
import pytest

import pagedkv
from pagedkv.sim.report import frontier
from pagedkv.sim.slo import objective
from tests.sim.workloads import config, listed, request


@pytest.mark.parametrize("start", [0.0, 1000.0, 1.7e9])
def test_rates_count_from_the_first_arrival(start):
    def found(origin):
        asks = [request(origin + 0.25 * key, 10, 4, key, tenant="ab"[key % 2]) for key in range(8)]
        return pagedkv.simulate(config(), listed(*asks))

    here, there = found(0.0), found(start)
    for name in ("duration", "request_throughput", "output_throughput"):
        assert there.summary[name] == pytest.approx(here.summary[name], rel=1e-5)
    for name in "ab":
        held = there.tenants[name]["mean_blocks_held"]
        assert held == pytest.approx(here.tenants[name]["mean_blocks_held"], rel=1e-5)
    moved = [time - start for time in there.occupancy.table()["time"]]
    assert moved == pytest.approx(here.occupancy.table()["time"])


def test_failures_are_no_good_requests():
    asks = listed(
        request(0, 10, 5, 0),
        request(0, 5000, 4, 1),
        request(1, 5000, 4, 2, then=request(0, 10, 5, 3)),
        closed_loop=True,
    )
    found = pagedkv.simulate(config(), asks, slo=objective(["ttft:10000"]))
    assert (found.summary["completed"], found.summary["failed"]) == (1, 3)
    assert found.summary["good_fraction"] == 0.25


def roomy(setup, num_cpu_blocks):
    cache = msgspec.structs.replace(setup.cache, num_cpu_blocks=num_cpu_blocks)
    return msgspec.structs.replace(setup, cache=cache)


def test_every_rung_of_the_ladder_has_its_number():
    asks = [request(0.0, 40, 60, key) for key in range(6)]
    dropped = pagedkv.simulate(config(60), listed(*asks)).summary
    moved = pagedkv.simulate(roomy(config(60, swap_cost=0.0), 200), listed(*asks)).summary
    alone = pagedkv.simulate(config(20), listed(request(0, 10, 4000, 0))).summary
    elastic = config(45, eviction="sinks=4 + recent=4 + score=lift + adaptive=16..80")
    shrunk = pagedkv.simulate(elastic, listed(*asks)).summary
    late = [request(20.0 * key, 160, 4, key) for key in range(3)]
    reclaimed = pagedkv.simulate(config(60), listed(*late)).summary
    nothing = dict.fromkeys(("reclaimed", "shrunk", "swapped", "recomputed", "failed"), 0)
    assert dropped["rungs"]["recomputed"] == dropped["num_preemptions"] > 0
    assert dropped["rungs"]["swapped"] == 0
    assert moved["rungs"]["swapped"] == moved["num_swapped_out"] > 0
    assert moved["rungs"]["recomputed"] == moved["num_preemptions"] - moved["num_swapped_out"]
    assert alone["rungs"] == nothing | {"failed": 1}
    assert shrunk["rungs"]["shrunk"] > 0
    assert reclaimed["rungs"] == nothing | {"reclaimed": reclaimed["blocks_reclaimed"]}
    assert reclaimed["rungs"]["reclaimed"] > 0


@pytest.mark.parametrize("leap", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_detailed_times_are_those_that_the_distributions_are_of(leap, replicas):
    asks = [request(0.02 * key, 40, 10 + key, key) for key in range(12)]
    asks.insert(3, request(0.05, 5000, 4, 99))
    found = pagedkv.simulate(config(60), listed(*asks), leap=leap, replicas=replicas, detail=True)
    assert replicas == 2 or found.summary["num_preemptions"] > 0
    table = found.summary
    assert table["output_lens"] == [10 + key for key in range(12)]
    assert table["input_lens"] == [40] * 12
    assert table["start_times"] == pytest.approx([0.02 * key for key in range(12)])
    assert [len(itls) for itls in table["itls"]] == [9 + key for key in range(12)]
    gaps = np.concatenate(table["itls"])
    for name, values in (("ttft", table["ttfts"]), ("itl", gaps), ("e2el", table["e2els"])):
        assert np.mean(values) == pytest.approx(found.latency[name].mean)
        assert np.max(values) == pytest.approx(found.latency[name].greatest)
    whole = [t + sum(itls) for t, itls in zip(table["ttfts"], table["itls"], strict=True)]
    assert whole == pytest.approx(table["e2els"])
    assert "itls" not in pagedkv.simulate(config(60), listed(*asks)).summary


def test_the_front_is_what_no_other_point_beats():
    """More is better, then less is better; of equal points the first stands for all."""
    points = [(5, 9), (7, 9), (7, 8), (3, 1), (6, 4), (2, 1), (3, 1), (8, 20)]
    assert frontier(points) == [7, 2, 4, 3]
    for i, (gain, price) in enumerate(points):
        beaten = any(g >= gain and p <= price and (g, p) != (gain, price) for g, p in points)
        assert beaten == (i not in (7, 2, 4, 3, 6))
    assert frontier([(1.0, 1.0)]) == [0]
