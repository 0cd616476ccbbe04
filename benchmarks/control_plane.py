"""What the control plane costs: scheduler steps, block operations, hashing, memory.

    python benchmarks/control_plane.py
    python benchmarks/control_plane.py --running 16,512 --steps 32 --tables sequence
    python benchmarks/control_plane.py --vllm-python ENV/bin/python
    python benchmarks/control_plane.py --against OTHER_CHECKOUT

A step is `schedule` and `commit` while every sequence decodes; prompts are of staggered length, so
that each step some of them cross a block boundary, take a block, seal one and hash it. What a
device would do is left out. CPU time of the thread is what to compare on a busy machine; wall time
stands beside it. With --against, another checkout of the package times the same steps, a few after
each few of ours, and the ratio stands at the end of the line. With --vllm-python, vLLM's own
scheduler is driven over the same prompts in the same run, by the Python of another environment
(`vllm_steps.py`); without, that is said.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pagedkv import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    Request,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    StepPlan,
    StepResult,
)
from pagedkv.cli.machine import machine, versions
from pagedkv.core.arrays import Int32
from pagedkv.core.plan import Observed
from pagedkv.core.pool import BlockPool
from pagedkv.core.prefix import PrefixIndex, extend_chain
from pagedkv.core.table import ENTRY_COLUMNS

PROMPT = 64
BURST = 4  # steps of one checkout before another has its turn
SHAPES = {"sequence": (1, 1), "layer": (30, 1), "head": (30, 3)}
POLICIES = {
    "full": "full",
    "streaming": "streaming",
    "h2o": "h2o",
    # Half the budget: each sequence gives up a block at each of its boundaries.
    "streaming, evicting": "sinks=4 + budget=256",
    "h2o, evicting": "recent=0.5 + score=sum + budget=256 + gqa=sum",
}


def scheduler(running: int, steps: int, seed: int, **options: Any) -> Scheduler:
    """Return a scheduler with requests for so many sequences that decode for so many steps."""
    shape, policy = options.get("tables", "sequence"), options.get("policy", "full")
    prompt, size = options.get("prompt", PROMPT), 16
    layers, heads = SHAPES[shape]
    groups = {"sequence": 1, "layer": layers, "head": layers * heads}[shape]
    blocks = running * groups * ((prompt + size + steps) // size + 2)
    config = EngineConfig(
        model=ModelConfig(
            max_model_len=100_000, vocab_size=32_000, num_layers=layers, num_kv_heads=heads
        ),
        cache=CacheConfig(block_size=size, num_blocks=blocks, granularity=shape, eviction=policy),
        scheduler=SchedulerConfig(
            max_num_seqs=running,
            max_num_batched_tokens=max(2048, running * (prompt + size)),
        ),
    )
    made, rng = Scheduler(config), np.random.default_rng(seed)
    params = SamplingParams(max_tokens=100_000 - prompt - size, ignore_eos=True)
    for i in range(running):
        ids = rng.integers(0, 32_000, prompt + i % size)
        made.add(Request(request_id=str(i), prompt_token_ids=ids, sampling=params))
    return made


def answer(plan: StepPlan, noise: np.random.Generator) -> StepResult:
    """Return what a device would: a token per sample, and masses."""
    observed = []
    for each in plan.observations:
        shape = (len(plan.block_table), len(each.members), each.width)
        values = noise.random(shape, np.float32)
        observed.append(Observed(values=values, mass=values.copy()))
    return StepResult(token_ids=np.full(len(plan.sample_rows), 7, np.int32), observed=observed)


def timed_steps(
    running: int, steps: int, seed: int, **options: Any
) -> Iterator[tuple[float, float]]:
    """Yield what each step takes in which all sequences decode: seconds of wall and of CPU."""
    sched, noise = scheduler(running, steps, seed, **options), np.random.default_rng(seed)
    while True:
        plan = sched.schedule()
        sched.commit(plan, answer(plan, noise))
        if plan.num_tokens == len(plan.sample_rows) == running:
            break
    gc.collect()
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.thread_time()
        plan = sched.schedule()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        result = answer(plan, noise)
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        sched.commit(plan, result)
        assert plan.num_tokens == running
        yield wall + time.perf_counter() - begin, cpu + time.thread_time() - begin_cpu


def step_times(
    running: int, steps: int, seed: int, checkout: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Time so many steps; if another checkout is given, a few by it after each few of ours."""
    ours, times = timed_steps(running, steps, seed, **options), []
    other = checkout and Other(checkout, running, steps, seed, **options)
    before: list[float] = []
    while burst := list(itertools.islice(ours, BURST)):
        times += burst
        if other:
            before += other.time(len(burst))
    if other:
        other.close()
    wall, cpu = np.array(times).T.tolist()
    return {"running": running, **options, "wall": wall, "cpu": cpu, "before": before}


def pool_costs(num_blocks: int, batch: int, rounds: int) -> dict[str, float]:
    """Microseconds of CPU per block: take and free blank ones, and reclaim cached ones."""
    blank, pool = np.zeros(batch, np.bool_), BlockPool(num_blocks)
    begin = time.thread_time()
    for _ in range(rounds):
        pool.release(pool.allocate(batch), blank)
    allocate_free = time.thread_time() - begin
    index, reclaim = PrefixIndex(num_blocks), 0.0
    fills = max(1, batch * rounds // num_blocks)
    for _ in range(fills):
        ids = pool.allocate(num_blocks)
        index.insert_many([os.urandom(16) for _ in range(num_blocks)], ids[:, None])
        pool.release(ids, ~np.zeros(num_blocks, np.bool_))
        begin = time.thread_time()
        taken = [_reclaim(pool, index, batch) for _ in range(num_blocks // batch)]
        for ids in taken:
            pool.release(ids, blank)
        reclaim += time.thread_time() - begin
    return {
        "num_blocks": num_blocks,
        "allocate_free": allocate_free / rounds / batch * 1e6,
        "reclaim_free": reclaim / fills / num_blocks * 1e6,
    }


def _reclaim(pool: BlockPool, index: PrefixIndex, count: int) -> Int32:
    ids = pool.allocate(count)
    index.remove(ids[index.findable(ids)])
    return ids


def hash_cost(tokens: int, seed: int) -> float:
    """Microseconds of CPU to hash one block of 16 tokens of a prompt."""
    ids = np.random.default_rng(seed).integers(0, 32_000, tokens).astype(np.int32)
    hashes: list[bytes] = []
    begin = time.thread_time()
    extend_chain(hashes, ids, tokens // 16, 16, "")
    return (time.thread_time() - begin) / len(hashes) * 1e6


def memory(running: int, steps: int, seed: int) -> dict[str, float]:
    """Bytes of the control plane's arrays per pool block, findable or not, and per table entry."""
    sched = scheduler(running, steps, seed)
    plan = sched.schedule()
    sched.commit(plan, answer(plan, np.random.default_rng(seed)))
    for i in range(running):
        sched.abort(str(i))
    pool, index, table = sched.manager.pool, sched.manager.index, sched.table
    columns = (value for owner in (pool, pool.cached, index) for value in vars(owner).values())
    arrays = {id(value): value for value in columns if isinstance(value, np.ndarray)}
    held = [*arrays.values(), *(line.ids for line in pool.cached._lines.values())]
    return {
        "per_block": sum(array.nbytes for array in held) / pool.num_blocks,
        "per_entry": float(sum(getattr(table, name).itemsize for name in ENTRY_COLUMNS)),
    }


def vllm(python: str, args: argparse.Namespace) -> dict[str, Any]:
    """Drive vLLM's scheduler in its own environment."""
    script = Path(__file__).with_name("vllm_steps.py")
    running = ",".join(str(n) for n in args.running if n <= args.vllm_most)
    command = [python, str(script), "--running", running, "--steps", str(args.steps)]
    done = subprocess.run(
        [*command, "--prompt", str(PROMPT), "--seed", str(args.seed)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if done.returncode:
        raise SystemExit(f"{python} cannot run vllm_steps.py:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Other:
    """The same steps by another checkout's package, in a process that waits between calls."""

    CODE = """
import itertools, json, sys, control_plane as c
n, steps, seed, options = json.loads(sys.argv[1])
timed = c.timed_steps(n, steps, seed, **options)
for count in map(int, sys.stdin):
    print(json.dumps([cpu for _, cpu in itertools.islice(timed, count)]), flush=True)
"""

    def __init__(self, checkout: Path, running: int, steps: int, seed: int, **options: Any) -> None:
        path = os.pathsep.join([str(checkout.resolve()), str(Path(__file__).resolve().parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, json.dumps([running, steps, seed, options])],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def time(self, count: int) -> list[float]:
        """Return the CPU seconds of the next steps."""
        assert self._process.stdin
        assert self._process.stdout
        print(count, file=self._process.stdin, flush=True)
        found: list[float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


def line(name: str, found: dict[str, Any]) -> str:
    """Return a row of the table of steps."""
    wall, cpu = np.array(found["wall"]) * 1e6, np.array(found["cpu"]) * 1e6
    share = np.median(cpu) / found["running"]
    return (
        f"{name:38s} {np.median(wall):9.0f} {np.median(cpu):9.0f} {np.percentile(cpu, 99):9.0f} "
        f"{share:9.2f}"
    )


def goals(
    steps: list[dict[str, Any]],
    pools: list[dict[str, float]],
    hashing: float,
    held: dict[str, float],
    other: dict[str, Any] | None,
) -> Iterator[tuple[str, str]]:
    """Yield each goal with what this run measured for it, if it measured that."""
    ours = {(each["running"], each.get("tables")): np.median(each["cpu"]) * 1e6 for each in steps}
    theirs = {
        each["running"]: np.median(each["cpu"]) * 1e6 for each in (other or {}).get("steps", ())
    }
    for running, share in ((512, 20), (16, 1)):
        if running in theirs and (running, None) in ours:
            ratio = theirs[running] / ours[running, None]
            yield f"{running} sequences: at most 1/{share} of vLLM's step", f"1/{ratio:.1f}"
    if (4096, None) in ours:
        yield "4,096 sequences: under 3,000", f"{ours[4096, None]:.0f}"
    if {(512, None), (8192, None)} <= ours.keys():
        few, many = ours[512, None] / 512, ours[8192, None] / 8192
        yield "per sequence, less at 8,192 than at 512", f"{few:.2f} -> {many:.2f}"
    for each in steps:
        if each.get("tables") in ("layer", "head"):
            goal = f"256 sequences, one table per {each['tables']}, {each['policy']}: under 2,000"
            yield goal, f"{np.median(each['cpu']) * 1e6:.0f}"
    for name in ("allocate_free", "reclaim_free"):
        if other:
            ratio = other["pool"][name] / pools[0][name]
            yield f"{name.replace('_', ' + ')} per block: at most 1/5 of vLLM's", f"1/{ratio:.1f}"
        ratio = pools[1][name] / pools[0][name]
        yield (
            f"{name.replace('_', ' + ')}, pool of 1,000,000 beside 10,000: no more",
            f"x{ratio:.2f}",
        )
    yield "hash of 16 tokens: under 1.5", f"{hashing:.2f}"
    yield "bytes per pool block, findable or not: at most 40", f"{held['per_block']:.1f}"
    yield "bytes per block-table entry: at most 24", f"{held['per_entry']:.0f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--running", default="16,512,4096,8192", help="sequences, by comma")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tables", default="sequence,layer,head", help="tables, by comma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm-python", metavar="FILE", help="Python that can import vLLM")
    parser.add_argument("--vllm-most", type=int, default=512, help="sequences to drive vLLM with")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there as well")
    parser.add_argument("--against", metavar="DIR", type=Path, help="another checkout to time")
    args = parser.parse_args()
    args.running = [int(n) for n in args.running.split(",")]
    facts = {"machine": machine(), "versions": versions(), "seed": args.seed, "steps": args.steps}
    used = ", ".join(f"{k} {facts['versions'][k]}" for k in ("pagedkv", "python", "numpy"))
    print(f"On {facts['machine']['cpu']}, seed {args.seed}; {used}.\n")
    print(
        f"{'step, microseconds':38s} {'wall p50':>9s} {'CPU p50':>9s} {'CPU p99':>9s} "
        f"{'per seq':>9s}"
    )
    cases: list[tuple[str, int, dict[str, Any]]]
    cases = [(f"{n} sequences", n, {}) for n in args.running]
    for shape in args.tables.split(","):
        for name, policy in POLICIES.items() if shape != "sequence" else ():
            options = {"tables": shape, "policy": policy, "prompt": 256}
            cases.append((f"256 x one per {shape}, {name}", 256, options))
    steps = []
    for name, n, options in cases:
        steps.append(step_times(n, args.steps, args.seed, args.against, **options))
        end = ""
        if args.against:
            before = np.median(steps[-1]["before"])
            end = f"   before {before * 1e6:6.0f}, x{before / np.median(steps[-1]['cpu']):.2f}"
        print(line(name, steps[-1]) + end, flush=True)
    other = vllm(args.vllm_python, args) if args.vllm_python else None
    for each in other["steps"] if other else ():
        print(line(f"vLLM {other['version']}, {each['running']} sequences", each))
    pools = [pool_costs(n, 1000, 200) for n in (10_000, 1_000_000)]
    print("\nCPU microseconds per block, in batches of 1,000")
    for each in pools:
        print(
            f"  pool of {each['num_blocks']:9,d}: allocate + free {each['allocate_free']:.3f}, "
            f"reclaim + free {each['reclaim_free']:.3f}"
        )
    hashing = hash_cost(32_000, args.seed)
    print(f"  hash of 16 tokens: {hashing:.2f}")
    if other:
        print(
            f"  vLLM: allocate + free {other['pool']['allocate_free']:.3f}, "
            f"reclaim + free {other['pool']['reclaim_free']:.3f}, hash {other['hash']:.2f}"
        )
    else:
        print("\nvLLM was not driven: give --vllm-python the Python of an environment that has it.")
    held = memory(512, args.steps, args.seed)
    print(
        f"\nBytes: {held['per_block']:.1f} per pool block, {held['per_entry']:.0f} per block-table "
        "entry."
    )
    print("\nGoal, and what was measured (CPU p50 of steps, microseconds)")
    for goal, measured in goals(steps, pools, hashing, held, other):
        print(f"  {goal:78s} {measured}")
    if args.json:
        found = {"step": steps, "pool": pools, "hash": hashing, "memory": held, "vllm": other}
        args.json.write_bytes(msgspec.json.encode(facts | found))


if __name__ == "__main__":
    main()
