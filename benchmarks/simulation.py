"""How fast is the simulator, and how true? Speed, memory, published curves, a real vLLM run.

    python benchmarks/simulation.py speed          # 4,000 requests, one A100, leaps on and off
    python benchmarks/simulation.py memory --requests 100000
    python benchmarks/simulation.py real           # beside vLLM 0.19 on an RTX 4090
    python benchmarks/simulation.py agent          # the tool-agent generator beside its trace
    PAGEDKV_TRACES=DIR python benchmarks/simulation.py speed replay conversation weka servegen

DIR holds the public traces as published: mooncake/conversation_trace.jsonl,
azure2023/AzureLLMInferenceTrace_conv.csv, weka_agentic/requests_rle.jsonl.gz,
servegen/language_m-small.tar.gz. Without it `speed` draws log-normal lengths of the Azure trace's
means. `--json FILE` keeps the numbers; a small version: `speed --requests 200`.
"""

import argparse
import csv
import os
import resource
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

import pagedkv
from pagedkv import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagedkv.cli.machine import machine, versions
from pagedkv.sim.generators import Lengths, random_requests, tool_agent
from pagedkv.sim.readers import read_trace
from pagedkv.sim.replay import ORDERS, replay
from pagedkv.sim.traces import trace_stats, write_trace
from pagedkv.sim.workload import Workload

DATA = Path(__file__).parents[1] / "tests/sim/data"
TRACES = Path(os.environ["PAGEDKV_TRACES"]) if "PAGEDKV_TRACES" in os.environ else None
RATE = 6.45
AGENT_LRU = {0.01: 0.346, 0.05: 0.449, 0.1: 0.508, 0.25: 0.551, 0.5: 0.552}


def engine(block_size=16, num_blocks=None):
    """Return the configuration of one replica."""
    return EngineConfig(
        model=ModelConfig(max_model_len=131_072),
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048),
    )


def timed(run):
    """Return what a call gave, and its wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def trace(path, format, **options):
    """Return a whole trace's workload."""
    if TRACES is None:
        raise SystemExit("set PAGEDKV_TRACES to the folder of the public traces")
    return read_trace(TRACES / path, format, **options)


def azure_like(count):
    """Return the Azure conversation lengths at 6.45 requests per second, Poisson."""
    if TRACES is None:
        return random_requests(
            num_prompts=count,
            rate=RATE,
            input_len=Lengths(1155, "lognormal", 1.0, most=14_050),
            output_len=Lengths(211, "lognormal", 0.8, most=1000),
        )
    source = trace("azure2023/AzureLLMInferenceTrace_conv.csv", "azure").head(count)
    times = np.cumsum(np.random.default_rng(0).exponential(1 / RATE, count)).tolist()

    def renewed():
        for when, request in zip(times, source, strict=False):
            yield msgspec.structs.replace(request, arrival=when)

    return Workload("azure conversation lengths", renewed)


def speed(args):
    """Time the common workload: Llama-3-8B on one A100, block 16, prefix cache on."""
    count = args.requests or 4000
    rows = {}
    for leap in (True, False):
        found, wall, cpu = timed(
            lambda leap=leap: pagedkv.simulate(engine(), azure_like(count), leap=leap)
        )
        summary = found.summary
        rows["leap" if leap else "every step"] = {
            "wall_s": wall,
            "cpu_s": cpu,
            "requests_per_s": count / wall,
            "requests_per_cpu_s": count / cpu,
            "steps": summary["num_steps"],
            "leaps": summary["num_leaps"],
            "virtual_s": summary["duration"],
        }
        print(
            f"{'leap' if leap else 'step':5} {count} requests, {wall:.2f} s wall, {cpu:.2f} s CPU: "
            f"{count / wall:,.0f} requests/s, {count / cpu:,.0f} per CPU second; "
            f"{summary['num_steps']:,} steps, {summary['num_leaps']:,} leaps"
        )
    return rows


def memory(args):
    """Serve many small requests and watch the process's greatest size."""
    count = args.requests or 1_000_000
    rows = []
    lengths = {"input_len": Lengths(32), "output_len": Lengths(4)}
    for part in (count // 10, count):
        asked = random_requests(num_prompts=part, rate=150.0, **lengths)
        found, wall, _ = timed(lambda asked=asked: pagedkv.simulate(engine(), asked))
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({"requests": part, "max_rss_mib": size, "wall_s": wall})
        print(f"{found.summary['completed']:,} requests: {size:,.0f} MiB at most, {wall:,.0f} s")
    return rows


def real(args):
    """Simulate the 300 requests that vLLM 0.19 served on an RTX 4090."""
    del args
    asked = read_trace(DATA / "rtx4090_requests.jsonl", "timed_trace", block_size=16)
    found = pagedkv.simulate(engine(num_blocks=2588), asked, cost="rtx4090-llama3-8b")
    with (DATA / "rtx4090_times.csv").open() as text:
        times = np.array([[float(v) for v in row.values()] for row in csv.DictReader(text)])
    with (DATA / "rtx4090_kv.csv").open() as text:
        kv = np.array([[float(v) for v in row.values()] for row in csv.DictReader(text)])
    held = found.occupancy.table()
    used = np.interp(kv[:, 0], held["time"], np.array(held["held"]) / 25.88)
    ttft = (times[:, 1] - times[:, 0]) * 1000
    rows = {
        "makespan_s": (found.summary["duration"], float(times[:, 2].max())),
        "median_ttft_ms": (found.summary["median_ttft_ms"], float(np.median(ttft))),
        "mean_ttft_ms": (found.summary["mean_ttft_ms"], float(ttft.mean())),
        "p99_ttft_ms": (found.summary["p99_ttft_ms"], float(np.percentile(ttft, 99))),
        "mean_kv_use_percent": (float(used.mean()), float(kv[:, 1].mean())),
    }
    for name, (ours, theirs) in rows.items():
        print(f"{name:20} simulated {ours:12,.2f}  real {theirs:12,.2f}  {ours / theirs - 1:+.1%}")
    error = float(np.abs(used - kv[:, 1]).mean())
    print(f"KV use, second by second: {error:.2f} points of mean error")
    print(f"preemptions {found.summary['num_preemptions']} (LLMServingSim: 194)")
    print(f"recomputed tokens {found.summary['recomputed_tokens']:,} (LLMServingSim: 110,596)")
    preemptions = found.summary["num_preemptions"]
    return {**rows, "kv_mean_error_points": error, "num_preemptions": preemptions}


def pure_replay(args):
    """Replay Mooncake's conversation trace at block 512 under every order."""
    del args
    source = trace("mooncake/conversation_trace.jsonl", "mooncake")
    rows = {}
    for order in ORDERS:
        rows[order] = [
            replay(source, blocks, order).token_hit_ratio
            for blocks in (1953, 3906, 5859, 9765, 19531)
        ]
        print(f"{order:12} " + "  ".join(f"{ratio:.4f}" for ratio in rows[order]))
    rows["unbounded"] = replay(source, None).token_hit_ratio
    print(f"unbounded    {rows['unbounded']:.4f}")
    return rows


def conversation(args):
    """Serve the whole conversation trace at block 16 on 8 replicas, in a process per core."""
    source = trace("mooncake/conversation_trace.jsonl", "mooncake").head(args.requests)
    processes = os.cpu_count() or 1
    found, wall, cpu = timed(
        lambda: pagedkv.simulate(engine(), source, replicas=8, processes=processes)
    )
    summary = found.summary
    print(
        f"{summary['completed']} served, {summary['failed']} failed in {wall:.1f} s wall "
        f"({processes} processes, {cpu:.1f} s CPU in the first): "
        f"{summary['completed'] / wall:,.0f} requests/s; "
        f"hits {summary['prefix_cache_hit_rate']:.4f}; {summary['num_steps']:,} steps"
    )
    return {"wall_s": wall, "processes": processes, "hit": summary["prefix_cache_hit_rate"]}


def agent(args):
    """Compare the tool-agent generator with published statistics of the trace it is fitted to."""
    asked = tool_agent(num_prompts=args.requests or 23_608)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.jsonl"
        write_trace(asked, path, "mooncake", block_size=512)
        source = read_trace(path, "mooncake")
        found = trace_stats(source)
        unique, ideal = found["unique_blocks"], found["ideal_block_hit_ratio"]
        lru = [replay(source, int(unique * share)).block_hit_ratio for share in AGENT_LRU]
    rows = {
        "requests per second": (found["requests_per_second"], 6.67),
        "mean input": (found["input_tokens"]["mean"], 8596),
        "mean output": (found["output_tokens"]["mean"], 182),
        "median output": (found["output_tokens"]["p50"], 30),
        "unbounded, by blocks": (ideal, 0.553),
    }
    for (share, theirs), ours in zip(AGENT_LRU.items(), lru, strict=True):
        rows[f"LRU, {share:.0%} of unique blocks"] = (ours, theirs)
    for name, (ours, theirs) in rows.items():
        print(f"{name:27} generated {ours:10,.3f}  published {theirs:10,.3f}")
    return rows


def weka(args):
    """Read the agent sessions and say how much an unbounded cache would hold of each prompt."""
    source = trace("weka_agentic/requests_rle.jsonl.gz", "weka", on_error="skip")
    found = trace_stats(source.head(args.requests))
    print(
        f"{found['num_sessions']} sessions, {found['num_requests']:,} requests, ideal hit ratio "
        f"{found['ideal_token_hit_ratio']:.4f}, skipped {found['skipped_rows']}"
    )
    return found


def servegen(args):
    """Serve a minute of ServeGen's clients as tenants of one pool."""
    del args
    source = trace("servegen/language_m-small.tar.gz", "servegen", start=36_000, duration=60)
    found, wall, _ = timed(lambda: pagedkv.simulate(engine(), source, replicas=8))
    shares = sorted((row["requests"] for row in found.tenants.values()), reverse=True)
    print(
        f"{len(shares)} tenants, {sum(shares):,} requests in {wall:.1f} s; the busiest has "
        f"{shares[0] / sum(shares):.1%}; Jain index of tokens "
        f"{found.summary['jain_index_tokens']:.3f}, "
        f"of speed {found.summary['jain_index_speed']:.3f}"
    )
    return {"tenants": len(shares), "jain": found.summary["jain_index_speed"]}


PARTS = {
    "speed": speed,
    "memory": memory,
    "real": real,
    "replay": pure_replay,
    "conversation": conversation,
    "agent": agent,
    "weka": weka,
    "servegen": servegen,
}


def main():
    """Run the named parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--requests", type=int, help="instead of a part's own number")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {"machine": machine(), "versions": versions(), "seed": 0}
    print(f"{result['machine']}\nseed 0, {result['versions']}")
    for name in args.parts:
        print(f"\n{name}")
        result[name] = PARTS[name](args)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))


if __name__ == "__main__":
    main()
