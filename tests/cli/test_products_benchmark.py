"""``benchmarks/products.py`` in small: all contenders agree, and each is timed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "products.py"


def test_each_product_is_timed_once_they_agree(monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    small = ["--rows", "1", "5", "--shapes", "640x1536", "--rounds=1", "--threads=1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *small, f"--json={path}"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(path.read_text())["products"]
    assert [one["rows"] for one in found] == [1, 5]
    for one in found:
        assert set(one["ms"]) == {"torch", "plain", "packed"}
        assert min(one["ms"].values()) > 0


def test_a_product_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x @ weight.T + 1)
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), *["--rows=1", "--shapes=640x1536", "--rounds=1", "--threads=1"]]
    )
    with pytest.raises(AssertionError, match="not close"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
