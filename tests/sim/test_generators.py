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


# What is drawn from which stream

FIELDS = {
    "arrival": lambda r: r.arrival,
    "input": lambda r: len(r.prompt),
    "output": lambda r: r.output_len,
    "prompt": lambda r: r.prompt.token_ids()[:8].tolist(),
    "think": lambda r: r.think,
}


def told(workload, *fields):
    return [
        tuple(FIELDS[field](turn) for field in fields)
        for first in workload
        for turn in first.turns()
    ]


def spread(mean, law="lognormal", width=0.5):
    return Lengths(mean, law, width)


def one(**changes):
    options = {"num_prompts": 50, "rate": 4.0, "prefix_len": 8, "num_prefixes": 3}
    return random_requests(
        **(options | {"input_len": spread(512), "output_len": spread(128)} | changes)
    )


def talks(**changes):
    options = {"num_prompts": 60, "rate": 1.0, "prefix_len": 8}
    return sessions(**(options | {"input_len": spread(50), "output_len": spread(20)} | changes))


@pytest.mark.parametrize(
    ("make", "changes", "kept"),
    [
        (one, {"rate": 9.0}, ("input", "output", "prompt")),
        (one, {"burstiness": 0.25}, ("input", "output", "prompt")),
        (one, {"burstiness": INF}, ("input", "output", "prompt")),
        (one, {"input_len": Lengths(512)}, ("arrival", "output", "prompt")),
        (one, {"output_len": spread(64, "uniform")}, ("arrival", "input", "prompt")),
        (one, {"num_prefixes": 2}, ("arrival", "input", "output")),
        (talks, {"rate": 9.0}, ("input", "output", "think")),
        (talks, {"burstiness": 0.25}, ("input", "output", "think")),
        (talks, {"think": 0.0}, ("arrival", "input", "output")),
        (talks, {"output_len": Lengths(20)}, ("arrival", "think")),
        (tool_agent, {"burstiness": 0.25}, ("input", "output", "prompt")),
    ],
)
def test_a_change_of_one_thing_leaves_the_others(make, changes, kept):
    options = {"num_prompts": 50} if make is tool_agent else {}
    before, after = make(**options), make(**options, **changes)
    assert told(before, *kept) == told(after, *kept)
    assert told(before, *FIELDS) != told(after, *FIELDS)


@pytest.mark.parametrize("make", [one, talks, tool_agent])
def test_more_requests_begin_with_the_fewer(make):
    few, many = (told(make(num_prompts=count), *FIELDS) for count in (1100, 1200))
    assert (len(few), len(many)) == (1100, 1200)
    assert many[:1100] == few


def crowd(num_tenants, **changes):
    options = {"num_prompts": 400, "rate": 8.0, "skew": 1.0}
    lengths = {"input_len": spread(50), "output_len": spread(20)}
    found = {}
    for each in tenants(num_tenants=num_tenants, **(options | lengths | changes)):
        found.setdefault(each.tenant, []).append(each)
    return found


def test_more_tenants_slow_the_others_down_and_change_nothing_else():
    few, many = crowd(3), crowd(6)
    slower = sum(1 / k for k in range(1, 7)) / sum(1 / k for k in range(1, 4))
    for name, asked in few.items():
        shared = range(min(len(asked), len(many[name])))
        for field in ("input", "output", "prompt"):
            pairs = [(FIELDS[field](asked[i]), FIELDS[field](many[name][i])) for i in shared]
            assert all(a == b for a, b in pairs)
        times = [(slower * asked[i].arrival, many[name][i].arrival) for i in shared]
        assert all(b == pytest.approx(a) for a, b in times)


def test_all_at_once_is_of_all_tenants():
    found = crowd(3, rate=INF)
    assert {each.arrival for asked in found.values() for each in asked} == {0.0}
    assert {name: len(asked) for name, asked in crowd(3).items()} == {
        name: len(asked) for name, asked in found.items()
    }
