"""Benchmarks: the requests they make, the numbers they give, the JSON they write."""

import io
import json
import sys

import msgspec
import pytest
from rich.console import Console

from pagedkv.cli import datasets, results
from pagedkv.cli.report import table
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import ConfigError, InvalidRequest

TINY = ("--model", "tiny-random")
SHORT = ("--num-prompts", 4, "--input-len", 20, "--output-len", 5)
PROVENANCE = {"schema_version", "config", "seed", "versions", "machine", "model", "workload"}


def random_requests(count=50, **changes):
    options = {"input_len": 40, "output_len": 20, "range_ratio": 0.5, "seed": 3}
    return datasets.random_requests(count, 1000, **(options | changes))


# Datasets


def test_random_requests_keep_to_their_ranges():
    requests = random_requests()
    assert {len(r.prompt) for r in requests} <= set(range(20, 61))
    assert {r.output_len for r in requests} <= set(range(10, 31))
    assert len({len(r.prompt) for r in requests}) > 10
    assert all(0 <= token < 1000 for r in requests for token in r.prompt)


def test_random_requests_of_one_length():
    assert {len(r.prompt) for r in random_requests(range_ratio=0.0)} == {40}


def test_a_seed_fixes_the_requests():
    assert random_requests() == random_requests() != random_requests(seed=4)


def test_a_random_prefix_is_shared_and_added():
    requests = random_requests(prefix_len=7, range_ratio=0.0)
    assert len({tuple(r.prompt[:7]) for r in requests}) == 1
    assert {len(r.prompt) for r in requests} == {47}


def test_prefixes_repeat_evenly_in_shuffled_order():
    requests = datasets.prefix_repetition_requests(
        20, 1000, prefix_len=8, suffix_len=5, num_prefixes=4, output_len=3, seed=1
    )
    heads = [tuple(r.prompt[:8]) for r in requests]
    assert sorted(heads.count(head) for head in set(heads)) == [5, 5, 5, 5]
    assert heads != sorted(heads)
    assert len({tuple(r.prompt) for r in requests}) == 20
    assert {len(r.prompt) for r in requests} == {13}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"input_len": 0}, "--input-len"),
        ({"output_len": -1}, "--output-len"),
        ({"range_ratio": 1.0}, "--random-range-ratio"),
        ({"prefix_len": -1}, "--prefix-len"),
        ({"count": 0}, "--num-prompts"),
    ],
)
def test_lengths_out_of_range_are_refused(changes, flag):
    with pytest.raises(ConfigError, match=flag):
        random_requests(**changes)


def test_more_prefixes_than_prompts_are_refused():
    with pytest.raises(ConfigError, match="--num-prefixes"):
        datasets.prefix_repetition_requests(
            3, 9, prefix_len=1, suffix_len=1, num_prefixes=4, output_len=1
        )


def test_custom_requests_are_the_first_of_the_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "a", "output_len": 3}\nb\n{"prompt_token_ids": [1]}\nc\n')
    requests = datasets.custom_requests(str(path), 3, output_len=9)
    assert [(r.prompt, r.output_len) for r in requests] == [("a", 3), ("b", 9), ([1], 9)]
    assert len(datasets.custom_requests(str(path), 100, output_len=9)) == 4


@pytest.mark.parametrize(
    "text", ["", '{"prompt": "a", "output_len": "many"}', '{"messages": []}', '{"no": 1}']
)
def test_custom_files_without_prompts_are_refused(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises((ConfigError, InvalidRequest), match=r"prompts\.jsonl"):
        datasets.custom_requests(str(path), 3, output_len=9)


# Results


def test_totals_are_differences_of_counters():
    before = Scheduler().stats()
    after = msgspec.structs.replace(before, num_steps=9, prompt_tokens=40, num_running=3)
    totals = results.totals_between(before, after)
    assert totals["num_steps"] == 9
    assert "num_running" not in totals


def test_throughput_has_the_rates():
    totals = {"prompt_tokens": 40, "prompt_tokens_cached": 10, "num_steps": 7}
    result = results.throughput_result(2.0, [(30, 5), (0, 5), (10, 6)], totals)
    assert result["num_requests"] == 2
    assert result["total_num_tokens"] == 56
    assert result["tokens_per_second"] == 28.0
    assert result["output_tokens_per_second"] == 8.0
    assert result["requests_per_second"] == 1.0
    assert result["prefix_cache_hit_rate"] == 0.25
    assert result["num_steps"] == 7


def test_latency_has_mean_and_percentiles():
    result = results.latency_result([1.0, 3.0, 2.0])
    assert result["avg_latency"] == 2.0
    assert result["percentiles"]["50"] == 2.0
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert result["latencies"] == [1.0, 3.0, 2.0]


def test_results_go_to_a_file_to_stdout_or_nowhere(tmp_path, capsys):
    path = tmp_path / "result.json"
    results.check_writable(str(path))
    results.write_result({"a": 1}, str(path))
    results.write_result({"a": 1}, "-")
    results.write_result({"a": 1}, None)
    assert json.loads(path.read_text()) == json.loads(capsys.readouterr().out) == {"a": 1}


# Runs


def measured(cli, tmp_path, *args):
    path = tmp_path / "result.json"
    code, out, err = cli("bench", *args, *TINY, "--output-json", path)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100
    return json.loads(path.read_text()), out


def test_throughput_run(cli, tmp_path):
    result, out = measured(cli, tmp_path, "throughput", *SHORT, "--seed", 5)
    keys = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second"}
    assert keys | {"tokens_per_second"} | PROVENANCE <= result.keys()
    assert result["total_input_tokens"] == 80
    assert result["total_output_tokens"] == 20
    assert result["num_requests"] == 4
    assert result["failed"] == 0
    assert result["computed_tokens"] == 80 + 20 - 4  # nobody computes a last token
    assert result["seed"] == result["config"]["scheduler"]["seed"] == 5
    assert result["workload"]["input_len"] == 20
    for row in ("output tokens/s", "total tokens/s", "prefix hit rate", "preemptions", "steps"):
        assert row in out


def test_throughput_with_shared_prefixes_hits_the_cache(cli, tmp_path):
    args = ("--dataset-name", "prefix_repetition", "--prefix-len", 64, "--suffix-len", 4)
    args += ("--num-prefixes", 1, "--output-len", 3, "--num-prompts", 6, "--max-num-seqs", 1)
    result, _ = measured(cli, tmp_path, "throughput", *args)
    assert result["prefix_cache_hit_rate"] == pytest.approx(5 * 64 / (6 * 68))
    off, _ = measured(cli, tmp_path, "throughput", *args, "--no-enable-prefix-caching")
    assert off["prefix_cache_hit_rate"] == 0.0


def test_throughput_in_a_small_pool_preempts(cli, tmp_path):
    args = ("--num-prompts", 4, "--input-len", 30, "--output-len", 40, "--num-blocks", 10)
    result, _ = measured(cli, tmp_path, "throughput", *args)
    assert result["num_preemptions"] > 0
    assert result["total_output_tokens"] == 160
    assert result["peak_kv_cache_usage"] > 0.8


def test_throughput_under_eviction_counts_what_was_forgotten(cli, tmp_path):
    args = ("--num-prompts", 2, "--input-len", 64, "--output-len", 40, "--block-size", 4)
    policy = "sinks=4 + budget=24"
    result, out = measured(cli, tmp_path, "throughput", *args, "--eviction", policy)
    assert result["evicted_tokens"] > 50
    assert f"policy {policy}" in out
    assert result["bytes_moved"] == 0, "whole blocks go without a copy"
    token = "sinks=3 + budget=24 + unit=token"
    by_token, _ = measured(cli, tmp_path, "throughput", *args, "--eviction", token)
    assert by_token["tokens_moved"] > 0
    assert by_token["bytes_moved"] % by_token["tokens_moved"] == 0


def test_throughput_of_a_file(cli, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    args = ("throughput", "--dataset-path", path, "--output-len", 4, "--n", 2)
    result, _ = measured(cli, tmp_path, *args)
    assert result["num_requests"] == 2
    assert result["total_output_tokens"] == 16


def test_latency_run(cli, tmp_path):
    args = ("--batch-size", 2, "--input-len", 8, "--output-len", 4, "--num-iters", 3)
    result, out = measured(cli, tmp_path, "latency", *args)
    assert {"avg_latency", "latencies", "percentiles"} | PROVENANCE <= result.keys()
    assert len(result["latencies"]) == 3
    assert "mean" in out


def test_json_on_stdout_is_alone_there(cli):
    code, out, err = cli("bench", "throughput", *TINY, *SHORT, "--output-json", "-")
    assert code == 0
    assert json.loads(out)["num_requests"] == 4
    assert "output tokens/s" in err


def test_progress_is_drawn_on_a_terminal(cli, monkeypatch):
    monkeypatch.setattr("pagedkv.cli.report._REFRESH", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli("bench", "throughput", *TINY, *SHORT).code == 0


def test_a_failed_request_makes_the_exit_code_1(cli):
    args = ("--num-prompts", 1, "--input-len", 8, "--output-len", 60, "--num-blocks", 2)
    code, _, err = cli("bench", "throughput", *TINY, *args)
    assert code == 1
    assert "1 sequences ended with an error" in err


def test_the_table_is_narrow_with_large_numbers():
    totals = dict.fromkeys(msgspec.structs.asdict(Scheduler().stats()), 123_456_789)
    result = results.throughput_result(12345.6, [(10**8, 10**8)] * 3, totals)
    result |= {"computed_tokens": 10**9, "peak_kv_cache_usage": 1.0, "failed": 0}
    result |= {"evicted_tokens": 10**9, "bytes_moved": 10**12}
    result |= {"config": {"cache": {"num_blocks": 10**7, "eviction": "sinks=4 + recent=252"}}}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(result))
    assert max(map(len, console.export_text().splitlines())) <= 100
