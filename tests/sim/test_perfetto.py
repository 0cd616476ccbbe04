"""Chrome's trace format: tracks on which nothing overlaps in part, and phases that are true."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest

import pagedkv
from pagedkv.sim import recorder
from pagedkv.sim.perfetto import write_perfetto
from tests.sim.workloads import config, listed, request


def crowded(**options):
    """More requests than the pool takes: they wait, are pushed back and come again."""
    asks = [request(0.01 * key, 40, 60, key) for key in range(24)]
    return pagedkv.simulate(config(60), listed(*asks), watch=True, **options)


def written(found, tmp_path):
    write_perfetto(found, tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text())


@pytest.mark.parametrize("leap", [True, False])
def test_a_request_does_one_thing_at_a_time(leap):
    found = crowded(leap=leap)
    assert found.summary["num_preemptions"] > 0
    lives = defaultdict(list)
    for phase in found.phases[0]:
        lives[phase.request].append((phase.begin, phase.end, phase.kind))
    assert len(lives) == 24
    for life in lives.values():
        life.sort()
        assert [kind for _, _, kind in life[:2]] == ["queued", "prefill"]
        for (_, end, _), (begin, _, _) in pairwise(life):
            assert end == begin, "no gap and no overlap from arrival to end"


def test_who_failed_has_computed_its_prompt():
    found = pagedkv.simulate(config(8), listed(request(0, 20, 400, 0)), watch=True)
    assert found.summary["failed"] == 1
    assert [phase.kind for phase in found.phases[0]] == ["queued", "prefill", "decode"]


def test_events_of_a_track_do_not_overlap(tmp_path):
    events = written(crowded(), tmp_path)["traceEvents"]
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            tracks[event["tid"]].append((begin, begin + round(event["dur"] * 1000)))
    for spans in tracks.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(spans)))
    named = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert named.keys() == tracks.keys()
    assert {name.split()[0] for name in named.values()} == {"row", "waiting"}


def test_what_was_left_out_is_said(tmp_path, monkeypatch):
    whole = len(crowded().phases[0])
    monkeypatch.setattr(recorder, "_WATCHED", 10)
    document = written(crowded(), tmp_path)
    assert document["otherData"]["phases_left_out"] == whole - 10
    (label,) = [
        e["args"]["labels"] for e in document["traceEvents"] if e["name"] == "process_labels"
    ]
    assert label == f"the first 10 of {whole} phases"
