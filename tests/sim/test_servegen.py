"""ServeGen's client models: who asks when, and damage that is named or counted."""

import json
import tarfile

import pytest

from pagedkv import ConfigError, TraceError
from pagedkv.sim.readers import read_trace

LAW = {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{5: 1.0}"}


def client(folder, number, rate, dataset=LAW, rows=None):
    rows = rows or [f"{600 * i},{rate},1.0,Gamma,1.0,{1 / rate}" for i in range(3)]
    (folder / f"chunk-{number}-trace.csv").write_text("\n".join(rows) + "\n")
    (folder / f"chunk-{number}-dataset.json").write_text(json.dumps({"0": dataset}))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "clients"
    place.mkdir()
    client(place, 0, 2.0)
    client(place, 1, 8.0)
    return place


def by_tenant(folder, **options):
    found = {}
    for each in read_trace(folder, "servegen", **({"duration": 300.0} | options)):
        found.setdefault(each.tenant, []).append(each)
    return found


def told(requests):
    return [(r.arrival, len(r.prompt), r.output_len, r.output_stream) for r in requests]


def test_clients_are_tenants_with_their_own_rates_and_lengths(folder):
    found = by_tenant(folder)
    assert {name: len(each) for name, each in found.items()} == {
        "client-0": pytest.approx(600, rel=0.15),
        "client-1": pytest.approx(2400, rel=0.1),
    }
    assert {len(r.prompt) for r in found["client-0"]} == {10, 20}


@pytest.mark.parametrize("gone", [0, 1])
def test_what_a_client_asks_does_not_depend_on_the_others(folder, gone):
    kept = f"client-{1 - gone}"
    before = told(by_tenant(folder)[kept])
    (folder / f"chunk-{gone}-trace.csv").unlink()
    assert told(by_tenant(folder)[kept]) == before


def test_an_answer_of_no_tokens_is_one_of_one(folder):
    client(folder, 0, 2.0, LAW | {"output_tokens": "{0: 1.0}"})
    assert {r.output_len for r in by_tenant(folder)["client-0"]} == {1}


def test_speed_leaves_lengths_alone(folder):
    slow, fast = (by_tenant(folder, speedup=speed)["client-0"] for speed in (1.0, 2.0))
    assert len(fast) > 1.5 * len(slow)
    assert [len(r.prompt) for r in fast[: len(slow)]] == [len(r.prompt) for r in slow]


def test_small_gaps_late_in_a_trace_go_on(folder):
    client(folder, 0, 1.0, rows=[f"{t},1,1,Gamma,1,0.0001" for t in (10**12, 10**12 + 1)])
    (folder / "chunk-1-trace.csv").unlink()
    found = read_trace(folder, "servegen", start=1e12, speedup=100.0).head(1000)
    assert len(list(found)) == 1000


def test_an_archive_reads_as_its_folder_and_damage_is_named_or_counted(folder, tmp_path):
    (folder / "chunk-7-trace.csv").write_text("0,1,1,Gamma,1,1\n")
    with (folder / "chunk-1-trace.csv").open("a") as out:
        out.write("1800,a,b\n")
    packed = tmp_path / "all.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, arcname="data")
    with pytest.raises(TraceError, match=r"chunk-1-trace.csv:4"):
        list(read_trace(packed, "servegen"))
    some = read_trace(packed, "servegen", duration=60.0, on_error="skip")
    assert {r.tenant for r in some} == {"client-0"}
    assert some.skipped.total() == 2


GOOD_ROW = "600,1,1,Gamma,1,1"
DAMAGE = {
    "scale of nothing": ("0,1,1,Gamma,1,0", LAW, "p1 or p2 is out of range"),
    "shape of nothing": ("0,1,1,Gamma,0,1", LAW, "p1 or p2 is out of range"),
    "negative shape": ("0,1,1,Gamma,-1,1", LAW, "p1 or p2 is out of range"),
    "negative scale": ("0,1,1,Weibull,1,-1", LAW, "p1 or p2 is out of range"),
    "nan scale": ("0,1,1,Weibull,1,nan", LAW, "p1 or p2 is out of range"),
    "no gaps": ("0,1,1,Gamma,0.01,0.0001", LAW, "apart on average"),
    "nan rate": ("0,nan,1,Gamma,1,1", LAW, "not a finite number of 0 up"),
    "negative rate": ("0,-1,1,Gamma,1,1", LAW, "not a finite number of 0 up"),
    "no law": ("0,1,1,,1,1", LAW, "a rate and no law"),
    "windows back": ("900,1,1,Gamma,1,1", LAW, "does not begin after"),
    "one window": (None, LAW, "fewer than two windows"),
    "no lengths": ("0,1,1,Gamma,1,1", LAW | {"input_tokens": "{}"}, "no lengths for the window"),
    "text": ("0,1,1,Gamma,1,1", LAW | {"input_tokens": "abc"}, "not ServeGen's length"),
    "half text": ("0,1,1,Gamma,1,1", LAW | {"input_tokens": "{5: 1.0, x: 2}"}, "not ServeGen's"),
    "huge length": ("0,1,1,Gamma,1,1", LAW | {"input_tokens": f"{{{9**99}: 1.0}}"}, "ServeGen's"),
    "negative length": ("0,1,1,Gamma,1,1", LAW | {"output_tokens": "{-3: 1.0}"}, "ServeGen's"),
    "no weight": ("0,1,1,Gamma,1,1", LAW | {"output_tokens": "{3: 0.0}"}, "not ServeGen's"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_client_is_named_or_counted(folder, name):
    first, lengths, match = DAMAGE[name]
    client(folder, 1, 1.0, lengths, [first, GOOD_ROW] if first else [GOOD_ROW])
    with pytest.raises(TraceError, match=match) as fault:
        next(iter(read_trace(folder, "servegen")))
    assert "chunk-1-" in fault.value.where
    some = read_trace(folder, "servegen", duration=60.0, on_error="skip")
    assert {r.tenant for r in some} == {"client-0"}
    ((reason, times),) = some.skipped.items()
    assert (match in reason, times) == (True, 1)


def test_a_folder_without_clients_and_a_start_past_the_end_are_refused(folder, tmp_path):
    with pytest.raises(TraceError, match="it ends at 1800 s"):
        list(read_trace(folder, "servegen", start=1e9))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match="no client"):
        list(read_trace(tmp_path / "empty", "servegen"))


@pytest.mark.parametrize(
    "options", [{"start": -1}, {"start": float("nan")}, {"duration": 0}, {"speedup": 1e300}]
)
def test_a_span_out_of_range_is_refused(folder, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        read_trace(folder, "servegen", **options)
