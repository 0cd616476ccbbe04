"""Where does a decode step's time go, and what does a budget save at long contexts?

    python benchmarks/decode_step.py                        shares of a step, 32 users at 256 tokens
    python benchmarks/decode_step.py --budget 512 --users 16 --context 4096
    python benchmarks/decode_step.py --model tiny-random --users 4 --context 64 --steps 8

The first form times the parts of a step with clocks around the functions that do them, each less
what it calls. A clock costs about a microsecond, charged to whoever calls; there are hundreds a
step. Medians over steps. With `--budget` nothing but whole steps are timed: a full-cache engine and
one whose policy keeps that many tokens share the model and take turns, a step each.

Prompts of 16 times 4,096 tokens take minutes to compute, and what a decode step costs afterwards
does not depend on what keys and values say. So with `--budget` the prompts are scheduled and
committed but not computed: the scheduler's own plans, evictions and block tables, answered with
made-up tokens and, where a policy scores by attention, the simulator's synthetic masses; then all
blocks are filled with normal numbers. The decode steps are real. `--prefill` computes the prompts.
"""

import argparse
import time
from collections import Counter, defaultdict
from typing import Any

import msgspec
import numpy as np
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.cli.machine import cores, machine, versions
from pagedkv.cli.results import check_writable, write_result
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.core.request import Request
from pagedkv.core.scheduler import Scheduler
from pagedkv.device import executor, passes
from pagedkv.device.attention import PagedAttentionStep
from pagedkv.device.cpu import layer as native_layer
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import load_model
from pagedkv.device.operators import CpuPagedOp
from pagedkv.device.passes import Pass
from pagedkv.device.store import KVStore
from pagedkv.eviction.language import format_policy, policy
from pagedkv.sim.executor import CostExecutor
from pagedkv.sim.presets import cost_preset

BLOCK = 16
STEP_TOKENS = 2048


class Clocks:
    """Exclusive seconds by part, of functions that were wrapped."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Put a clock around a function, method or class method, for good."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                lasted = time.perf_counter() - begin
                self.seconds[part] += lasted - self._inner.pop()
                if self._inner:
                    self._inner[-1] += lasted

        bound = isinstance(vars(owner).get(name), classmethod)
        setattr(owner, name, staticmethod(timed) if bound else timed)


def attach(clocks: Clocks, loaded: LoadedModel) -> None:
    """Put clocks around everything that a decode step is made of."""
    # Layers that native code does have one clock around its calls: see device/layers.py. One on a
    # module of theirs would have the modules called.
    layers = [m for m in loaded.model.modules() if hasattr(m, "pagedkv_native")]
    inside = {id(part) for layer in layers for part in layer.modules()}
    for module in loaded.model.modules():
        if id(module) in inside:
            continue
        kind = type(module).__name__
        if isinstance(module, torch.nn.Linear):
            clocks.wrap(module, "forward", "model matmuls")
        elif "Norm" in kind:
            clocks.wrap(module, "forward", "norms")
        elif kind.endswith("Embedding"):
            clocks.wrap(module, "forward", "embedding and rotary tables")
        elif kind.endswith("MLP"):
            clocks.wrap(module, "forward", "activation")
        elif kind.endswith("Attention"):
            clocks.wrap(module, "forward", "rotary and layout in attention")
    for name in ("before", "after"):
        clocks.wrap(native_layer.Layer, name, "model matmuls, and norms, rotary, gates natively")
    clocks.wrap(loaded.model, "forward", "residuals and calls between modules")
    clocks.wrap(CpuPagedOp, "apply", "attention")
    clocks.wrap(passes, "paged_attention", "xformers dispatch")
    clocks.wrap(KVStore, "write", "writing keys and values")
    clocks.wrap(Pass, "_show", "observing")
    clocks.wrap(Pass, "observed", "observing")
    clocks.wrap(Pass, "_by_layer", "input building")
    clocks.wrap(PagedAttentionStep, "__init__", "input building")
    clocks.wrap(executor.TorchExecutor, "execute", "input building")
    clocks.wrap(executor, "sample", "sampling")
    clocks.wrap(Scheduler, "schedule", "planning and commit")
    clocks.wrap(Scheduler, "commit", "planning and commit")


class Unread(CostExecutor):
    """Answers plans and computes nothing: prompts that nobody is going to read."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(cost_preset("a100-llama3-8b"), BLOCK)  # its clock is not looked at
        self.vocab_size = llm.config.model.vocab_size

    def execute(self, plan: StepPlan) -> StepResult:
        """Draw some token of the vocabulary for each sample."""
        result = super().execute(plan)
        return msgspec.structs.replace(result, token_ids=result.token_ids % self.vocab_size)


def engine(
    loaded: LoadedModel, options: argparse.Namespace, eviction: str, *, prefill: bool
) -> LLM:
    """Return an LLM whose users have all been prefilled to their context.

    Args:
        prefill: Compute the prompts; else their keys and values are normal numbers.
    """
    # Who is prefilled first decodes while the others still are.
    most = options.steps + 2 * -(-options.users * options.context // STEP_TOKENS) + 8
    llm = LLM(
        loaded,
        num_blocks=options.users * (-(-(options.context + most) // BLOCK) + 2),
        block_size=BLOCK,
        max_num_seqs=options.users,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
        eviction=eviction,
    )
    rng = np.random.default_rng(options.seed)
    prompts = rng.integers(0, llm.config.model.vocab_size, (options.users, options.context))
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    for i, prompt in enumerate(prompts.tolist()):
        request = Request(request_id=str(i), prompt_token_ids=prompt, sampling=params)
        llm.scheduler.add(request)
    real = llm.engine.executor
    if not prefill:
        llm.engine.executor = Unread(llm)
        generator = torch.Generator().manual_seed(options.seed)
        for pool in (*llm.store.keys, *llm.store.values):
            pool.normal_(generator=generator)
    while True:
        plan, _, _ = llm.engine.step()
        if (np.diff(plan.query_start) == 1).sum() == options.users:
            break
    llm.engine.executor = real
    return llm


def timed_step(llm: LLM, users: int) -> tuple[float, float]:
    """Take a decode step of all users; seconds, and the mean of what each one's tables hold."""
    begin = time.perf_counter()
    plan, _, _ = llm.engine.step()
    lasted = time.perf_counter() - begin
    assert plan.num_tokens == users, "not a decode step of all users"
    return lasted, float(plan.num_resident.mean())


def shares(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return each part's median milliseconds of a step."""
    llm = engine(loaded, options, options.policy or "full", prefill=True)
    plain = [timed_step(llm, options.users)[0] for _ in range(options.steps // 2)]
    clocks = Clocks()
    attach(clocks, loaded)
    parts: dict[str, list[float]] = defaultdict(list)
    whole = []
    for _ in range(options.steps // 2):
        clocks.seconds.clear()
        whole.append(timed_step(llm, options.users)[0])
        for part, seconds in clocks.seconds.items():
            parts[part].append(seconds)
    step = float(np.median(whole))
    medians = {part: float(np.median(seconds)) for part, seconds in parts.items()}
    for part, seconds in sorted(medians.items(), key=lambda pair: -pair[1]):
        print(f"  {part:50} {seconds * 1e3:8.2f} ms  {seconds / step:6.1%}")
    unclocked = float(np.median(plain))
    print(f"  step {step * 1e3:.1f} ms; {unclocked * 1e3:.1f} ms without clocks")
    return {"step": step, "unclocked_step": unclocked, "parts": medians}


def budgets(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return whole steps' median milliseconds with the full cache and with a budget."""
    kept = format_policy(policy(options.policy or "streaming", budget=options.budget))
    policies = {"full": "full", "budget": kept}
    llms = {
        name: engine(loaded, options, eviction, prefill=options.prefill)
        for name, eviction in policies.items()
    }
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in llms}
    for _ in range(options.steps):
        for name, llm in llms.items():
            steps[name].append(timed_step(llm, options.users))
    median = {name: np.median(taken, axis=0).tolist() for name, taken in steps.items()}
    for name, (seconds, tokens) in median.items():
        print(f"  {policies[name]:48} {seconds * 1e3:7.1f} ms, {tokens:.0f} tokens each")
    ratio = median["full"][0] / median["budget"][0]
    print(f"  {ratio:.2f}x")
    return {"policy": kept, "steps": steps, "medians": median, "ratio": ratio}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--users", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--context", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--pack-weights", default="none", help="as LLM's")
    parser.add_argument("--policy", help="default: full; streaming with --budget")
    parser.add_argument("--budget", type=int, help="compare the full cache with this many tokens")
    parser.add_argument("--prefill", action="store_true", help="compute the prompts of --budget")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    options = parser.parse_args()
    if options.prefill and not options.budget:
        parser.error("--prefill says nothing without --budget: prompts are computed anyway")
    check_writable(options.json)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, pack_weights=options.pack_weights, progress=False)
    host = machine()
    print(f"{host['cpu']}, {options.threads} threads, seed {options.seed}")
    print(", ".join(f"{name} {text}" for name, text in versions().items() if text))
    print(f"{options.model}, {options.users} users at {options.context} tokens")
    found = budgets(loaded, options) if options.budget else shares(loaded, options)
    settings = vars(options) | {"schema_version": 1, "versions": versions(), "machine": host}
    write_result(settings | found, options.json)


if __name__ == "__main__":
    main()
