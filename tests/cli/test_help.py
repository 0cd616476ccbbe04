"""Help texts: complete, narrow, and shown without loading torch."""

import subprocess
import sys

import msgspec
import pytest

from pagedkv.cli import VERBS
from pagedkv.cli.flags import field_help
from pagedkv.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagedkv.core.request import SamplingParams

PAGES = [
    ("generate",),
    ("bench", "throughput"),
    ("bench", "latency"),
    ("eval", "perplexity"),
    ("eval", "copy"),
    ("eval", "passkey"),
    ("eval", "agreement"),
    ("simulate",),
    ("trace", "stats"),
    ("trace", "generate"),
    ("trace", "convert"),
    ("models",),
    ("models", "list"),
    ("models", "pull"),
    ("config", "show"),
    ("config", "schema"),
    ("env",),
]
STRUCTS = (ModelConfig, CacheConfig, SchedulerConfig, SamplingParams)


def flags_of(struct, *skip):
    names = [field.name for field in msgspec.structs.fields(struct)]
    return ["--" + name.replace("_", "-") for name in names if name not in skip]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_every_verb_is_listed(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n    {verb} " in out


def test_without_a_verb_the_help_is_shown(cli):
    assert cli() == cli("--help")


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
def test_a_page_has_a_description_examples_and_narrow_lines(cli, wide, page):
    code, out, _ = cli(*page, "--help")
    assert code == 0
    assert "examples:" in out
    assert out.count(f"  pagedkv {page[0]}") >= 2 or page == ("env",)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("page", [("generate",), ("bench", "throughput"), ("bench", "latency")])
def test_engine_and_sampling_flags_come_from_the_structs(cli, wide, page):
    out = cli(*page, "--help").out
    bench = ("max_tokens", "stop", "stop_token_ids", "ignore_eos") if page[0] == "bench" else ()
    expected = ["--max-model-len", *flags_of(CacheConfig)]
    expected += flags_of(SchedulerConfig)
    expected += flags_of(SamplingParams, *bench)
    for flag in expected:
        assert f"  {flag}" in out, flag


def test_defaults_are_shown_and_a_verbs_own_override_them(cli, wide):
    out = cli("generate", "--help").out
    assert "Tokens in one block [default: 16]" in out
    assert "[default: 128]" in out.partition("--max-tokens")[2].partition("--stop")[0]
    latency = cli("bench", "latency", "--help").out
    assert "[default: 0.0]" in latency.partition("--temperature")[2].partition("--top-p")[0]


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_field_is_documented(struct):
    assert set(field_help(struct)) == {field.name for field in msgspec.structs.fields(struct)}


def test_the_sections_are_those_that_have_flags():
    sections = {field.name for field in msgspec.structs.fields(EngineConfig)}
    assert sections == {struct.section for struct in STRUCTS} - {"sampling"}


@pytest.mark.parametrize(
    "args",
    [["--help"], ["config", "show"], ["config", "schema"], ["env", "--help"], ["models", "list"]],
    ids=" ".join,
)
def test_no_torch_is_loaded(args):
    code = (
        "import sys; from pagedkv.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numba', 'xformers', 'rich', 'matplotlib'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_it_is_a_module_that_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "pagedkv", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pagedkv ")
