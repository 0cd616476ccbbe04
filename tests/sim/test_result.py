"""What a result counts, and from when on."""

import pytest

import pagedkv
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
