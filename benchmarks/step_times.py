"""How well does the cost model fit the published step times? Fits the presets' efficiencies.

    python benchmarks/step_times.py [--json FILE]

The 40 points are whole-step times of vLLM on A100 and H100 for Llama-3.1 8B and 70B, from AI
Configurator's tables; `tests/sim/data/make_slices.py` says where they are from.
"""

import argparse
import csv
from pathlib import Path

import msgspec
import numpy as np

from pagedkv.cli.machine import versions
from pagedkv.sim.calibration import fit, stacked
from pagedkv.sim.cost import StepWork
from pagedkv.sim.presets import COSTS

TABLE = Path(__file__).parents[1] / "tests/sim/data/step_times.csv"


def points():
    """Return each preset's measured steps: their work and their seconds."""
    found = {}
    with TABLE.open() as text:
        for row in csv.DictReader(text):
            length, batch = int(row["length"]), int(row["batch"])
            if row["phase"] == "decode":  # one token each behind `length` others
                work = StepWork(
                    num_tokens=batch,
                    context_tokens=batch * (length + 1),
                    attention_pairs=batch * (length + 0.5),
                )
            else:
                work = StepWork(
                    num_tokens=batch * length,
                    context_tokens=batch * length,
                    attention_pairs=batch * length * length / 2,
                )
            works, seconds = found.setdefault(row["hardware"], ([], []))
            works.append(work)
            seconds.append(float(row["milliseconds"]) / 1000)
    return found


def main():
    """Print each preset's errors, shipped and fitted again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {"versions": versions(), "presets": {}}
    for name, (works, seconds) in points().items():
        work, measured = stacked(works), np.array(seconds)
        shipped = np.abs(COSTS[name].seconds(work) - measured) / measured
        best = fit(COSTS[name], work, measured)
        print(
            f"{name:16} shipped {shipped.mean():.2%} mean {shipped.max():.2%} max, "
            f"fitted again {best.mean_error:.2%} mean {best.max_error:.2%} max"
        )
        fields = ("weight_efficiency", "matmul_efficiency", "kv_efficiency")
        for field in (*fields, "attention_efficiency", "overhead"):
            print(f"    {field:22} {getattr(best.cost, field)}")
        result["presets"][name] = {
            "mean_error": float(shipped.mean()),
            "max_error": float(shipped.max()),
            "fit": msgspec.to_builtins(best),
        }
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))


if __name__ == "__main__":
    main()
