"""`LLM.generate` against transformers' `generate`: same weights, same requests, same tokens.

    python benchmarks/generate.py                      both scenarios, SmolLM2-135M in fp32
    python benchmarks/generate.py --model tiny-random --num-requests 8 --repeats 2
    python benchmarks/generate.py --scenario ragged --json ragged.json

Two scenarios, greedy, end-of-sequence ignored:

    equal     every request has 256 tokens in and 128 out: transformers runs one static batch
    ragged    32-512 tokens in, 16-256 out: transformers runs static batches in order of arrival,
              left-padded, each to its longest output; the best of several batch sizes counts

Runs of the two alternate, so that whatever else the machine does hits both. The ratio is taken
within each round and the median of the rounds' ratios is reported.
"""

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from pagedkv import LLM, SamplingParams
from pagedkv.cli.datasets import BenchRequest
from pagedkv.cli.machine import cores, machine, versions
from pagedkv.cli.results import check_writable, write_result
from pagedkv.device.tiny import TINY_MODELS, tiny_model
from pagedkv.device.weights import KNOWN_MODELS, pull

TARGETS = {"equal": 1.15, "ragged": 1.8}
Run = Callable[[], list[list[int]]]


# The requests


def equal_requests(count: int, vocab_size: int, seed: int, scale: float) -> list[BenchRequest]:
    """Requests of 256 tokens in and 128 out, times ``scale``."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, vocab_size, (count, int(256 * scale))).tolist()
    return [BenchRequest(prompt=prompt, output_len=int(128 * scale)) for prompt in prompts]


def ragged_requests(count: int, vocab_size: int, seed: int, scale: float) -> list[BenchRequest]:
    """Requests of 32-512 tokens in and 16-256 out, evenly drawn, times ``scale``."""
    rng = np.random.default_rng(seed)
    inputs = (rng.integers(32, 513, count) * scale).astype(int).tolist()
    outputs = (rng.integers(16, 257, count) * scale).astype(int).tolist()
    return [
        BenchRequest(prompt=rng.integers(0, vocab_size, length).tolist(), output_len=output)
        for length, output in zip(inputs, outputs, strict=True)
    ]


# The two systems


def pagedkv_run(llm: LLM, requests: list[BenchRequest]) -> Run:
    """Everything at once, from a pool that remembers nothing of the run before."""
    prompts = [request.prompt for request in requests]
    params = [
        SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
        for request in requests
    ]

    def run() -> list[list[int]]:
        llm.scheduler.reset_prefix_cache()
        return [output.token_ids for output in llm.generate(prompts, params)]

    return run


def load_transformers(model: str) -> Any:
    """The same weights as transformers serves them best on a CPU: fp32, sdpa, no gradients."""
    if model in TINY_MODELS:
        network: Any = tiny_model(model, attn_implementation="sdpa")
    else:
        directory = pull(model) if model in KNOWN_MODELS else model
        network = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
    network.eval().requires_grad_(False)
    network.generation_config = GenerationConfig()  # no end of sequence from the model's own file
    return network


def transformers_run(network: Any, requests: list[BenchRequest], batch_size: int) -> Run:
    """Static batches in order of arrival."""
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    padded = [_left_padded([request.prompt for request in batch]) for batch in batches]

    def run() -> list[list[int]]:
        outputs: list[list[int]] = []
        for batch, (ids, mask) in zip(batches, padded, strict=True):
            longest = max(request.output_len for request in batch)
            config = GenerationConfig(
                max_new_tokens=longest, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            with torch.inference_mode():
                tokens = network.generate(ids, attention_mask=mask, generation_config=config)
            fresh = tokens[:, ids.shape[1] :].tolist()
            assert all(len(row) == longest for row in fresh), "a sequence ended early"
            outputs += [row[: r.output_len] for row, r in zip(fresh, batch, strict=True)]
        return outputs

    return run


def _left_padded(prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


# Measuring


class Timings(Struct):
    """What one system took in each round, and what it generated in the last."""

    seconds: list[float] = []
    cpu_seconds: list[float] = []
    tokens: list[list[int]] = []


def alternate(runs: dict[str, Run], repeats: int) -> dict[str, Timings]:
    """Run all in turn, ``repeats`` times."""
    timings = {name: Timings() for name in runs}
    for number in range(repeats):
        for name, run in runs.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            timings[name].tokens = run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            timings[name].seconds.append(wall)
            timings[name].cpu_seconds.append(cpu)
            print(
                f"  round {number + 1}  {name:24} {wall:8.2f} s  ({cpu:.2f} s of CPU)", flush=True
            )
    return timings


def compare(
    scenario: str, llm: LLM, network: Any, requests: list[BenchRequest], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one scenario."""
    sizes = [len(requests)] if scenario == "equal" else options.batch_sizes
    runs = {"pagedkv": pagedkv_run(llm, requests)}
    runs |= {
        f"transformers, batch {size}": transformers_run(network, requests, size) for size in sizes
    }
    before = llm.scheduler.stats()
    timings = alternate(runs, options.repeats)
    after = llm.scheduler.stats()
    medians = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    best = min((name for name in runs if name != "pagedkv"), key=lambda name: medians[name])
    ours, theirs = timings["pagedkv"], timings[best]
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    cpu_ratios = [b / a for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True)]
    same = [a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True)]
    outputs = sum(request.output_len for request in requests)
    return {
        "scenario": scenario,
        "num_requests": len(requests),
        "input_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": outputs,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "cpu_seconds": {name: timing.cpu_seconds for name, timing in timings.items()},
        "median_seconds": medians,
        "output_tokens_per_second": {name: outputs / median for name, median in medians.items()},
        "best_transformers": best,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "target": TARGETS[scenario],
        "identical_sequences": sum(same),
        "preemptions": after.num_preemptions - before.num_preemptions,
    }


def show(result: dict[str, Any]) -> None:
    """Print one scenario's outcome."""
    tokens = f"{result['input_tokens']:,} tokens in, {result['output_tokens']:,} out"
    print(f"\n{result['scenario']}: {result['num_requests']} requests, {tokens}")
    for name, median in result["median_seconds"].items():
        rate = result["output_tokens_per_second"][name]
        print(f"  {name:24} {median:8.2f} s   {rate:8.1f} output tokens/s")
    low, high = min(result["ratios"]), max(result["ratios"])
    print(
        f"  pagedkv is {result['ratio']:.2f}x as fast as {result['best_transformers']} "
        f"({low:.2f}-{high:.2f} over rounds; target {result['target']}x)\n"
        f"  by CPU time {result['cpu_ratio']:.2f}x: to be trusted with one thread on a busy machine"
    )
    print(
        f"  {result['identical_sequences']} of {result['num_requests']} sequences identical, "
        f"{result['preemptions']} preemptions\n"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--scenario", choices=("equal", "ragged", "both"), default="both")
    parser.add_argument("--num-requests", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths; default: 1")
    parser.add_argument(
        "--batch-sizes",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[8, 16, 32],
        help="of transformers in the ragged scenario; default: 8,16,32",
    )
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for."""
    options = parse_arguments()
    check_writable(options.json)
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    llm = LLM(options.model)
    network = load_transformers(options.model)
    vocab_size = llm.config.model.vocab_size
    host = machine()
    print(f"{host['cpu']}, {host['cores']} cores, {options.threads} threads, seed {options.seed}")
    print(", ".join(f"{name} {text}" for name, text in versions().items() if text))
    make = {"equal": equal_requests, "ragged": ragged_requests}
    chosen = list(make) if options.scenario == "both" else [options.scenario]
    # Compile, and touch all weights once, before any clock runs.
    warm = equal_requests(2, vocab_size, options.seed, 1 / 16)
    alternate({"warm-up": pagedkv_run(llm, warm), "": transformers_run(network, warm, 2)}, 1)
    results = []
    for scenario in chosen:
        print(f"\n{scenario}")
        requests = make[scenario](options.num_requests, vocab_size, options.seed, options.scale)
        results.append(compare(scenario, llm, network, requests, options))
        show(results[-1])
    settings = vars(options) | {"schema_version": 1, "versions": versions(), "machine": host}
    write_result(settings | {"results": results}, options.json)


if __name__ == "__main__":
    main()
