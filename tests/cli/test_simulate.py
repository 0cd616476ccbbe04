"""``pagedkv simulate`` and ``pagedkv trace`` from the outside."""

import json
import re

import pytest

SMALL = ("simulate", "--num-prompts", "20", "--input-len", "60", "--output-len", "12")


def results(cli, *flags):
    code, out, _ = cli(*SMALL, *flags, "--output-json", "-")
    assert code == 0
    return json.loads(out)["runs"]


def test_a_run_has_vllms_serving_keys(cli):
    (run,) = results(cli)
    wanted = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens"}
    wanted |= {"request_throughput", "request_goodput", "output_throughput"}
    wanted |= {"total_token_throughput", "max_concurrent_requests", "max_output_tokens_per_s"}
    for name in ("ttft", "tpot", "itl", "e2el"):
        wanted |= {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99")}
    assert wanted <= run["summary"].keys()
    assert run["summary"]["completed"] == 20
    assert run["config"]["cache"]["block_size"] == 16


def test_commas_sweep_every_combination_in_order(cli):
    runs = results(cli, "--num-blocks", "100,200", "--reclaim", "lru,clairvoyant", "--jobs", "2")
    assert [list(run["varied"].values()) for run in runs] == [
        ["lru", 100],
        ["lru", 200],
        ["clairvoyant", 100],
        ["clairvoyant", 200],
    ]


def test_seeds_give_an_interval(cli):
    code, out, _ = cli(*SMALL, "--seed", "0,1,2", "--jobs", "1")
    assert code == 0
    assert "3 seeds: median_ttft_ms" in out
    assert "±" in out
    code, out, _ = cli(*SMALL, "--seed", "0,1,2", "--jobs", "1", "--output-json", "-")
    (group,) = json.loads(out)["over_seeds"]
    assert group["num_seeds"] == 3
    assert group["summary"]["p99_ttft_ms"]["ci95"] > 0


def test_a_report_is_one_file_with_its_plots_inside(cli, tmp_path):
    page = tmp_path / "report.html"
    sweep = ("--workload", "tenants", "--num-blocks", "60,200", "--jobs", "1")
    assert cli(*SMALL, *sweep, "--html", page).code == 0
    text = page.read_text()
    assert text.count("<svg") == 6
    for title in ("Comparison", "Block occupancy over time", "Latencies, cumulated", "Tenants"):
        assert f"<h2>{title}</h2>" in text
    fetched = re.findall(r'(?:src|href)="(?!#)', text)
    assert fetched == []
    assert "<script" not in text


def test_a_perfetto_trace_is_chromes_format(cli, tmp_path):
    path = tmp_path / "trace.json"
    assert cli(*SMALL, "--perfetto", path).code == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    decode = [event for event in events if event["name"] == "decode"]
    assert len(decode) == 20
    assert all(event["dur"] >= 0 for event in decode)


def test_capacity_is_searched(cli):
    code, out, _ = cli(*SMALL, "--max-num-seqs", "2", "--goodput", "ttft:200", "--find", "capacity")
    assert code == 0
    assert "90% of requests are good up to" in out


def test_requests_that_never_fit_are_failures(cli):
    code, out, _ = cli(*SMALL, "--num-blocks", "2")
    assert code == 1
    assert "FAILED" in out
    assert "larger than the pool" in out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--trace", "nowhere.jsonl"), "no such file"),
        (("--goodput", "ttft"), "goodput"),
        (("--find", "capacity"), "give --goodput"),
        (("--find", "blocks", "--goodput", "ttft:0.001"), "not met even with"),
        (("--request-rate", "0"), "rate is 0"),
        (("--burstiness", "nan"), "burstiness is nan"),
        (("--input-spread", "nan"), "spread is nan"),
        (("--prefix-len", "-5"), "prefix_len is -5"),
        (("--num-prefixes", "0"), "num_prefixes is 0"),
        (("--workload", "sessions", "--turns", "inf"), "turns is inf"),
        (("--workload", "sessions", "--think-time", "nan"), "think is nan"),
        (("--workload", "sessions", "--think-time", "inf"), "think is inf"),
        (("--trace", __file__, "--speedup", "nan"), "speedup is nan"),
        (("--trace", __file__, "--speedup", "0"), "speedup is 0"),
        (("--trace", __file__, "--num-prompts", "-1"), "num_prompts is -1"),
        (("--trace", __file__, "--num-prompts", "0"), "num_prompts is 0"),
        (("--trace", __file__, "--hash-block-size", "0"), "block_size is 0"),
        (("--trace", __file__, "--format", "weka", "--session-rate", "0"), "session_rate is 0"),
        (("--trace", __file__, "--format", "servegen", "--trace-start", "-1"), "start is -1"),
        (("--input-len", "0"), "lengths"),
        (("--hardware", "abacus"), "invalid choice"),
        (("--hardware", "a100-llama3-8b,abacus"), "invalid choice"),
        (("--num-blocks", "1,x"), "'x' is not a whole number"),
        (("--cost-json", "nowhere.json"), "not a cost model"),
        (("--perfetto", "p.json", "--seed", "0,1"), "trace a single run"),
        (("--reclaim", "clairvoyant", "--replicas", "2"), "one replica"),
        (("--workload", "tenants", "--num-tenants", "0"), "num_tenants"),
    ],
)
def test_mistakes_are_told_in_a_line(refused, flags, match):
    assert match in refused(*SMALL, *flags)


def test_a_trace_is_made_looked_at_and_converted(cli, tmp_path):
    made, table = tmp_path / "made.jsonl", tmp_path / "table.csv"
    assert cli("trace", "generate", "tool-agent", "--num-prompts", 25, "--output", made).code == 0
    code, out, _ = cli("trace", "stats", made, "--output-json", "-")
    assert code == 0
    stats = json.loads(out)
    assert (stats["num_requests"], stats["num_tenants"]) == (25, 3)
    assert cli("trace", "convert", made, "--to", "azure", "--output", table).code == 0
    assert cli("trace", "stats", table, "--format", "azure").lines[1].split()[-1] == "25"


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("generate", "sessions", "--output", "{kept}"), "invalid choice: 'sessions'"),
        (("generate", "random", "--block-size", "-4", "--output", "{kept}"), "block_size is -4"),
        (("generate", "random", "--num-prompts", "-1", "--output", "{kept}"), "-1"),
        (("generate", "random", "--seed", "-1", "--output", "{kept}"), "seed is -1"),
        (("convert", "{kept}", "--output", "{kept}"), "not valid JSON"),
        (("stats", "{kept}", "--block-size", "-3"), "block_size is -3"),
        (("stats", "{kept}", "--block-size", "0"), "block_size is 0"),
        (("stats", "{kept}", "--num-prompts", "0"), "num_prompts is 0"),
    ],
)
def test_what_cannot_be_made_of_a_trace_leaves_files_alone(refused, tmp_path, args, match):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    assert match in refused("trace", *(each.format(kept=kept) for each in args))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_skipped_rows_are_told(cli, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.0,30,4\n2023-11-16 18:17:04.0,30,0\n"
    )
    flags = ("simulate", "--trace", path, "--format", "azure")
    assert "trace.csv:3: GeneratedTokens is less than 1" in cli(*flags).err
    assert "skipped 1 (GeneratedTokens is less than 1)" in cli(*flags, "--on-error", "skip").out
