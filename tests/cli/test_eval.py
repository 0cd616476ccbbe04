"""Evaluations: what they read, what they count, how they compare, and what they leave behind."""

import gzip
import io
import json

import msgspec
import numpy as np
import pytest
from rich.console import Console

from pagedkv import PolicyError
from pagedkv.cli import passages, sweep
from pagedkv.cli.quality import METRICS, SEGMENT, compare
from pagedkv.cli.quality_plot import draw_quality
from pagedkv.cli.quality_report import quality_table
from pagedkv.device.outputs import ScoreOutput
from pagedkv.errors import ConfigError

TINY = ("--model", "tiny-random", "--block-size", 8, "--chunk", 8)
TASKS = {
    "perplexity": ("--num-tokens", 120),
    "copy": ("--source-len", 24, "--filler-len", 32),
    "passkey": ("--num-tokens", 160, "--depths", "0.2,0.8"),
    "agreement": ("--num-tokens", 90, "--output-len", 20),
}
PROVENANCE = {"schema_version", "config", "seed", "versions", "machine", "model", "workload"}


def encode(text):
    return list(text.encode())


def text_of(count=1000):
    return passages.Text(name="numbers", sha256="", token_ids=list(range(count)))


# What is read


def test_windows_lie_where_the_seed_says_or_one_after_another():
    text = text_of()
    first = text.windows(3, 40, seed=1, offset=None)
    assert first == text.windows(3, 40, seed=1, offset=None)
    assert first != text.windows(3, 40, seed=2, offset=None)
    assert all(window == list(range(window[0], window[0] + 40)) for window in first)
    assert [w[0] for w in text.windows(3, 40, seed=1, offset=7)] == [7, 47, 87]
    assert text.windows(1, 1000, seed=5, offset=None) == [text.token_ids]


@pytest.mark.parametrize(
    ("count", "length", "offset"), [(1, 1001, None), (3, 400, 0), (1, 10, 995), (1, 10, -1)]
)
def test_more_than_the_text_has_is_refused(count, length, offset):
    with pytest.raises(ConfigError, match="numbers"):
        text_of().windows(count, length, seed=0, offset=offset)


def test_the_source_of_a_copy_is_in_the_middle_and_its_repeat_counts():
    (passage,) = passages.copy_passages([list(range(100))], filler=40, source=20)
    assert passage.token_ids == [*range(100), *range(40, 60)]
    assert passage.token_ids[passage.start :] == list(range(40, 60))


def test_a_key_is_hidden_at_its_depth_and_its_answer_counts():
    windows = [list(b"x" * 300)] * 2
    found = passages.passkey_passages(windows, 300, (0.0, 0.5, 1.0), encode, seed=3)
    assert [each.depth for each in found] == [0.0, 0.5, 1.0] * 2
    keys = set()
    for each in found:
        read = bytes(each.token_ids).decode()
        assert len(read) == 300
        key = read[each.start :].strip()
        keys.add(key)
        assert len(key) == 5
        assert read[: each.start].count(key) == 2
        before, _, after = read.partition("\n\nThe pass key is")
        assert len(before) == pytest.approx(each.depth * read.count("x"), abs=1)
        assert after.endswith(f"What is the pass key? The pass key is {key}")
    assert len(keys) == 6


@pytest.mark.parametrize("arguments", [(60, (0.5,)), (300, (1.5,)), (300, (-0.1,))])
def test_a_passkey_that_cannot_be_is_refused(arguments):
    with pytest.raises(ConfigError):
        passages.passkey_passages([list(range(100)) * 3], *arguments, encode, seed=0)


def test_texts_are_read_packed_or_not(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"abc"))
    plain, packed = (
        passages.load_text(str(tmp_path / name), encode) for name in ("a.txt", "a.txt.gz")
    )
    assert plain.token_ids == packed.token_ids == [97, 98, 99]
    assert plain.sha256 == packed.sha256
    assert len(passages.load_text(None, encode).token_ids) > 20_000


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_what_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "a.gz" if content is None else tmp_path / "a.txt"
    path.write_bytes(b"not packed" if content is None else content)
    with pytest.raises(ConfigError, match="UTF-8"):
        passages.load_text(str(path), encode)


# What is counted


def scored(logprobs, greedy):
    return ScoreOutput(
        token_ids=[],
        logprobs=np.array(logprobs, np.float32),
        greedy=np.array(greedy, np.int32),
    )


def test_metrics_count_what_comes_after_the_start():
    passage = passages.Passage(token_ids=[5, 6, 7, 8], start=2)
    output = scored([-9.0, -1.0, -3.0], [0, 7, 0])
    values = {name: metric.value([metric.of(passage, output)]) for name, metric in METRICS.items()}
    assert values["perplexity"] == values["copy"] == pytest.approx(np.exp(2.0))
    assert values["agreement"] == 0.5
    assert values["passkey"] == 0.0
    assert METRICS["passkey"].of(passage, scored([0, 0, 0], [0, 7, 8])).tolist() == [1.0]


def test_a_comparison_is_paired():
    """What all tokens have in common cancels: the interval is that of the difference alone."""
    rng = np.random.default_rng(0)
    full = [rng.normal(3, 2, 500) for _ in range(4)]
    worse = [items + 0.1 + rng.normal(0, 0.01, 500) for items in full]
    found = compare(METRICS["perplexity"], worse, full, seed=0)
    assert found.estimate == pytest.approx(np.exp(0.1), rel=1e-3)
    assert found.low <= found.estimate <= found.high
    assert found.high - found.low < 0.01
    accuracy = compare(METRICS["agreement"], [np.zeros(10)], [np.ones(10)], seed=0)
    assert (accuracy.estimate, accuracy.low, accuracy.high) == (-1, -1, -1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    metric, zero = METRICS["agreement"], [np.zeros(40 * SEGMENT)]
    intervals = [
        compare(metric, [rng.normal(0.5, 1, 40 * SEGMENT)], zero, seed=i) for i in range(60)
    ]
    covered = sum(each.low <= 0.5 <= each.high for each in intervals)
    assert 51 <= covered <= 60


def test_every_combination_is_a_cell_and_the_full_cache_is_first_and_once():
    found = sweep.cells(["h2o", "full", "window"], [32, 64], ["layer", "head"], 24)
    assert [each.label for each in found[:5]] == [
        "full",
        "h2o 32",
        "h2o 64",
        "window 32",
        "window 64",
    ]
    assert len(found) == 1 + 2 * 2 * 2
    assert {each.policy.tokens for each in found[1:]} == {32, 64}
    assert {each.policy.chunk for each in found[1:]} == {24}
    assert [each.granularity for each in found] == ["layer"] * 5 + ["head"] * 4
    with pytest.raises(PolicyError, match="h2o"):
        sweep.cells(["h2"], [32], ["layer"], 16)


# Runs


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_a_table_a_json_and_a_picture(cli, tmp_path, monkeypatch, task):
    monkeypatch.setenv("COLUMNS", "80")
    args = ("eval", task, *TINY, *TASKS[task], "--eviction", "streaming,peak", "--budget", "16,32")
    args += ("--granularity", "sequence,layer", "--num-samples", 2, "--seed", 3)
    code, out, err = cli(*args, "--output-json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    result = json.loads((tmp_path / "r.json").read_text())
    assert result.keys() >= {"task", "text", "passages", "cells"} | PROVENANCE
    full, *rest = result["cells"]
    assert (full["eviction"], full["evicted_fraction"]) == ("full", 0.0)
    assert [(c["eviction"], c["budget"], c["granularity"]) for c in rest] == [
        (name, budget, granularity)
        for granularity in ("sequence", "layer")
        for name in ("streaming", "peak")
        for budget in (16, 32)
    ]
    count = len(result["passages"])
    assert count == (4 if task == "passkey" else 2)
    blocks = max(-(-(p["num_tokens"] + 1) // 8) for p in result["passages"])
    per_block = full["kv_bytes"] / blocks
    for cell in rest:
        assert cell["evicted_fraction"] > 0.3
        assert cell["kv_bytes"] <= (cell["budget"] / 8 + 2) * per_block < full["kv_bytes"]
        assert len(cell["per_passage"]) == count
        assert cell["vs_full"]["low"] <= cell["vs_full"]["estimate"] <= cell["vs_full"]["high"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    streaming = {c["budget"]: c["value"] for c in rest if c["eviction"] == "streaming"}
    assert len(set(streaming.values())) == len(streaming) or task == "passkey"


def test_a_seed_fixes_a_run_and_json_on_stdout_is_alone_there(cli):
    args = ("eval", "perplexity", *TINY, *TASKS["perplexity"], "--budget", 32, "--output-json", "-")
    runs = [json.loads(cli(*args, "--seed", seed).out) for seed in (1, 1, 2)]
    values = [[cell["value"] for cell in run["cells"]] for run in runs]
    assert values[0] == values[1] != values[2]


def test_a_policy_that_never_fired_is_named(cli):
    out = cli("eval", "perplexity", *TINY, "--num-tokens", 60, "--eviction", "h2o").out
    assert "Never evicted anything: h2o" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--budget", "many"), "whole numbers"),
        (("--budget", ""), "at least one"),
        (("--budget", 4), "block"),
        (("--eviction", "h20"), "h2o"),
        (("--granularity", "table"), "granularity"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--num-tokens", 10**6), "longer --text"),
        (("--num-samples", 0), "--num-samples: it is 0; give at least 1"),
        (("--num-tokens", 1), "--num-tokens: it is 1; give at least 2"),
        (("--chunk", 0), "--chunk: it is 0; give at least 1"),
        (("--offset", -1), "--offset: it is -1; give at least 0"),
        (("--output-json", "no/such/folder.json"), "written"),
        (("--plot", "no/such/folder.png"), "written"),
    ],
)
def test_mistakes_are_refused_in_a_line(cli, args, says):
    code, out, err = cli("eval", "perplexity", *TINY, *args)
    assert (code, out) == (2, "")
    assert err.startswith("pagedkv: error: ")
    assert says in err


@pytest.mark.parametrize(("length", "says"), [(0, "--output-len: it is 0"), (5000, "takes 2047")])
def test_continuations_that_cannot_be_are_refused_before_any_work(cli, length, says):
    code, out, err = cli("eval", "agreement", *TINY, "--output-len", length)
    assert (code, out) == (2, "")
    assert says in err


def test_long_expressions_get_numbers(tmp_path):
    long = "sinks=4 + recent=0.25 + score=lift_max + gqa=max"
    cell = {
        "eviction": "full", "budget": None, "granularity": "layer", "value": 123.456,
        "vs_full": {"estimate": 1.0, "low": 1.0, "high": 1.0}, "kv_bytes": 2.0**34,
        "evicted_fraction": 0.0,
    }  # fmt: skip
    other = cell | {
        "eviction": long, "budget": 131072, "granularity": "sequence", "value": 54321.0,
        "vs_full": {"estimate": 440.0, "low": 123.4, "high": 1234.5}, "evicted_fraction": 1.0,
    }  # fmt: skip
    result = {
        "task": "copy", "metric": "perplexity", "model": "m", "seed": 0, "cells": [cell, other],
        "passages": [{"num_tokens": 10}], "text": {"name": "t"},
    }  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(quality_table(result))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith("#1 ") and "100%" in line for line in lines)
    draw_quality(result, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert msgspec.json.encode(result)
