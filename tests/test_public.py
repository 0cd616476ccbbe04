"""The public names: all there, all importable, and cheap for those who need no torch."""

import ast
import inspect
import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pagedkv

HEAVY = {"torch", "xformers", "transformers", "numba", "tokenizers", "safetensors", "matplotlib"}


def names_assigned_in(path):
    """Public names that a module's top level defines or imports, `TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pagedkv"):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_the_public_names_are_sorted_as_the_linter_sorts_them():
    assert len(set(pagedkv.__all__)) == len(pagedkv.__all__)
    ordered = sorted(pagedkv.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert pagedkv.__all__ == ordered


def test_everything_imported_for_users_is_public():
    assert names_assigned_in(Path(pagedkv.__file__)) == set(pagedkv.__all__)


@pytest.mark.parametrize("name", pagedkv.__all__)
def test_a_public_name_can_be_imported_and_is_described(name):
    value = getattr(pagedkv, name)
    assert inspect.getdoc(value), f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        _ = pagedkv.LLMM


def test_a_name_whose_extra_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pagedkv.device.llm", None)
    with pytest.raises(ImportError, match=r"pip install 'pagedkv\[demo\]'"):
        _ = pagedkv.LLM


def modules_after(*statements):
    code = f"{'; '.join(statements)}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return {name.partition(".")[0] for name in json.loads(run.stdout)}


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import pagedkv") & HEAVY


def test_a_scheduler_serves_without_anything_heavy():
    loaded = modules_after(
        "import pagedkv as p",
        "s = p.Scheduler()",
        "s.add(p.Request(request_id='a', prompt_token_ids=[1]))",
        "s.commit(s.schedule(), p.StepResult(token_ids=[5]))",
        "assert s.stats().generation_tokens == 1",
    )
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_the_version_is_the_distributions():
    pyproject = (Path(pagedkv.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{pagedkv.__version__}"' in pyproject


@pytest.mark.parametrize("module", ["errors", "config", "core.plan", "core.request", "core.pool"])
def test_a_module_exports_only_what_it_defines(module):
    loaded = import_module(f"pagedkv.{module}")
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_every_error_is_of_the_tree_and_can_be_pickled():
    kinds = [k for k in vars(pagedkv.errors).values() if isinstance(k, type)]
    assert len(kinds) > 9
    for kind in kinds:
        assert issubclass(kind, pagedkv.PagedKVError)
        fault = kind("it is 0", where="a.b", remedy="give 1")
        again = pickle.loads(pickle.dumps(fault))
        assert type(again) is kind
        assert str(again) == str(fault) == "a.b: it is 0; give 1"
