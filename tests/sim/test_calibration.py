"""A fit finds the efficiencies that step times were made with, and says how well it fits."""

import msgspec
import numpy as np
import pytest

from pagedkv.sim.calibration import fit, stacked
from pagedkv.sim.cost import StepWork
from pagedkv.sim.presets import cost_preset

FITTED = ("weight_efficiency", "matmul_efficiency", "kv_efficiency", "attention_efficiency")


def works():
    """Steps in which each term leads once: few and many tokens, short and long contexts."""
    found = []
    for tokens in (1, 8, 64, 512, 2048):
        for context in (100, 4000, 40_000):
            chunk = tokens * context if tokens >= 64 else context
            found.append(
                StepWork(
                    num_tokens=tokens, context_tokens=context * 8, attention_pairs=float(chunk)
                )
            )
    return stacked(found)


def start():
    known = cost_preset("a100-llama3-8b")
    return msgspec.structs.replace(known, **dict.fromkeys(FITTED, 0.3), overhead=0.0)


@pytest.mark.parametrize(
    "known", [(0.9, 0.8, 0.7, 0.6, 0.004), (0.5, 0.4, 0.9, 0.3, 0.0), (0.7, 0.7, 0.3, 0.8, 0.02)]
)
def test_known_coefficients_are_found_again(known):
    truth = msgspec.structs.replace(
        start(), **dict(zip(FITTED, known[:4], strict=True)), overhead=known[4]
    )
    seconds = np.asarray(truth.seconds(works()))
    found = fit(start(), works(), seconds)
    assert found.num_steps == 15
    assert found.max_error < 0.005
    assert found.mean_error <= found.max_error
    for name in FITTED:
        assert getattr(found.cost, name) == pytest.approx(getattr(truth, name), rel=0.03), name
    assert found.cost.overhead == pytest.approx(known[4], rel=0.03, abs=4e-4)


def test_the_error_is_of_what_is_left_unexplained():
    seconds = np.asarray(cost_preset("a100-llama3-8b").seconds(works()))
    noise = np.where(np.arange(15) % 2, 1.1, 0.9)
    found = fit(start(), works(), seconds * noise)
    gap = np.abs(found.cost.seconds(works()) - seconds * noise) / (seconds * noise)
    assert found.mean_error == pytest.approx(gap.mean())
    assert found.max_error == pytest.approx(gap.max())
    assert 0.02 < found.mean_error < 0.11
