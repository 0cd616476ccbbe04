"""The verbs that only show: models, config, env."""

import json
import sys
import tomllib

import pytest


def test_models_list(cli):
    code, out, err = cli("models", "list")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[:2] == ["NAME", "DOWNLOAD"]
    assert "smollm2-135m" in out
    assert max(map(len, out.splitlines())) <= 100


def test_models_list_as_json(cli):
    rows = json.loads(cli("models", "list", "--json").out)
    assert {"name", "licence", "download_bytes", "cached"} <= rows[0].keys()


def test_models_pull_prints_the_path(cli, monkeypatch, tmp_path):
    asked = []

    def pull(name, **options):
        asked.append((name, options["verify"]))
        return tmp_path

    monkeypatch.setattr("pagedkv.device.weights.pull", pull)
    assert cli("models", "pull", "smollm2-135m", "--verify").lines == [str(tmp_path)]
    assert asked == [("smollm2-135m", True)]


def test_config_show_is_toml_with_origins(cli, monkeypatch, tmp_path):
    path = tmp_path / "engine.toml"
    path.write_text("[scheduler]\nmax_num_seqs = 7\n")
    out = cli("config", "show", "--config", path, "--block-size", "32").out
    shown = tomllib.loads(out)
    assert shown["cache"]["block_size"] == 32
    assert "block_size = 32  # --block-size\n" in out
    assert f"max_num_seqs = 7  # {path}\n" in out
    assert "watermark = 0.0\n" in out
    assert "# num_blocks is not set\n" in out


def test_config_show_names_the_variable(cli, monkeypatch):
    monkeypatch.setenv("PAGEDKV_CACHE__NUM_BLOCKS", "99")
    assert "num_blocks = 99  # PAGEDKV_CACHE__NUM_BLOCKS\n" in cli("config", "show").out


def test_config_schema_is_json_schema(cli):
    schema = json.loads(cli("config", "schema").out)
    assert schema["$defs"]["CacheConfig"]["properties"]["block_size"]["maximum"] == 256


def test_env_shows_versions_machine_and_operator(cli):
    code, out, _ = cli("env")
    assert code == 0
    for word in (
        "pagedkv ",
        "python ",
        "torch ",
        "processor ",
        "memory ",
        "threads ",
        "pagedkv_cpu",
        "pagedkv_splitk",
        "pagedkv_gathered",
    ):
        assert word in out, word
    assert max(map(len, out.splitlines())) <= 120


def test_env_as_json(cli):
    facts = json.loads(cli("env", "--json").out)
    assert set(facts) == {"versions", "machine", "attention", "model_cache", "variables"}
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["threads"]["torch"] >= 1
    assert facts["attention"]["float32"].startswith("pagedkv_cpu, ")
    operators = {each["name"]: each for each in facts["attention"]["operators"]}
    assert operators["pagedkv_cpu"]["here"] == "yes"
    if facts["attention"]["cuda"] is None:
        assert operators["pagedkv_splitk"]["here"] == "no: torch sees no GPU"
    assert "multiples of 16" in operators["pagedkv_splitk"]["takes"]


def test_env_says_what_is_lacking(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "pagedkv.device.dispatch", None)
    code, out, _ = cli("env")
    assert code == 0
    assert "pip install 'pagedkv[torch]'" in out


@pytest.mark.slow
def test_env_compiles_the_kernels(cli):
    facts = json.loads(cli("env", "--json", "--compile").out)
    assert "kernel ready after" in facts["attention"]["float32"]
