"""``pagedkv simulate --calibrate``: fit the cost model to this machine's own step times."""

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np

from pagedkv.cli.results import check_writable, write_result
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.core.request import SamplingParams
from pagedkv.sim.calibration import Fit, fit, stacked
from pagedkv.sim.cost import Accelerator, CostModel, ModelShape, StepWork, step_work

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM

__all__ = ["calibrate", "measure"]

_BLOCK = 16
_BATCHES = ((1, 64), (2, 192), (4, 448), (8, 96), (16, 320))  # sequences, tokens of each prompt
_STEPS = 12  # tokens that each batch decodes


class _Timed:
    """Carries out plans with another executor and notes how long each took."""

    def __init__(self, llm: "LLM") -> None:
        self._inner = llm.engine.executor
        self.steps: list[tuple[StepWork, float]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        result = self._inner.execute(plan)
        self.steps.append((step_work(plan, _BLOCK), time.perf_counter() - begin))
        return result


def measure(llm: "LLM") -> tuple[list[StepWork], list[float]]:
    """Serve batches of several sizes and return what each step did and the least time it took.

    Every batch is served three times; the least of equal steps is what the machine can do when
    nobody else uses it.
    """
    rng = np.random.default_rng(0)
    vocab = llm.config.model.vocab_size
    prompts = [rng.integers(0, vocab, (n, length)).tolist() for n, length in _BATCHES]
    params = SamplingParams(temperature=0.0, max_tokens=_STEPS, ignore_eos=True)
    runs = []
    for _ in range(3):
        timed = _Timed(llm)
        before, llm.engine.executor = llm.engine.executor, timed
        try:
            for batch in prompts:
                llm.scheduler.reset_prefix_cache()
                llm.generate(batch, params)
        finally:
            llm.engine.executor = before
        runs.append(timed.steps)
    seconds = np.min([[taken for _, taken in steps] for steps in runs], axis=0)
    return [work for work, _ in runs[0]], seconds.tolist()


def _start(llm: "LLM") -> CostModel:
    """Return the model's true sizes on a device of round numbers; the fit finds the rest."""
    model = llm.model.model
    parameters = float(sum(p.numel() for p in model.parameters()))
    geometry = llm.model.geometry
    config = model.config
    heads = int(getattr(config, "num_attention_heads", geometry.num_kv_heads))
    return CostModel(
        accelerator=Accelerator(flops=2e12, bandwidth=4e11, memory=64e9),
        shape=ModelShape(
            parameters=parameters,
            matmul_parameters=parameters,
            num_layers=geometry.num_layers,
            hidden_size=int(config.hidden_size),
            num_heads=heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            bytes_per_element=4,
        ),
        weight_efficiency=0.1,
        matmul_efficiency=0.1,
        kv_efficiency=0.1,
        attention_efficiency=0.1,
    )


def calibrate(args: argparse.Namespace) -> int:
    """Measure, fit, say how well it fits, and write the cost model if asked to."""
    from pagedkv.device.llm import LLM

    check_writable(args.cost_json)
    llm = LLM(args.model, block_size=_BLOCK, num_blocks=1024, max_num_seqs=16)
    works, seconds = measure(llm)
    found: Fit = fit(_start(llm), stacked(works), np.array(seconds))
    cost = found.cost
    print(
        f"{args.model}: {found.num_steps} steps, error {found.mean_error:.1%} on average, "
        f"{found.max_error:.1%} at most"
    )
    for name in ("weight_efficiency", "matmul_efficiency", "kv_efficiency", "attention_efficiency"):
        print(f"  {name:22} {getattr(cost, name):.4f}")
    print(f"  {'overhead':22} {cost.overhead * 1000:.3f} ms")
    if args.cost_json:
        write_result(cost, args.cost_json)
        print(f"written to {args.cost_json}; use it with --cost-json")
    return 0
