"""Mistakes: one line on stderr that says what and where, exit code 2, nothing on stdout."""

import sys

import pytest

import pagedkv.cli
from pagedkv.errors import ConfigError

TINY = ("--model", "tiny-random")

MISTAKES = {
    "a flag with a typo": (["generate", "--max-token", "3", "a"], "did you mean --max-tokens?"),
    "a verb with a typo": (["generat", "a"], "invalid choice: 'generat'"),
    "a flag of vLLM's": (
        ["generate", "--gpu-memory-utilization=0.9", "a"],
        "did you mean --kv-cache-memory-fraction?",
    ),
    "a wrong one of several": (
        ["simulate", "--reclaim", "lru,lfv"],
        "invalid choice: 'lfv'; did you mean lfu?",
    ),
    "one argument too many": (["env", "now"], "'now' is one argument too many"),
    "text for a number": (["generate", "--temperature", "hot", "a"], "'hot' is not a number"),
    "text for a count": (["generate", "--n", "two", "a"], "'two' is not a whole number"),
    "a number for biases": (["generate", "--logit-bias", "5", "a"], "numbers by token id"),
    "bytes for biases": (["generate", "--logit-bias", "\udcff", "a"], "numbers by token id"),
    "no size": (["config", "show", "--kv-cache-memory-bytes", "8GBit"], "write 8GiB"),
    "not a number": (["generate", "--temperature", "nan", "a"], "temperature is nan"),
    "infinity": (["generate", "--top-p", "inf", "a"], "top_p is inf"),
    "out of range": (["generate", "--top-p", "1.5", "a"], "sampling.top_p"),
    "an empty stop": (["generate", "--stop", "", "a"], "an empty stop string"),
    "a block of nothing": (
        ["generate", "--block-size", "0", "a"],
        "cache.block_size: Expected `int` >= 1; it is 0",
    ),
    "two sizes": (
        ["config", "show", "--num-blocks", "8", "--kv-cache-memory-bytes", "1GiB"],
        "both given",
    ),
    "no prompt": (["generate"], "there is no prompt"),
    "an empty standard input": (["generate", "--prompts-file", "-"], "there is no prompt"),
    "no such prompts": (["generate", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
    "no such config": (["generate", "--config", "nowhere.toml", "a"], "nowhere.toml"),
    "no such folder": (
        ["bench", "latency", "--output-json", "nowhere/result.json"],
        "nowhere/result.json",
    ),
    "steps of two prompts": (["generate", "--show-steps", "a", "b"], "give one prompt"),
    "an empty batch": (["bench", "latency", "--batch-size", "0"], "--batch-size: it is 0"),
    "no iterations": (["bench", "latency", "--num-iters", "0"], "--num-iters"),
    "warming up backwards": (["bench", "throughput", "--num-warmups", "-1"], "--num-warmups"),
    "a file for random ids": (
        ["bench", "throughput", "--dataset-name", "random", "--dataset-path", "x"],
        "do not go together",
    ),
    "custom without a file": (
        ["bench", "throughput", "--dataset-name", "custom"],
        "needs a file",
    ),
    "pulling what is unknown": (["models", "pull", "gpt-5"], "smollm2-135m"),
}


@pytest.mark.parametrize(("args", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_in_one_line(refused, args, says):
    assert says in refused(*args, stdin="" if "-" in args else None)


def test_an_unknown_model_is_told_with_the_nearest_known(refused):
    assert "smollm2-135m" in refused("generate", "--model", "smollm2-130m", "a")


def test_a_prompt_that_never_fits_is_refused(refused):
    line = refused("generate", *TINY, "--num-blocks", 1, "--block-size", 4, "far too long")
    assert "raise cache.num_blocks" in line


@pytest.mark.parametrize("text", ["[cache\n", "[cache]\nblock_sise = 4\n", "x = 1\n"])
def test_a_malformed_config_file_is_named(refused, tmp_path, text):
    path = tmp_path / "engine.toml"
    path.write_text(text)
    assert str(path) in refused("config", "show", "--config", path)


@pytest.mark.parametrize(
    "line", ['{"prompt": 3}', '{"prompt": ', '{"text": "a"}', '{"prompt": null}']
)
def test_a_malformed_prompt_is_told_by_file_and_line(refused, tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    assert f"{path}:2" in refused("generate", "--prompts-file", path)


def test_a_fault_in_a_policy_is_pointed_at(cli):
    code, _, err = cli("config", "show", "--eviction", "sinks=4 + score=masss")
    assert code == 2
    first, expression, pointer = err.splitlines()
    assert first.startswith("pagedkv: error: ")
    assert expression[pointer.index("^") :].startswith("masss")


def test_debug_shows_the_traceback(cli):
    with pytest.raises(ConfigError):
        cli("config", "show", "--debug", "--block-size", "0")


@pytest.mark.parametrize(
    ("package", "extra"), [("rich", "progress"), ("torch", "torch"), ("transformers.x", "models")]
)
def test_a_missing_package_is_told_with_its_extra(refused, monkeypatch, package, extra):
    def run(args):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("pagedkv.cli.env.run", run)
    assert f"pip install 'pagedkv[{extra}]'" in refused("env")


def test_rich_is_missed_before_a_benchmark_runs(refused, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    for module in ("measure", "report"):
        monkeypatch.delitem(sys.modules, f"pagedkv.cli.{module}", raising=False)
        monkeypatch.delattr(pagedkv.cli, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "pagedkv[progress]" in refused("bench", "latency", *TINY)


def test_a_fault_of_ours_is_not_hidden(cli, monkeypatch):
    def run(args):
        raise ModuleNotFoundError("No module named 'pagedkv.nothing'", name="pagedkv.nothing")

    monkeypatch.setattr("pagedkv.cli.env.run", run)
    with pytest.raises(ModuleNotFoundError):
        cli("env")


def test_an_interrupt_exits_with_130(cli, monkeypatch):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedkv.cli.env.run", run)
    code, out, err = cli("env")
    assert (code, out) == (130, "")
    assert err.strip() == "pagedkv: interrupted"
