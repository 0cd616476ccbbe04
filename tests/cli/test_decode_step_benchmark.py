"""``benchmarks/decode_step.py`` in small: prompts that are not computed lead to the same step."""

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from pagedkv.device.models import load_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode_step.py"
SMALL = {"users": 3, "context": 200, "steps": 32, "seed": 0}


@pytest.mark.parametrize("eviction", ["full", "sinks=4 + budget=64"])
def test_prompts_that_are_not_computed_leave_the_tables_of_those_that_are(eviction):
    engine = runpy.run_path(str(SCRIPT))["engine"]
    loaded, options = load_model("tiny-random"), Namespace(**SMALL)
    llms = [engine(loaded, options, eviction, prefill=computed) for computed in (True, False)]
    assert all(llm.engine.executor.store is llm.store for llm in llms)
    assert all(llm.store.keys.isfinite().any() for llm in llms)
    computed, made_up = (llm.scheduler.schedule() for llm in llms)
    for name in ("block_table", "num_resident", "positions", "slot_mapping"):
        assert np.array_equal(getattr(computed, name), getattr(made_up, name))
    for pool in (llms[1].store.keys, llms[1].store.values):  # normal numbers throughout
        assert abs(pool.mean()) < 0.1
        assert abs(pool.std() - 1) < 0.1


def test_computing_prompts_is_for_budgets(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model=tiny-random", "--prefill"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--prefill says nothing without --budget" in capsys.readouterr().err


def test_a_budget_is_held_and_reported(monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    more = ["--model=tiny-random", "--budget=64", "--policy=h2o", "--threads=1", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *small, *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(path.read_text())
    (full, everything), (budget, kept) = (result["medians"][name] for name in ("full", "budget"))
    assert everything > 200
    assert 64 <= kept <= 96
    assert result["ratio"] == full / budget
    assert "tokens each" in capsys.readouterr().out
