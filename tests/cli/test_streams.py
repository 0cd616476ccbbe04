"""Standard streams that are closed or take few characters, and an interrupt at the very start."""

import io
import json
import os
import subprocess
import sys

import pytest

from pagedkv.cli import main
from pagedkv.cli.machine import busy_cores

TINY = ("generate", "--model", "tiny-random", "--temperature", "0", "--max-tokens", "3")
BEYOND = "h\u00e9 \u65e5 \U0001f600"


def closed(name):
    """Run a program's arguments with a standard stream closed; its exit code and its errors."""

    def run(*args):
        code = (
            f"import os, sys; sys.{name} = None\n"
            "from pagedkv.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("args", [("config", "show"), ("env",), ("--help",), (*TINY, "hi")])
def test_nobody_needs_to_read_what_is_printed(args):
    assert closed("stdout")(*args)[0] == 0


@pytest.mark.parametrize("args", [TINY, (*TINY, "--prompts-file", "-")])
def test_standard_input_that_is_closed_holds_no_prompt(args):
    code, err = closed("stdin")(*args)
    assert code == 2
    assert err.startswith("pagedkv: error: generate: there is no prompt")
    assert err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        out = io.TextIOWrapper(raw, encoding=encoding)
        patch.setattr(sys, "stdout", out)
        assert main([*TINY, "--json", BEYOND]) == 0
        assert main([*TINY, BEYOND, "two"]) == 0
    out.flush()
    first, *text = raw.getvalue().decode(encoding).splitlines()
    assert json.loads(first)["prompt"] == BEYOND
    heading = BEYOND.encode(encoding, "replace").decode(encoding).partition(" ")[0]
    expected = {"ascii": "h\\u00e9", "latin-1": heading, "utf-8": heading}[encoding]
    assert text[0].startswith(f"[0] {expected} ")


def test_an_empty_trace_has_no_rates(cli):
    code, out, _ = cli("trace", "stats", os.devnull)
    assert code == 0
    assert "None" not in out
    assert [line.split()[-1] for line in out.splitlines() if "per second" in line] == ["-"]


@pytest.mark.parametrize(("busy", "threads", "told"), [(1.0, 2, True), (0.2, 2, False)])
def test_threads_that_find_no_idle_processor_are_told_of(
    cli, monkeypatch, capsys, busy, threads, told
):
    monkeypatch.setattr("pagedkv.cli.flags.busy_cores", lambda: busy)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    code, _, err = cli(*TINY, "hi")
    assert code == 0
    assert ("others keep 1.0 of 2 processors busy" in err) == told
    assert err.count("\n") == told


def test_who_else_computes_is_seen_where_the_system_tells():
    assert 0 <= busy_cores(0.02) <= os.cpu_count()


def test_an_interrupt_while_arguments_are_read_is_told_in_a_line(cli, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedkv.cli._parser", interrupted)
    assert cli("env") == (130, "", "\npagedkv: interrupted\n")


@pytest.mark.parametrize("verb", [("models", "list"), ("env",), ("trace", "stats", os.devnull)])
def test_every_verb_looks_for_variables_that_mean_nothing(refused, monkeypatch, verb):
    monkeypatch.setenv("PAGEDKV_CACHEDIR", "/somewhere")
    assert "PAGEDKV_CACHEDIR: no setting has this name" in refused(*verb)
