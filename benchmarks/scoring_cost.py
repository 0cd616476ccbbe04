"""What scoring costs: a decode step that feeds an eviction policy, beside one that does not.

    python benchmarks/scoring_cost.py
    python benchmarks/scoring_cost.py --model tiny-random --batch 2 --context 64 --steps 8

Two engines share the weights and hold the same sequences. One runs `full`, which observes nothing;
the other a policy that scores every block at every step and whose budget is never reached, so that
both attend to the same tokens and nothing but the scoring differs. They take turns step by step,
which of them first changing every step, and the ratio is taken within each pair: a busy machine
slows both. Reported are the median ratio with a 95 % bootstrap interval, of wall time and of CPU
time.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.cli.machine import machine, versions
from pagedkv.device.models import load_model

NEVER = 10**6  # tokens: a budget that no sequence here reaches


def main() -> None:
    """Print a line per policy, granularity, batch and context."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policies", default="h2o,peak,tova")
    parser.add_argument("--granularity", default="sequence,layer,head")
    parser.add_argument("--batch", default="1,8", help="sequences that decode together, by comma")
    parser.add_argument("--context", default="512", help="tokens of each before, by comma")
    parser.add_argument("--steps", type=int, default=48, help="pairs of decode steps to measure")
    parser.add_argument("--threads", type=int, help="torch threads; its own choice if omitted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_model(args.model, progress=False)
    facts = {"machine": machine(), "versions": versions(), "seed": args.seed, "model": args.model}
    where = f"{facts['machine']['cpu']}, {torch.get_num_threads()} threads"
    print(f"{where}, {args.model}, seed {args.seed}, pagedkv {facts['versions']['pagedkv']}")
    head = f"{'policy':<12}{'by':<10}{'batch':>6}{'context':>9}{'step ms':>9}"
    print(f"{head}  {'wall x (95 %)':<22}CPU x (95 %)")
    rows = []
    for granularity in args.granularity.split(","):
        for batch in map(int, args.batch.split(",")):
            for context in map(int, args.context.split(",")):
                for policy in args.policies.split(","):
                    row = measure(loaded, policy, granularity, batch, context, args)
                    rows.append(row)
                    print(line(row), flush=True)
    if args.json:
        args.json.write_bytes(msgspec.json.encode(facts | {"rows": rows}))


def measure(
    loaded: Any, policy: str, granularity: str, batch: int, context: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the median step and the ratios of scoring on to scoring off."""
    rng = np.random.default_rng(args.seed)
    vocab = loaded.geometry.vocab_size
    prompts = [rng.integers(0, vocab, context).tolist() for _ in range(batch)]
    warm = 4
    engines = []
    for eviction in ("full", f"{policy} + budget={NEVER}"):
        llm = LLM(
            loaded,
            granularity=granularity,
            max_num_seqs=batch,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=_pool_bytes(loaded, batch, context + args.steps + warm + 96),
            enable_prefix_caching=False,
        )
        params = SamplingParams(temperature=0, max_tokens=args.steps + warm + 64, ignore_eos=True)
        llm._add_all(prompts, params, eviction, streams=False)
        while llm.engine.step()[0].num_tokens != batch or len(llm.scheduler.table.running) < batch:
            pass
        engines.append(llm.engine)
    wall = np.zeros((args.steps + warm, 2))
    cpu = np.zeros_like(wall)
    for step in range(args.steps + warm):
        for which in (0, 1) if step % 2 else (1, 0):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            plan = engines[which].step()[0]
            wall[step, which] = time.perf_counter() - begin
            cpu[step, which] = time.process_time() - begin_cpu
            assert plan.num_tokens == batch
            assert bool(plan.observations) == bool(which)
    wall, cpu = wall[warm:], cpu[warm:]
    return {
        "policy": policy,
        "granularity": granularity,
        "batch": batch,
        "context": context,
        "step_ms": float(np.median(wall[:, 0]) * 1e3),
        "wall": ratio(wall, rng),
        "cpu": ratio(cpu, rng),
    }


def _pool_bytes(loaded: Any, batch: int, tokens: int) -> int:
    geometry = loaded.geometry
    per_token = 2 * 4 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
    return int(per_token * batch * (tokens + 16))


def ratio(seconds: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Return the median of the paired ratios and its 95 % bootstrap interval."""
    ratios = seconds[:, 1] / seconds[:, 0]
    draws = np.median(ratios[rng.integers(0, len(ratios), (1000, len(ratios)))], axis=1)
    return [float(np.median(ratios)), *np.percentile(draws, (2.5, 97.5)).tolist()]


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    wall, cpu = (
        f"{mid:.3f} ({low:.3f}, {high:.3f})" for mid, low, high in (row["wall"], row["cpu"])
    )
    return (
        f"{row['policy']:<12}{row['granularity']:<10}{row['batch']:>6}{row['context']:>9}"
        f"{row['step_ms']:>9.1f}  {wall}  {cpu}"
    )


if __name__ == "__main__":
    main()
