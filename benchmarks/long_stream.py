"""An endless stream in a bounded number of blocks: does the text stay sane?

    python benchmarks/long_stream.py                                     100,000 tokens, an hour
    python benchmarks/long_stream.py --model tiny-random --tokens 3000 --bucket 500

SmolLM2 was trained on 8,192 positions. Here it goes on far beyond: attention sinks and the last
tokens stay, queries are turned so that distances are those within the cache (positions=cache).
Nothing is read from the text but what is in the cache.

Per bucket of tokens of each stream the table shows
    blocks    the fewest and the most that all streams together held after a step
    position  the greatest position that any token was computed at
    own       perplexity of the drawn tokens as the stream itself saw them
    afresh    perplexity of the same tokens, judged as a text of their own by a full, empty cache:
              a text that falls apart cannot keep it low, one that repeats itself cannot keep it up
    4-grams   the share of distinct runs of four tokens
Blocks must not change once the cache is full, and positions must stay below the bound, or the
script ends with an error.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from pagedkv import LLM, Request, SamplingParams
from pagedkv.cli.machine import machine, versions

PROMPT = "The history of the sea is long. In the beginning,"
COLUMNS = ("tokens", "blocks", "position", "own", "afresh", "4-grams", "tok/s")


def main() -> int:
    """Generate, and print a line per bucket; 1 if blocks or positions grew."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="tokens to generate, each stream"
    )
    parser.add_argument("--streams", type=int, default=1, help="streams served together")
    parser.add_argument("--eviction", default="sinks=16 + budget=512 + positions=cache")
    parser.add_argument("--bucket", type=int, default=1000)
    # At 0.8, or with min_p, so small a model soon repeats itself; at 1 it drifts into noise.
    parser.add_argument("--temperature", type=float, default=0.92)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there as well")
    args = parser.parse_args()
    llm = LLM(args.model, num_blocks=64 * args.streams, enable_prefix_caching=False)
    facts = {"machine": machine(), "versions": versions(), "seed": args.seed}
    print(f"{facts['machine']['cpu']}, {torch.get_num_threads()} threads, {args.model}, "
          f"{args.streams} streams, {args.eviction}, seed {args.seed}")  # fmt: skip
    print("".join(f"{name:>12}" for name in COLUMNS))
    buckets = []
    for bucket in generate(llm, args):
        buckets.append(bucket)
        print("".join(f"{cell:>12}" for cell in cells(bucket)), flush=True)
        if args.json:
            workload = {name: value for name, value in vars(args).items() if name != "json"}
            args.json.write_bytes(msgspec.json.encode(facts | workload | {"buckets": buckets}))
    return check(buckets, llm.config.cache.block_size)


def generate(llm: LLM, args: argparse.Namespace) -> Any:
    """Serve the streams and yield what every bucket of tokens was like."""
    params = SamplingParams(
        temperature=args.temperature,
        top_p=1.0,
        max_tokens=args.tokens,
        ignore_eos=True,
        logprobs=0,
    )
    tokenizer = llm.model.tokenizer
    assert tokenizer is not None
    ids = tokenizer(PROMPT)["input_ids"]
    place: dict[int, int] = {}
    for i in range(args.streams):
        seeded = msgspec.structs.replace(params, seed=args.seed + i)
        request = Request(
            request_id=f"stream {i}", prompt_token_ids=ids, sampling=seeded, eviction=args.eviction
        )
        place[llm.scheduler.add(request)[0]] = i
    judge = LLM(llm.model, num_blocks=128, enable_prefix_caching=False)
    tokens = np.zeros((args.streams, args.bucket), np.int32)
    logprobs = np.zeros((args.streams, args.bucket))
    held: list[int] = []
    position = done = 0
    start = time.perf_counter()
    while llm.scheduler.has_unfinished():
        plan, result, output = llm.engine.step()
        if len(output.seq_ids) < args.streams:
            continue
        rows = [place[seq_id] for seq_id in output.seq_ids.tolist()]
        tokens[rows, done % args.bucket] = output.token_ids
        assert result.logprobs is not None
        logprobs[rows, done % args.bucket] = result.logprobs[output.sample]
        done += 1
        if done < args.tokens:  # at the end the blocks go back
            held.append(llm.scheduler.manager.pool.num_held)
        position = max(position, int(plan.positions.max()))
        if done % args.bucket == 0:
            seconds = time.perf_counter() - start
            fresh = judge.score(tokens.tolist())
            yield {
                "tokens": done,
                "blocks": [min(held), max(held)],
                "position": position,
                "own": float(np.exp(-logprobs.mean())),
                "afresh": float(np.exp(-np.mean([each.logprobs.mean() for each in fresh]))),
                "distinct": float(np.mean([distinct(row) for row in tokens])),
                "tokens_per_second": args.streams * args.bucket / seconds,
                "text": tokenizer.decode(tokens[0, -60:].tolist()),
            }
            held, position, start = [], 0, time.perf_counter()


def distinct(tokens: np.ndarray) -> float:
    """Return the share of distinct runs of four tokens."""
    runs = np.lib.stride_tricks.sliding_window_view(tokens, 4)
    return len(np.unique(runs, axis=0)) / len(runs)


def cells(bucket: dict[str, Any]) -> list[str]:
    """Return a bucket as the cells of the table."""
    low, high = bucket["blocks"]
    return [
        f"{bucket['tokens']:,}",
        f"{low}-{high}",
        f"{bucket['position']:,}",
        f"{bucket['own']:.1f}",
        f"{bucket['afresh']:.1f}",
        f"{bucket['distinct']:.2f}",
        f"{bucket['tokens_per_second']:.0f}",
    ]


def check(buckets: list[dict[str, Any]], block_size: int) -> int:
    """Compare all full buckets with the second: 1 if blocks or positions grew."""
    if len(buckets) < 3:
        print("too few buckets to compare")
        return 0
    settled = buckets[1]
    grew = [
        bucket["tokens"]
        for bucket in buckets[2:]
        if bucket["blocks"][1] > settled["blocks"][1]
        or bucket["position"] > settled["position"] + block_size
    ]
    if grew:
        print(f"blocks or positions grew by token {grew[0]:,}", file=sys.stderr)
        return 1
    blocks = "-".join(map(str, settled["blocks"]))
    print(f"blocks stayed at {blocks} and positions below {settled['position'] + block_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
