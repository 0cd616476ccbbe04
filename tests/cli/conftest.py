"""The command line as a function: arguments in; exit code, output and errors out."""

import io
import os
import sys
from typing import NamedTuple

import pytest

from pagedkv.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self):
        return self.out.splitlines()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are slower on many threads, and far slower where other processes run."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PAGEDKV_")]:
        if name != "PAGEDKV_CACHE_DIR":
            monkeypatch.delenv(name)

    def run(*args, stdin=None):
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        code = main(list(map(str, args)))
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def refused(cli):
    """Run what must be refused; return the one line it says."""

    def run(*args, **options):
        code, out, err = cli(*args, **options)
        assert code == 2
        assert out == ""
        assert err.startswith("pagedkv: error: ")
        assert err.count("\n") == 1, err
        return err

    return run
