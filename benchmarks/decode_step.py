"""Where does a decode step's time go, and what does a budget save at long contexts?

    python benchmarks/decode_step.py                        shares of a step, 32 users at 256 tokens
    python benchmarks/decode_step.py --budget 512 --users 16 --context 4096
    python benchmarks/decode_step.py --model tiny-random --users 4 --context 64 --steps 8

The first form times the parts of a step with clocks around the functions that do them, each less
what it calls. A clock costs about a microsecond, charged to whoever calls; there are some 700 a
step. Medians over steps. With `--budget` nothing but whole steps are timed: a full-cache engine and
one whose policy keeps that many tokens share the model and take turns, a step each.
"""

import argparse
import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.cli.machine import cores, machine, versions
from pagedkv.cli.results import check_writable, write_result
from pagedkv.core.request import Request
from pagedkv.core.scheduler import Scheduler
from pagedkv.device import executor, passes
from pagedkv.device.attention import PagedAttentionStep
from pagedkv.device.models import LoadedModel, load_model
from pagedkv.device.operators import CpuPagedOp
from pagedkv.device.passes import Pass
from pagedkv.device.store import KVStore
from pagedkv.eviction.language import format_policy, policy

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
    for module in loaded.model.modules():
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
    clocks.wrap(loaded.model, "forward", "residuals and calls between modules")
    clocks.wrap(CpuPagedOp, "apply", "attention")
    clocks.wrap(passes, "paged_attention", "xformers dispatch")
    clocks.wrap(KVStore, "write", "writing keys and values")
    clocks.wrap(Pass, "_show", "observing")
    clocks.wrap(Pass, "observed", "observing")
    clocks.wrap(Pass, "_bias", "input building")
    clocks.wrap(PagedAttentionStep, "__init__", "input building")
    clocks.wrap(executor.TorchExecutor, "execute", "input building")
    clocks.wrap(executor, "sample", "sampling")
    clocks.wrap(Scheduler, "schedule", "planning and commit")
    clocks.wrap(Scheduler, "commit", "planning and commit")


def engine(loaded: LoadedModel, options: argparse.Namespace, eviction: str) -> LLM:
    """Return an LLM whose users have all been prefilled to their context."""
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
    while True:
        plan, _, _ = llm.engine.step()
        if (np.diff(plan.query_start) == 1).sum() == options.users:
            break
    return llm


def timed_step(llm: LLM, users: int) -> float:
    """Take a decode step of all users; seconds."""
    begin = time.perf_counter()
    plan, _, _ = llm.engine.step()
    lasted = time.perf_counter() - begin
    assert plan.num_tokens == users, "not a decode step of all users"
    return lasted


def shares(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return each part's median milliseconds of a step."""
    llm = engine(loaded, options, options.policy or "full")
    plain = [timed_step(llm, options.users) for _ in range(options.steps // 2)]
    clocks = Clocks()
    attach(clocks, loaded)
    parts: dict[str, list[float]] = defaultdict(list)
    whole = []
    for _ in range(options.steps // 2):
        clocks.seconds.clear()
        whole.append(timed_step(llm, options.users))
        for part, seconds in clocks.seconds.items():
            parts[part].append(seconds)
    step = float(np.median(whole))
    medians = {part: float(np.median(seconds)) for part, seconds in parts.items()}
    for part, seconds in sorted(medians.items(), key=lambda pair: -pair[1]):
        print(f"  {part:38} {seconds * 1e3:8.2f} ms  {seconds / step:6.1%}")
    unclocked = float(np.median(plain))
    print(f"  step {step * 1e3:.1f} ms; {unclocked * 1e3:.1f} ms without clocks")
    return {"step": step, "unclocked_step": unclocked, "parts": medians}


def budgets(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return whole steps' median milliseconds with the full cache and with a budget."""
    kept = format_policy(policy(options.policy or "streaming", budget=options.budget))
    llms = {"full": engine(loaded, options, "full"), "budget": engine(loaded, options, kept)}
    times: dict[str, list[float]] = {name: [] for name in llms}
    for _ in range(options.steps):
        for name, llm in llms.items():
            times[name].append(timed_step(llm, options.users))
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    ratio = medians["full"] / medians["budget"]
    print(
        f"  full {medians['full'] * 1e3:.1f} ms, {kept} {medians['budget'] * 1e3:.1f} ms: "
        f"{ratio:.2f}x"
    )
    return {"policy": kept, "seconds": times, "medians": medians, "ratio": ratio}


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
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    options = parser.parse_args()
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
