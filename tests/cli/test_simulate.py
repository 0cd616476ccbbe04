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
    wanted |= {
        "num_prompts",
        "request_rate",
        "request_throughput",
        "request_goodput",
        "output_throughput",
    }
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


def test_equal_runs_give_equal_reports(cli, tmp_path):
    pages = [tmp_path / name for name in ("one.html", "two.html")]
    for page in pages:
        assert cli(*SMALL, "--workload", "tenants", "--html", page).code == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_names_are_no_formulas(cli, tmp_path):
    trace, page = tmp_path / "trace.jsonl", tmp_path / "report.html"
    names = (r"$\bad{$", "租户", "a$b")
    rows = [
        {"timestamp": i, "input_length": 30, "output_length": 4, "hash_ids": [i], "tenant": name}
        for i, name in enumerate(names)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = cli("simulate", "--trace", trace, "--html", page)
    assert (code, err) == (0, "")
    assert page.read_text().count("<svg") == 4


def test_every_rung_is_in_the_report(cli, tmp_path):
    page = tmp_path / "report.html"
    assert cli(*SMALL, "--html", page).code == 0
    for title in ("reclaimed", "elastic", "swapped", "recomputed", "sequences failed"):
        assert title in page.read_text()


def test_details_are_saved_if_asked_for(cli):
    assert "ttfts" not in results(cli)[0]["summary"]
    summary = results(cli, "--save-detailed", "--request-rate", "inf")[0]["summary"]
    assert summary["num_prompts"] == len(summary["ttfts"]) == len(summary["e2els"]) == 20
    assert summary["request_rate"] == "inf"
    assert sum(map(len, summary["itls"])) == summary["total_output_tokens"] - 20


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


def test_a_search_writes_what_is_asked_for(cli, tmp_path):
    files = [tmp_path / name for name in ("found.json", "found.html", "found.perfetto")]
    flags = ("--output-json", files[0], "--html", files[1], "--perfetto", files[2])
    search = ("--max-num-seqs", "2", "--goodput", "ttft:200", "--find", "capacity")
    code, out, _ = cli(*SMALL, *search, *flags)
    assert code == 0
    assert all(path.stat().st_size for path in files)
    (run,) = json.loads(files[0].read_text())["runs"]
    assert run["found"] == {"find": "capacity", "within": 0.02}
    assert f"up to {run['varied']['request_rate']:.3g} requests/s (within 2%)" in out
    assert run["summary"]["request_rate"] == run["varied"]["request_rate"]
    assert run["summary"]["good_fraction"] >= 0.9


def test_a_search_of_sessions_counts_conversations(cli):
    search = ("--workload", "sessions", "--turns", "1", "--max-num-seqs", "1")
    search += ("--goodput", "ttft:100")
    assert "conversations/s" in cli(*SMALL, *search, "--find", "capacity").out


def test_a_point_without_an_edge_leaves_the_others_theirs(cli):
    flags = ("--max-num-seqs", "1,2", "--hardware", "a100-llama3-8b", "--good-share", "1")
    bounds = ("--goodput", "ttft:200", "--input-len", "60", "--output-spread", "0")
    code, out, _ = cli(*SMALL, *flags, *bounds, "--num-blocks", "2,1000", "--find", "capacity")
    assert code == 1
    assert sum("not met even" in line for line in out.splitlines()) == 2
    assert sum("requests are good up to" in line for line in out.splitlines()) == 2


def test_settings_win_over_defaults_and_flags_over_settings(cli, tmp_path, monkeypatch):
    path = tmp_path / "engine.toml"
    path.write_text(
        '[model]\nmax_model_len = 64\n[cache]\nreclaim = "fifo"\n[scheduler]\nseed = 7\n'
    )
    code, out, _ = cli(*SMALL, "--config", path, "--output-json", "-")
    (run,) = json.loads(out)["runs"]
    assert code == 1
    assert "longer than the model takes" in run["summary"]["refused"]
    assert (run["config"]["cache"]["reclaim"], run["config"]["scheduler"]["seed"]) == ("fifo", 7)
    assert run["seed"] == 7
    monkeypatch.setenv("PAGEDKV_CACHE__RECLAIM", "lfu")
    flags = ("--seed", "3", "--max-model-len", "4096", "--config", path)
    (run,) = results(cli, *flags)
    config = run["config"]
    assert (config["cache"]["reclaim"], config["scheduler"]["seed"]) == ("lfu", 3)
    assert config["model"]["max_model_len"] == 4096
    assert results(cli, "--seed", "3")[0]["summary"]["mean_ttft_ms"] == pytest.approx(
        run["summary"]["mean_ttft_ms"]
    )


def test_layers_and_heads_are_those_of_the_model(cli):
    runs = results(cli, "--granularity", "sequence,layer,head", "--jobs", "1")
    one, layers, heads = (run["summary"]["num_blocks"] for run in runs)
    assert (layers, heads) == (32 * one, 32 * 8 * one)
    held = [run["tenants"][""]["most_blocks_held"] for run in runs]
    assert held[1:] == [32 * held[0], 32 * 8 * held[0]]


def test_a_pool_of_bytes_is_as_large_as_that(cli, monkeypatch):
    monkeypatch.setenv("PAGEDKV_CACHE__KV_CACHE_MEMORY_BYTES", str(2**30))
    (run,) = results(cli)
    assert run["summary"]["num_blocks"] == 2**30 // (2 * 32 * 8 * 128 * 2 * 16)


def test_bounds_add_up(cli):
    (both,) = results(cli, "--goodput", "ttft:1e9", "--goodput", "e2el:0.001")
    assert both["summary"]["good_fraction"] == 0


def test_requests_that_never_fit_are_failures(cli):
    code, out, _ = cli(*SMALL, "--num-blocks", "2")
    assert code == 1
    assert "FAILED" in out
    assert "larger than the pool" in out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--trace", "nowhere.jsonl"), "--input-len, --output-len says nothing"),
        (("--speedup", "2"), "without --trace: --speedup says nothing"),
        (("--seed", "0,1,0"), "0 is given twice"),
        (("--jobs", "-1", "--seed", "0,1"), "--jobs"),
        (("--num-prompts", "0"), "num_prompts is 0"),
        (("--request-rate", "4,0"), "request_rate=0.0: "),
        (("--replicas", "1,0"), "replicas=0: "),
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


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--trace", "nowhere.jsonl"), "no such file"),
        (("--trace", __file__, "--speedup", "nan"), "speedup is nan"),
        (("--trace", __file__, "--speedup", "0"), "speedup is 0"),
        (("--trace", __file__, "--num-prompts", "-1"), "num_prompts is -1"),
        (("--trace", __file__, "--num-prompts", "0"), "num_prompts is 0"),
        (("--trace", __file__, "--hash-block-size", "0"), "block_size is 0"),
        (("--trace", __file__, "--format", "weka", "--session-rate", "0"), "session_rate is 0"),
        (("--trace", __file__, "--format", "servegen", "--trace-start", "-1"), "start is -1"),
        (("--trace", "TRACE", "--request-rate", "9"), "--speedup makes a trace faster"),
        (("--trace", "TRACE", "--open-loop"), "--open-loop says nothing about mooncake"),
        (("--workload", "sessions", "--num-tenants", "3"), "it is for tenants"),
        (("--workload", "random,tool-agent", "--turns", "2"), "about random, tool-agent"),
        (("--trace", "EMPTY"), "there is no request in it"),
    ],
)
def test_mistakes_about_traces_are_told_in_a_line(refused, cli, tmp_path, flags, match):
    made, empty = tmp_path / "made.jsonl", tmp_path / "empty.jsonl"
    empty.write_text("")
    assert cli("trace", "generate", "random", "--num-prompts", 3, "--output", made).code == 0
    files = {"TRACE": made, "EMPTY": empty}
    assert match in refused("simulate", *(files.get(flag, flag) for flag in flags))


def test_skipped_rows_are_told(cli, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.0,30,4\n2023-11-16 18:17:04.0,30,0\n"
    )
    flags = ("simulate", "--trace", path, "--format", "azure")
    assert "trace.csv:3: GeneratedTokens is less than 1" in cli(*flags).err
    assert "skipped 1 (GeneratedTokens is less than 1)" in cli(*flags, "--on-error", "skip").out
