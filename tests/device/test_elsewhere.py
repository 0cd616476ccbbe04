"""A step on another device, with no such device: one copy there, one answer back, no wait between.

What has to hold for CUDA and can be seen without it; `test_gpu.py` is for where there is one.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.device import observer, sampling, send
from pagedkv.device.dispatch import choose_operator
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.gathered import GatheredOp
from pagedkv.device.models import load_model
from pagedkv.device.splitk import SplitKPagedOp
from pagedkv.device.staging import Staging
from pagedkv.device.store import KVStore
from tests.device.elsewhere import NAME, Crossings, Launcher, fake_device, moved, unknown, zeros_for

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(3 + i, 30 + 9 * i)) for i in range(4)]


class Untold(Staging):
    """Sends sizes only: there is no memory there to copy numbers to."""

    def take(self, array: np.ndarray) -> torch.Tensor:
        self._used += array.nbytes
        return unknown(array)

    def _begin(self, capacity: int) -> None:
        self._host = torch.empty(1 << 20, dtype=torch.uint8)
        self._there = torch.empty(1 << 20, dtype=torch.uint8, device=NAME)


def kind(plan: StepPlan) -> tuple[bool, ...]:
    """What tells one step from another, for what it launches."""
    parts = (plan.turns is not None, plan.moves, plan.swap_out, plan.swap_in, plan.copies)
    counts = (part if isinstance(part, bool) else len(part) > 0 for part in parts)
    return (plan.num_tokens == len(plan.rows), len(plan.observations) > 0, *counts)


class Double:
    """Carries out plans here, for their tokens, and one of each kind there, for how it is done."""

    def __init__(self, llm: LLM, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored = stored
        self.kind = choose_operator("cuda", torch.float16, stored=stored, head_dim=32)
        self.here, self.mode, self.kernel = llm.engine.executor, fake_device(), Launcher()
        self.steps: list[tuple[StepPlan, Crossings, int]] = []
        monkeypatch.setattr(send, "_send", self.send_alone)
        for module in (observer, sampling):
            monkeypatch.setattr(module, "fetch", self.fetch)
        # Single slots are gathered, by another operator of the same kernel.
        by_slot = classmethod(lambda _: self.kernel.operator(GatheredOp))
        monkeypatch.setattr(SplitKPagedOp, "by_slot", by_slot)
        self.there, self.inside = self._build(llm), False
        llm.engine.executor = self

    def send_alone(self, _device: torch.device, array: np.ndarray) -> torch.Tensor:
        self.crossings.sent += 1
        return unknown(array)

    def fetch(self, tensor: torch.Tensor) -> np.ndarray:
        return zeros_for(tensor) if self.inside else tensor.detach().cpu().numpy()

    def _build(self, llm: LLM) -> TorchExecutor:
        cache = llm.config.cache
        network = copy.deepcopy(llm.model.model)
        with self.mode:
            moved(network)
            model = replace(llm.model, model=network)
            store = KVStore(
                model.geometry,
                llm.scheduler.manager.pool.num_blocks,
                cache.block_size,
                layout=llm.scheduler.layout,
                dtype=self.stored,
                device=NAME,
                num_cpu_blocks=cache.num_cpu_blocks,
            )
            return TorchExecutor(
                model,
                store,
                layout=llm.scheduler.layout,
                operator=self.kernel.operator(self.kind),
                transfer=Untold(torch.device(NAME)),
            )

    def execute(self, plan: StepPlan) -> StepResult:
        if all(kind(other) != kind(plan) for other, _, _ in self.steps):
            self._watch(plan)
        return self.here.execute(plan)

    def _watch(self, plan: StepPlan) -> None:
        before, self.inside = self.kernel.launches, True
        with self.mode, Crossings() as self.crossings:
            self.there.execute(plan)
        self.inside = False
        self.steps.append((plan, self.crossings, self.kernel.launches - before))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def run(
        params: SamplingParams = GREEDY, stored: torch.dtype = torch.float16, **fields: Any
    ) -> Double:
        sizes = {"block_size": 16, "num_blocks": 200}
        llm = LLM(load_model("tiny-random", progress=False), **sizes | fields)
        double = Double(llm, stored, monkeypatch)
        llm.generate(PROMPTS, params)
        assert double.steps
        return double

    return run


def test_a_greedy_step_sends_once_and_waits_once(run: Any) -> None:
    double = run()
    layers = len(double.there.layout.group_of)
    for plan, crossings, launches in double.steps:
        assert (crossings.sent, crossings.fetched) == (1, 1)
        decode = plan.num_tokens == len(plan.rows)
        assert launches == layers if decode else launches >= layers
    assert any(plan.num_tokens == len(plan.rows) == 4 for plan, _, _ in double.steps)


@pytest.mark.parametrize(
    ("eviction", "granularity"),
    [
        ("sinks=4 + recent=32 + budget=64 + chunk=16", "sequence"),
        ("h2o + budget=64 + chunk=16", "head"),
    ],
)
def test_policies_that_ask_for_masses_send_nothing_more(
    run: Any, eviction: str, granularity: str
) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    double = run(params, eviction=eviction, granularity=granularity, num_blocks=2000)
    assert any(plan.turns is not None for plan, _, _ in double.steps) or "h2o" in eviction
    for plan, crossings, _ in double.steps:
        assert crossings.sent == 1
        # The tokens; and of each policy what it saw of its blocks and of each one's last query.
        assert crossings.fetched <= 1 + 2 * len(plan.observations)


@pytest.mark.parametrize(
    "fields",
    [
        {"eviction": "score=lobo + budget=32 + chunk=16"},
        {"eviction": "score=key_diff + budget=32 + chunk=16"},
        {"eviction": "score=mean + budget=32 + chunk=16 + unit=token"},
        {"num_blocks": 11, "num_cpu_blocks": 20, "swap_cost": 0.0, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_everything_else_lies_where_it_is_launched(run: Any, fields: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    double = run(params, **fields)
    if "num_cpu_blocks" in fields:
        assert any(len(plan.swap_out) for plan, _, _ in double.steps)
        assert any(len(plan.swap_in) for plan, _, _ in double.steps)


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_packed_keys_and_values_are_packed_there(run: Any, stored: str) -> None:
    for _, crossings, launches in run(stored=getattr(torch, stored)).steps:
        assert (crossings.sent, crossings.fetched) == (1, 1)
        assert launches > 0


def test_forks_copy_blocks_there(run: Any) -> None:
    double = run(SamplingParams(n=2, temperature=0, max_tokens=20, ignore_eos=True))
    assert any(len(plan.copies) for plan, _, _ in double.steps)
