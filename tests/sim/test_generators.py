"""Workloads made up to order: ranges, and what draws from which stream."""

import math

import pytest

from pagedkv import ConfigError
from pagedkv.sim.generators import Lengths, random_requests, sessions, tenants, tool_agent
from pagedkv.sim.workload import Workload
from tests.sim.workloads import request

LENGTHS = {"input_len": Lengths(50), "output_len": Lengths(9)}
NAN, INF = math.nan, math.inf

OUT_OF_RANGE = [
    (random_requests, "num_prompts", 0),
    (random_requests, "num_prompts", -1),
    (random_requests, "num_prompts", 2.5),
    (random_requests, "rate", 0),
    (random_requests, "rate", NAN),
    (random_requests, "burstiness", -1.0),
    (random_requests, "prefix_len", -5),
    (random_requests, "num_prefixes", 0),
    (random_requests, "seed", -1),
    (tenants, "num_tenants", 0),
    (tenants, "skew", NAN),
    (tenants, "skew", -1),
    (tenants, "rate", NAN),
    (tenants, "prefix_len", -5),
    (sessions, "turns", INF),
    (sessions, "turns", 0.5),
    (sessions, "think", NAN),
    (sessions, "think", INF),
    (sessions, "rate", 0),
    (tool_agent, "rate", -1),
    (tool_agent, "num_prompts", 0),
]


@pytest.mark.parametrize(("make", "name", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_by_name(make, name, value):
    options = {} if make is tool_agent else LENGTHS
    with pytest.raises(ConfigError, match=rf"^workload\.{name}: {name} is {value}; give a"):
        make(**({"num_prompts": 3} | options | {name: value}))


@pytest.mark.parametrize(
    "values", [{"mean": NAN}, {"mean": 0}, {"spread": NAN}, {"spread": INF}, {"mean": 9, "most": 8}]
)
def test_lengths_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=r"^lengths\."):
        Lengths(**({"mean": 5, "law": "lognormal"} | values))


@pytest.mark.parametrize("speedup", [0, -1, NAN, INF])
def test_a_speed_that_is_none_is_refused(speedup):
    with pytest.raises(ConfigError, match="speedup"):
        random_requests(num_prompts=3, **LENGTHS).faster(speedup)


def conversation(turns, key):
    first = last = request(float(key), 5, 2, 10 * key)
    for turn in range(1, turns):
        last.then = request(0.0, 5, 2, 10 * key + turn)
        last = last.then
    return first


def test_a_head_counts_follow_ups_and_leaves_its_source_alone():
    talks = [conversation(4, 0), conversation(3, 1), conversation(5, 2)]
    source = Workload("talks", lambda: talks, closed_loop=True)
    for count, lengths in ((12, [4, 3, 5]), (99, [4, 3, 5]), (7, [4, 3]), (5, [4, 1]), (2, [2])):
        assert [len(list(first.turns())) for first in source.head(count)] == lengths
    assert [len(list(first.turns())) for first in source] == [4, 3, 5]
    for count in (0, -1):
        with pytest.raises(ConfigError, match="num_prompts"):
            source.head(count)
