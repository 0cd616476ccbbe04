"""``benchmarks/generate.py`` in small: it runs, agrees with transformers and writes its result."""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generate.py"


def test_both_scenarios_run_and_agree(monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    small = ["--model", "tiny-random", "--num-requests", "4", "--scale", "0.1", "--repeats", "2"]
    more = ["--batch-sizes", "2,4", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *small, *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(path.read_text())
    assert [one["scenario"] for one in result["results"]] == ["equal", "ragged"]
    for one in result["results"]:
        assert one["identical_sequences"] == 4
        assert len(one["ratios"]) == 2
        assert one["ratio"] > 0
    assert set(result["results"][1]["seconds"]) == {
        "pagedkv",
        "transformers, batch 2",
        "transformers, batch 4",
    }
    assert "pagedkv is" in capsys.readouterr().out
