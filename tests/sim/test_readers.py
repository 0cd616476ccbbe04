"""Trace formats: what is read, what is refused by file and line, what is counted."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from pagedkv import ConfigError, TraceError
from pagedkv.sim.readers import READERS, read_trace
from pagedkv.sim.traces import trace_stats, write_trace

SLICE = Path(__file__).parent / "data/conversation.jsonl"


def written(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def moon(t=0, length=600, out=5, ids=(1, 2), **more):
    row = {"timestamp": t, "input_length": length, "output_length": out, "hash_ids": list(ids)}
    return row | more


GOOD = {
    "mooncake": [moon(), moon(1500, 700, 3, (1, 9))],
    "timed_trace": [moon(), moon(1500, 700, 3, (1, 9))],
    "bailian": [
        moon(0, 20, 5, (7, 8), chat_id=1, parent_chat_id=-1, turn=1, type="text"),
        moon(1.5, 40, 3, (7, 8, 9), chat_id=2, parent_chat_id=1, turn=2, type="text"),
    ],
    "azure": [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,600,5",
        "2023-11-16 18:17:05.4799600,700,3",
    ],
    "burstgpt": [
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,"
        "Total tokens,Log Type",
        "0,a,1.0,ChatGPT,600,5,605,Conversation log",
        "1.5,a,1.0,GPT-4,700,3,703,Conversation log",
    ],
    "weka": [
        {"session_meta": "s1", "block_size": 64, "n": 2},
        {"t": 0.0, "in": 100, "out": 5, "think_time": 0.0, "hash_rle": [[1, 2]]},
        {"t": 1.5, "in": 150, "out": 3, "think_time": 4.0, "hash_rle": [[1, 1], [9, 2]]},
    ],
    "llmservingsim": [
        {"input_toks": 3, "output_toks": 5, "arrival_time_ns": 0, "input_tok_ids": [4, 5, 6]},
        {"input_toks": 2, "output_toks": 3, "arrival_time_ns": 15e8, "input_tok_ids": [4, 5]},
    ],
}


@pytest.mark.parametrize("format", GOOD)
def test_two_requests_are_read(format, tmp_path):
    path = written(tmp_path / "trace", GOOD[format])
    options = {"closed_loop": False} if format == "weka" else {}
    first, second = list(read_trace(path, format, **options))
    assert second.arrival - first.arrival == pytest.approx(1.5)
    assert (first.output_len, second.output_len) == (5, 3)
    lengths = {"bailian": 20, "weka": 100, "llmservingsim": 3}
    assert len(first.prompt) == len(first.prompt.token_ids()) == lengths.get(format, 600)


@pytest.mark.parametrize(("format", "size"), [("mooncake", 512), ("bailian", 16), ("weka", 64)])
def test_equal_ids_are_equal_tokens_and_different_ones_are_not(format, size, tmp_path):
    path = written(tmp_path / "trace", GOOD[format])
    options = {"closed_loop": False} if format == "weka" else {}
    first, second = (r.prompt.token_ids() for r in read_trace(path, format, **options))
    assert (first[:size] == second[:size]).all()
    if format != "bailian":
        assert not (first[size:] == second[size : len(first)]).any()


def test_a_follow_up_of_weka_waits_for_its_think_time(tmp_path):
    (first,) = read_trace(written(tmp_path / "trace", GOOD["weka"]), "weka")
    assert first.then.think == 4.0
    assert first.then.session == first.session == "s1"


def test_weka_sessions_as_published_bring_their_sub_agents(tmp_path):
    inner = {"t": 1.0, "in": 64, "out": 2, "hash_ids": [5]}
    session = {"id": "s", "requests": [{"t": 0.0, "in": 128, "out": 2, "hash_ids": [1, 2]}]}
    session["requests"].append({"t": 0.9, "requests": [inner]})
    (first,) = read_trace(written(tmp_path / "trace", [session]), "weka")
    assert len(first.then.prompt) == 64
    assert first.then.then is None


def test_bailian_turns_are_one_session(tmp_path):
    first, second = read_trace(written(tmp_path / "trace", GOOD["bailian"]), "bailian")
    assert first.session == second.session == "1"


def test_models_of_burstgpt_are_tenants_and_can_be_chosen(tmp_path):
    path = written(tmp_path / "trace", GOOD["burstgpt"])
    assert [r.tenant for r in read_trace(path, "burstgpt")] == ["ChatGPT", "GPT-4"]
    chosen = read_trace(path, "burstgpt", model="GPT-4")
    assert [r.tenant for r in chosen] == ["GPT-4"]
    assert chosen.skipped == {"another model than GPT-4": 1}


def test_packed_files_are_unpacked_on_the_way(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(SLICE.read_bytes()))
    assert len(list(read_trace(path, "mooncake"))) == 400


BAD = {
    "not JSON": ("mooncake", "{", "not valid JSON"),
    "not an object": ("mooncake", "[1]", "not an object"),
    "field missing": ("mooncake", {"timestamp": 1}, "input_length is missing"),
    "unsorted": ("mooncake", moon(-0.5), "time stamp is negative"),
    "before": ("mooncake", moon(0), "before the row before's"),
    "hashes short": ("mooncake", moon(9, 600, 5, (1,)), "does not cover the prompt"),
    "hashes long": ("mooncake", moon(9, 600, 5, (1, 2, 3)), "does not cover the prompt"),
    "hashes no numbers": ("mooncake", moon(9, 600, 5, ("a", "b")), "not a list of whole numbers"),
    "no prompt": ("mooncake", moon(9, 0, 5, ()), "input_length is less than 1"),
    "no answer": ("mooncake", moon(9, 600, 0), "output_length is less than 1"),
    "half a token": ("mooncake", moon(9, 600.5, 5), "not a whole number"),
    "nan": ("mooncake", moon(9) | {"timestamp": "nan"}, "not a finite number"),
    "columns": ("azure", "2023-11-16 18:17:09,5", "another number of columns"),
    "date": ("azure", "yesterday,5,5", "not a date"),
    "failed": ("burstgpt", "9,a,1,GPT-4,5,0,5,API log", "Response tokens is less than 1"),
    "negative think": ("weka", {"t": 9, "in": 9, "out": 9, "think_time": -1}, "time is negative"),
    "runs": ("weka", {"t": 9, "in": 9, "out": 9, "hash_rle": [3]}, "not a list of whole"),
    "tokens": (
        "llmservingsim",
        {"input_toks": 3, "output_toks": 5, "arrival_time_ns": 2e9, "input_tok_ids": [1]},
        "input_tok_ids and input_toks disagree",
    ),
}


def broken(name, tmp_path):
    """Two good rows, a bad one where it hurts, and for `before` a later one before it."""
    format, bad, match = BAD[name]
    rows = [*GOOD[format]]
    if name == "before":
        rows[-1] = moon(1500, 700, 3, (1, 9))
    return format, written(tmp_path / "trace", [*rows, bad]), match, len(rows) + 1


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(name, tmp_path):
    format, path, match, line = broken(name, tmp_path)
    with pytest.raises(TraceError, match=match) as fault:
        list(read_trace(path, format))
    assert fault.value.where == f"{path}:{line}"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_can_be_skipped_and_is_counted(name, tmp_path):
    format, path, match, _ = broken(name, tmp_path)
    workload = read_trace(path, format, on_error="skip")
    count = sum(1 + (r.then is not None) for r in workload)
    assert count == 2
    ((reason, times),) = workload.skipped.items()
    assert times == 1
    assert match in reason
    again = sum(1 + (r.then is not None) for r in workload)
    assert (again, workload.skipped.total()) == (2, 1), "a second reading counts afresh"


def test_a_table_without_its_columns_is_refused(tmp_path):
    path = written(tmp_path / "trace", ["a,b", "1,2"])
    with pytest.raises(TraceError, match="no column TIMESTAMP"):
        list(read_trace(path, "azure"))


def test_unknown_formats_files_and_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="mooncake"):
        read_trace(SLICE, "csv")
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "none", "mooncake")
    with pytest.raises(ConfigError, match="no such option"):
        read_trace(SLICE, "azure", block_size=3)
    with pytest.raises(ConfigError, match="on_error"):
        read_trace(SLICE, "mooncake", on_error="ignore")


def test_stats_of_the_slice():
    found = trace_stats(read_trace(SLICE, "mooncake"))
    rows = [json.loads(line) for line in SLICE.read_text().splitlines()]
    assert found["num_requests"] == len(rows) == 400
    assert found["total_input_tokens"] == sum(row["input_length"] for row in rows)
    assert found["unique_blocks"] == len({h for row in rows for h in row["hash_ids"]})
    median = np.median([row["output_length"] for row in rows])
    assert found["output_tokens"]["p50"] == median


@pytest.mark.parametrize("format", ["mooncake", "timed_trace", "llmservingsim", "azure"])
def test_what_is_written_reads_the_same(format, tmp_path):
    source = read_trace(SLICE, "mooncake").head(30)
    write_trace(source, tmp_path / "out", format)
    before, after = list(source), list(read_trace(tmp_path / "out", format))
    assert [len(r.prompt) for r in after] == [len(r.prompt) for r in before]
    assert [r.output_len for r in after] == [r.output_len for r in before]
    assert [r.arrival for r in after] == pytest.approx([r.arrival for r in before])
    if format != "azure":
        stats = [
            trace_stats(w, block_size=16) for w in (source, read_trace(tmp_path / "out", format))
        ]
        assert stats[0]["unique_blocks"] == stats[1]["unique_blocks"]


def test_finer_ids_keep_what_is_shared(tmp_path):
    source = read_trace(SLICE, "mooncake").head(30)
    write_trace(source, tmp_path / "out", "timed_trace", block_size=64)
    finer = read_trace(tmp_path / "out", "timed_trace", block_size=64)
    coarse = trace_stats(source, block_size=64)
    assert trace_stats(finer)["ideal_token_hit_ratio"] >= coarse["ideal_token_hit_ratio"] > 0


def test_a_trace_is_written_over_the_file_it_is_read_from(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(SLICE.read_bytes())
    path.chmod(0o640)
    before = [r.arrival for r in read_trace(path, "mooncake")]
    assert write_trace(read_trace(path, "mooncake"), path, "mooncake").num_requests == 400
    assert [r.arrival for r in read_trace(path, "mooncake")] == pytest.approx(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_when_a_trace_cannot_be_written(tmp_path):
    bad = written(tmp_path / "bad", [*map(json.dumps, map(moon, range(300))), "{"])
    talk = written(tmp_path / "talk", GOOD["weka"])
    kept = written(tmp_path / "kept", ["precious"])
    with pytest.raises(TraceError, match="not valid JSON"):
        write_trace(read_trace(bad, "mooncake"), kept, "azure")
    with pytest.raises(ConfigError, match="closed_loop off"):
        write_trace(read_trace(talk, "weka"), kept, "mooncake")
    with pytest.raises(ConfigError, match="block_size"):
        write_trace(read_trace(SLICE, "mooncake"), kept, "mooncake", block_size=-4)
    assert kept.read_text() == "precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "kept", "talk"]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    link, place = tmp_path / "link", tmp_path / "place"
    link.symlink_to(place)
    write_trace(read_trace(SLICE, "mooncake").head(3), link, "azure")
    assert link.is_symlink()
    assert len(place.read_text().splitlines()) == 4
    three = read_trace(SLICE, "mooncake").head(3)
    assert write_trace(three, "/dev/null", "azure").num_requests == 3
    assert Path("/dev/null").is_char_device()


def test_conversations_cannot_be_written_with_fixed_times(tmp_path):
    talk = read_trace(written(tmp_path / "trace", GOOD["weka"]), "weka")
    with pytest.raises(ConfigError, match="closed_loop off"):
        write_trace(talk, tmp_path / "out", "mooncake")
    with pytest.raises(ConfigError, match="not written"):
        write_trace(talk, tmp_path / "out", "weka")


def test_every_reader_is_tested():
    assert set(GOOD) | {"servegen"} == set(READERS)
