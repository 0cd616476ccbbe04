"""Time one layer of attention against the ways one could do without the paged kernel.

    python benchmarks/decode_attention.py
    python benchmarks/decode_attention.py --suite --json out.json
    python benchmarks/decode_attention.py --batch 1 --context 32768
    python benchmarks/decode_attention.py --batch 1 --queries 256

`--suite` puts the goals beside what was measured: decode in four shapes, one long sequence on one
thread and on all, prompts in chunks. Every contender runs in turn within one round, over several
layers as a model's step does. Milliseconds are medians, per layer; a ratio is the median of the
rounds' ratios, so that a slow second falls on both sides: read these. The contenders:

- kernel, kernel+lse: pagedkv's CPU operator on shuffled blocks, without and with per-block lse;
- int8+lse: the same with keys and values in 8 bits; its GB/s are of the bytes it reads;
- torch dense: scaled_dot_product_attention on a contiguous cache, each KV head's group of query
  heads folded into the query length (torch's fastest form; nothing is paged);
- torch gqa: the same call on queries as a model brings them, with enable_gqa=True;
- torch unmasked: torch dense without the causal mask, where there is one: another result, sooner;
- plain read: torch sums every key and value once, a bound from memory bandwidth;
- bare read: as fast as this machine was seen to read them (`reading.py`); what no operator passes;
- gather+dense: index_select the blocks into a contiguous cache, then torch dense.

All caches lie in huge pages, as the engine's do; `--pages small` shows what that is worth.
`--alternate` puts the matmul of a small model's layer before each pass, as a decode step does:
two thread pools that fight show up there and nowhere else.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from attention import (
    DTYPES,
    Setup,
    Shape,
    Times,
    allocator,
    check,
    contenders,
    machine,
    prepare,
    times_by_turns,
)

from pagedkv.device.quantize import row_words

DECODE = {
    "d 64, block 16": Shape(),
    "d 64, block 32": Shape(block_size=32),
    "d 128, 32/8 heads": Shape(heads=32, kv_heads=8, dim=128),
    "d 256, 4/1 heads": Shape(heads=4, kv_heads=1, dim=256),
}
PROMPTS = {f"d {s.dim}": s for s in DECODE.values()}
LONG = Shape(batch=1, context=32768)
CHUNKS = (64, 128, 256, 512)
GOALS = {"torch dense": 1.8, "plain read": 0.75, "int8": 1.5, "prompt": 1.0}


def measure(
    setup: Setup,
    rounds: int,
    names: tuple[str, ...] = (),
    before: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Seconds per layer and round of the contenders named, or of all."""
    ways = contenders(setup)
    ways = {name: ways[name] for name in names or ways}
    times = times_by_turns(ways, rounds, before)
    return {name: seconds / len(setup.paged) for name, seconds in times.items()}


def ms(seconds: Times) -> float:
    """What one round in the middle took."""
    return float(np.median(seconds)) * 1e3


def ratio(theirs: Times, ours: Times) -> float:
    """How many times as long they took, in one round in the middle."""
    return float(np.median(theirs / ours))


def record(
    args: argparse.Namespace, shape: Shape, names: tuple[str, ...]
) -> tuple[dict[str, Times], dict[str, object]]:
    """Seconds per layer, once the kernel's output is torch's; and what goes into the JSON."""
    # Prompts are bound by arithmetic: where their caches come from matters little.
    layers = args.layers or (4 if shape.queries > 1 else 0)
    setup = prepare(shape, args.seed, layers, allocator(args.pages))
    difference = check(setup)
    assert difference < 1e-4, difference
    seconds = measure(setup, args.rounds, names)
    found = {"shape": asdict(shape), "threads": torch.get_num_threads(), "difference": difference}
    return seconds, {**found, "seconds": {name: [*each] for name, each in seconds.items()}}


def decode(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Print a line for each shape of decode; yield the records."""
    titles = ("kernel", "int8", "dense", "read", "bare")
    print(f"\n{'decode':20}" + "".join(f"{title:>10}" for title in titles), end=" ms")
    print(f"{'of dense':>10}{'of read':>9}{'int8':>7}{'bare of dense':>15}\n{'  goals':73}", end="")
    print(f"{GOALS['torch dense']:9.2f}x{GOALS['plain read']:9.0%}{GOALS['int8']:6.2f}x")
    names = ("kernel+lse", "int8+lse", "torch dense", "plain read", "bare read")
    for name, shape in DECODE.items():
        times, found = record(args, shape, names)
        ours, packed, dense, read, bare = (times[name] for name in names)
        print(name.ljust(20) + "".join(f"{ms(times[name]):10.2f}" for name in names), end="   ")
        print(f"{ratio(dense, ours):9.2f}x{ratio(read, ours):9.0%}", end="")
        print(f"{ratio(ours, packed):6.2f}x{ratio(dense, bare):14.2f}x", flush=True)
        yield found


def prompts(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Print a line for each chunk of a prompt; yield the records."""
    print(f"\n{'prompts':20}{'kernel':>10}{'dense':>10}{'unmasked':>10} ms{'of dense':>10}")
    print(f"{'  goal':53}{GOALS['prompt']:9.2f}x")
    for name, shape in PROMPTS.items():
        for queries in CHUNKS:
            chunk = replace(shape, batch=1, queries=queries)
            names = ("kernel+lse", "torch dense", "torch gqa", "torch unmasked")
            times, found = record(args, chunk, names)
            ours, unmasked = times["kernel+lse"], times["torch unmasked"]
            dense = min(times["torch dense"], times["torch gqa"], key=ms)
            print(f"{f'{queries}, {name}':20}{ms(ours):10.2f}{ms(dense):10.2f}", end="")
            print(f"{ms(unmasked):10.2f}   {ratio(dense, ours):9.2f}x", flush=True)
            yield found


def threads(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Print what further threads are worth to one long sequence; yield the records."""
    names, every, times = ("kernel+lse", "plain read"), torch.get_num_threads(), {}
    for count in (1, every):
        torch.set_num_threads(count)
        times[count], found = record(args, LONG, names)
        yield found
    print(f"\n1 x {LONG.context} tokens, {every} threads over 1: ", end="")
    one, all_of_them = times[1], times[every]
    print(", ".join(f"{name} {ms(one[name]) / ms(all_of_them[name]):.2f}x" for name in names))


def suite(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Print goal beside measured; yield the records."""
    for part in args.suite.split(","):
        yield from {"decode": decode, "prompts": prompts, "threads": threads}[part](args)


def single(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Print every contender's line for the shape asked for; yield the record."""
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    setup = prepare(shape, args.seed, args.layers, allocator(args.pages))
    before = matmul(shape.batch) if args.alternate else None
    times = measure(setup, args.rounds, before=before)
    read = shape.num_bytes / 1e9
    print(f"{shape}, {len(setup.paged)} layers of {read * 1e3:.0f} MB in {args.pages} pages")
    print(f"{'':14}{'ms':>9}{'GB/s':>8}{'vs torch dense':>16}{'of plain read':>15}")
    less = shape.dim * DTYPES[shape.dtype].itemsize / (4 * row_words(shape.dim))
    for name, seconds in times.items():
        share = 1 / less if name.startswith("int8") else 1
        rate, speed = share * read / ms(seconds) * 1e3, ratio(times["torch dense"], seconds)
        bandwidth = share * ratio(times["plain read"], seconds)
        print(f"{name:14}{ms(seconds):9.2f}{rate:8.1f}{speed:15.2f}x{bandwidth:15.0%}")
    faster = ratio(times["kernel+lse"], times["int8+lse"])
    print(f"8 bits: {less:.2f}x less memory, {faster:.2f}x as fast as {shape.dtype}")
    by_round = {name: [*each] for name, each in times.items()}
    yield {"shape": asdict(shape), "seconds": by_round}


def matmul(batch: int) -> Callable[[], object]:
    """The largest matmul of a 135M model's layer."""
    left, right = torch.randn(batch, 576), torch.randn(576, 1536)
    return lambda: left @ right


def parse() -> argparse.Namespace:
    """The command line."""
    usual = Shape()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--suite",
        nargs="?",
        const="decode,prompts,threads",
        help="goals beside measured; without a value, all of decode,prompts,threads",
    )
    parser.add_argument("--batch", type=int, default=usual.batch, help="sequences")
    parser.add_argument("--context", type=int, default=usual.context, help="tokens of each")
    parser.add_argument("--queries", type=int, default=1, help="the last tokens of each that ask")
    parser.add_argument("--heads", type=int, default=usual.heads, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=usual.kv_heads)
    parser.add_argument("--dim", type=int, default=usual.dim, help="head size")
    parser.add_argument("--block-size", type=int, default=usual.block_size)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=usual.dtype)
    parser.add_argument("--layers", type=int, default=0, help="0: more than caches hold")
    parser.add_argument("--pages", choices=("huge", "small"), default="huge")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alternate", action="store_true", help="a matmul before each pass")
    parser.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    args = parse()
    print(json.dumps({**machine(), "pages": args.pages, "seed": args.seed}))
    with torch.inference_mode():
        found = list(suite(args) if args.suite else single(args))
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        record = {"schema_version": 3, "config": settings, "seed": args.seed, "results": found}
        args.json.write_text(json.dumps({**record, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
