"""What commands write: whole files or none, and one line of why where nothing can be written."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from pagedkv import ConfigError
from pagedkv.files import check_writable, replacing

SMALL = ("simulate", "--num-prompts", "5", "--input-len", "60", "--output-len", "12")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def test_a_file_is_replaced_once_all_is_written(tmp_path):
    path = tmp_path / "kept"
    path.write_text("before")
    path.chmod(0o640)
    with replacing(path) as out:
        out.write("after")
        out.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_fault_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "kept"
    path.write_text("before")

    def broken_off(fault):
        with replacing(path) as out:
            out.write("half")
            raise fault

    with pytest.raises(ConfigError, match="kept: cannot be written: No space left"):
        broken_off(OSError(28, "No space left on device"))
    with pytest.raises(KeyError):
        broken_off(KeyError())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    with replacing(link, binary=True) as out:
        out.write(b"\x00")
    assert link.is_symlink()
    assert path.read_bytes() == b"\x00"


def test_looking_whether_a_file_can_be_written_leaves_all_as_it_is(tmp_path):
    check_writable(None)
    check_writable("-")
    check_writable(os.devnull)
    check_writable(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="it is a directory"):
        check_writable(tmp_path)
    with pytest.raises(ConfigError, match="No such file or directory"):
        check_writable(tmp_path / "nowhere" / "file")


def test_a_result_takes_the_place_of_nothing_that_is_read_or_written(refused, tmp_path):
    trace, both = tmp_path / "trace.jsonl", tmp_path / "both"
    row = {"timestamp": 0, "input_length": 30, "output_length": 4, "hash_ids": [0]}
    trace.write_text(json.dumps(row) + "\n")
    read = refused("simulate", "--trace", trace, "--output-json", tmp_path / "." / "trace.jsonl")
    assert read.startswith("pagedkv: error: --output-json: ")
    assert "trace.jsonl is read as well; give each a file of its own" in read
    assert json.loads(trace.read_text()) == row
    twice = refused(*SMALL, "--html", both, "--perfetto", both)
    assert f"--perfetto: {both} is what --html writes as well" in twice
    asked = refused("bench", "throughput", "--dataset-path", trace, "--output-json", trace)
    assert "is read as well" in asked
    assert sorted(tmp_path.iterdir()) == [trace]


def test_many_results_may_go_nowhere(cli):
    assert cli(*SMALL, "--html", os.devnull, "--output-json", os.devnull).code == 0


def said(outcome):
    """What a command that failed for want of room says, in one line."""
    code, _, err = outcome
    assert code == 2
    assert err.startswith("pagedkv: error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("flag", ["--html", "--output-json", "--perfetto"])
def test_what_can_never_be_written_is_refused_before_anything_runs(refused, flag):
    assert "/proc/x: cannot be written" in refused(*SMALL, flag, "/proc/x")


@needs_full
@pytest.mark.parametrize("flag", ["--html", "--output-json", "--perfetto"])
def test_a_full_disk_is_told_in_a_line(cli, flag):
    assert "/dev/full: cannot be written: No space left" in said(cli(*SMALL, flag, FULL))


@needs_full
def test_a_trace_for_a_full_disk_is_told_in_a_line(cli):
    found = cli("trace", "generate", "random", "--num-prompts", 3, "--output", FULL)
    assert "/dev/full: cannot be written: No space left" in said(found)


@needs_full
@pytest.mark.parametrize("flags", [("--output-json", "-"), ()])
@pytest.mark.parametrize("buffered", [True, False])
def test_standard_output_that_is_full_is_told_in_a_line(cli, monkeypatch, capsys, flags, buffered):
    raw = FULL.open("wb", buffering=-1 if buffered else 0)
    with io.TextIOWrapper(raw, write_through=not buffered) as full:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            found = cli(*SMALL, *flags)
        err = [line for line in found.err.splitlines() if "error" in line]
        assert found.code == 2
        assert len(err) == 1
        assert "standard output: cannot be written: No space left" in err[0]
        assert "Traceback" not in found.err


def test_standard_output_that_is_closed_is_told_before_anything_runs(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        json_there = cli(*SMALL, "--output-json", "-")
        nothing_there = cli(*SMALL)
    assert "standard output: it is closed" in said(json_there)
    assert nothing_there.code == 0


def test_a_trace_goes_to_standard_output(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("trace", "generate", "random", "--num-prompts", 3, "--output", "-")
    assert code == 0
    assert [json.loads(line)["output_length"] > 0 for line in out.splitlines()] == [True] * 3
    assert err == "3 requests written to -\n"
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_says_what_is_lost(cli, tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [
        {"timestamp": 5000 + i, "input_length": 30, "output_length": 4, "hash_ids": [i // 2]}
        for i in range(4)
    ]
    rows[0]["tenant"] = rows[2]["tenant"] = "a"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lost(format, *flags, file=path):
        found = cli("trace", "convert", file, "--to", format, "--output", tmp_path / "out", *flags)
        assert found.code == 0
        return found.err.splitlines()

    assert lost("mooncake") == []
    assert lost("llmservingsim") == ["llmservingsim cannot hold tenants: lost of 2 requests"]
    assert sorted(lost("azure")) == [
        "azure cannot hold prefixes that prompts share: lost of 2 requests",
        "azure cannot hold tenants: lost of 2 requests",
        "azure cannot hold that the first request comes after time 0: lost of 1 request",
    ]
    chats = tmp_path / "chats.jsonl"
    turns = [
        {"chat_id": i, "parent_chat_id": i - 1, "timestamp": i, "input_length": 16}
        | {"output_length": 4, "type": "text", "turn": i + 1, "hash_ids": [i]}
        for i in range(3)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in turns))
    flags = ("--format", "bailian")
    assert "timed_trace cannot hold sessions: lost of 3 requests" in lost(
        "timed_trace", *flags, file=chats
    )


def test_nothing_served_is_no_latency_of_zero(cli, tmp_path):
    page = tmp_path / "report.html"
    flags = ("--max-model-len", "10", "--jobs", "1")
    code, out, _ = cli(*SMALL, *flags, "--seed", "0,1", "--html", page)
    assert code == 1
    assert "TTFT p50 - p99 - ms  TPOT p50 - ms" in out
    assert "median_ttft_ms -  p99_ttft_ms -  mean_tpot_ms -" in out
    assert "<td>TTFT median, ms</td><td>-</td><td>-</td>" in page.read_text()
    code, out, _ = cli(*SMALL, *flags, "--output-json", "-")
    (run,) = json.loads(out)["runs"]
    for name in ("ttft", "tpot", "itl", "e2el", "queue"):
        for kind in ("mean", "median", "std", "p99"):
            assert run["summary"][f"{kind}_{name}_ms"] is None
    assert run["tenants"][""]["mean_ttft_ms"] is None


def test_a_seed_with_which_nothing_was_served_is_left_out_of_the_mean(cli):
    flags = ("--input-len", "30", "--input-spread", "0.8", "--num-prompts", "2", "--seed")
    seeds = "0,1,2,3,4,5,6,7"
    code, out, _ = cli(
        "simulate", *flags, seeds, "--max-model-len", "32", "--output-len", "2",
        "--jobs", "1", "--output-json", "-",
    )  # fmt: skip
    assert code == 1
    found = json.loads(out)
    means = [run["summary"]["mean_ttft_ms"] for run in found["runs"]]
    known = [mean for mean in means if mean is not None]
    assert 0 < len(known) < len(means)
    (group,) = found["over_seeds"]
    assert group["summary"]["mean_ttft_ms"]["mean"] == pytest.approx(sum(known) / len(known))


def test_a_tenant_who_is_not_listed_is_named(cli):
    flags = ("--workload", "tenants", "--num-tenants", "1", "--tenants", "a", "--tenants", "b")
    code, out, _ = cli(*SMALL, *flags, "--num-blocks", "500", "--jobs", "1")
    assert code == 1
    assert "5 FAILED (5 of tenant 'tenant-0', who is none of 'a', 'b')" in out


def test_very_many_reasons_are_cut_short(cli):
    flags = ("--workload", "tenants", "--num-tenants", "30", "--tenants", "a", "--tenants", "b")
    _, out, _ = cli(*SMALL, "--num-prompts", "60", *flags, "--num-blocks", "500", "--jobs", "1")
    assert out.count("of tenant") == 10
    assert "reasons more)" in out or "more reasons)" in out
