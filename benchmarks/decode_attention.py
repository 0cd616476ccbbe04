"""Time one layer of decode attention against the ways one could do without the paged kernel.

    python benchmarks/decode_attention.py
    python benchmarks/decode_attention.py --batch 1 --context 32768 --json out.json

Every contender runs in turn within one round and the best of all rounds counts, so a noisy machine
disturbs them alike: read the ratios, not the milliseconds. The contenders:

- kernel, kernel+lse: pagedkv's CPU operator on shuffled blocks, without and with per-block lse;
- int8+lse: the same with keys and values in 8 bits; its GB/s are of the bytes it reads;
- torch dense: scaled_dot_product_attention on a contiguous cache, each KV head's group of query
  heads folded into the query length (torch's fastest form; nothing is paged);
- torch gqa: the same call on queries as a model brings them, with enable_gqa=True;
- plain read: torch sums every key and value once, a bound from memory bandwidth;
- gather+dense: index_select the blocks into a contiguous cache, then torch dense.

`--alternate` puts the matmul of a small model's layer before each call, as a decode step does:
two thread pools that fight show up there and nowhere else.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from pagedkv.device.operators import CpuPagedOp, PagedBias, paged_attention
from pagedkv.device.quantize import quantize, row_words

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Setup:
    """One layer's cache in both layouts, and a query per sequence."""

    query: torch.Tensor  # [B, Hq, D]
    key: torch.Tensor  # [num_blocks, block_size, Hkv, D]
    value: torch.Tensor
    table: np.ndarray  # int32[B, W]
    dense_key: torch.Tensor  # [B, Hkv, context, D]
    dense_value: torch.Tensor
    context: int

    def bias(self, *, want_block_lse: bool) -> PagedBias:
        """The mask of one decode step."""
        batch = len(self.query)
        lengths = np.full(batch, self.context, np.int32)
        starts = np.arange(batch + 1, dtype=np.int32)
        size = self.key.shape[1]
        return PagedBias.build(starts, lengths, self.table, size, want_block_lse=want_block_lse)

    def folded_query(self) -> torch.Tensor:
        """[B, Hkv, group, D]: a KV head's query heads as if they were queries of one head."""
        batch, heads, dim = self.query.shape
        kv_heads = self.key.shape[2]
        return self.query.view(batch, kv_heads, heads // kv_heads, dim)


def prepare(args: argparse.Namespace) -> Setup:
    """Random contents, blocks in random order."""
    generator = torch.Generator().manual_seed(args.seed)
    width = -(-args.context // args.block_size)
    shape = (args.batch * width, args.block_size, args.kv_heads, args.dim)
    dtype = DTYPES[args.dtype]
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(args.batch, args.heads, args.dim, generator=generator).to(dtype)
    order = np.random.default_rng(args.seed).permutation(args.batch * width)
    table = order.astype(np.int32).reshape(args.batch, width)
    dense = (args.batch, args.kv_heads, args.context, args.dim)
    dense_key, dense_value = (torch.randn(dense, generator=generator).to(dtype) for _ in range(2))
    return Setup(query, key, value, table, dense_key, dense_value, args.context)


def contenders(s: Setup) -> dict[str, Callable[[], object]]:
    """Name -> what to time."""
    with_lse, without = (s.bias(want_block_lse=want) for want in (True, False))
    packed = [quantize(x) for x in (s.key, s.value)]
    exact = s.query.float()
    folded = s.folded_query()
    plain = s.query.unsqueeze(2)  # [batch, query heads, 1, dim], as a model brings it
    attention = torch.nn.functional.scaled_dot_product_attention
    blocks = torch.from_numpy(s.table.astype(np.int64).ravel())
    batch, _, _, dim = folded.shape

    def gather(cache: torch.Tensor) -> torch.Tensor:
        taken = cache.index_select(0, blocks).view(batch, -1, cache.shape[2], dim)
        return taken[:, : s.context].transpose(1, 2)

    def total(cache: torch.Tensor) -> torch.Tensor:
        return cache.view(torch.float32).sum()

    return {
        "kernel": lambda: paged_attention(s.query, s.key, s.value, without, op=CpuPagedOp),
        "kernel+lse": lambda: paged_attention(s.query, s.key, s.value, with_lse, op=CpuPagedOp),
        "int8+lse": lambda: paged_attention(exact, *packed, with_lse, op=CpuPagedOp),
        "torch dense": lambda: attention(folded, s.dense_key, s.dense_value),
        "torch gqa": lambda: attention(plain, s.dense_key, s.dense_value, enable_gqa=True),
        "plain read": lambda: (total(s.key), total(s.value)),
        "gather+dense": lambda: attention(folded, gather(s.key), gather(s.value)),
    }


def best_times(
    functions: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object] | None
) -> dict[str, float]:
    """Seconds of the fastest call of each, taken in turn; `before` runs untimed before each."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()  # compiles, allocates
    for _ in range(rounds):
        for name, function in functions.items():
            if before is not None:
                before()
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def matmul(batch: int) -> Callable[[], object]:
    """The largest matmul of a 135M model's layer."""
    left, right = torch.randn(batch, 576), torch.randn(576, 1536)
    return lambda: left @ right


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numba", "xformers", "numpy")},
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each")
    parser.add_argument("--heads", type=int, default=9, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64, help="head size")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alternate", action="store_true", help="a matmul before each call")
    parser.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    args = parse()
    setup = prepare(args)
    before = matmul(args.batch) if args.alternate else None
    with torch.inference_mode():
        times = best_times(contenders(setup), args.rounds, before)
    read = (setup.key.nbytes + setup.value.nbytes) / 1e9
    print(
        f"{args.batch} x {args.context} tokens, {args.heads}/{args.kv_heads} heads of {args.dim}, ",
        end="",
    )
    print(f"block {args.block_size}, {args.dtype}, {read * 1e3:.0f} MB, seed {args.seed}")
    print(json.dumps(machine()))
    print(f"{'':14}{'ms':>9}{'GB/s':>8}{'vs torch dense':>16}{'of plain read':>15}")
    less = args.dim * setup.key.element_size() / (4 * row_words(args.dim))
    for name, seconds in times.items():
        rate = read / seconds / (less if name.startswith("int8") else 1)
        speed, bandwidth = times["torch dense"] / seconds, rate * times["plain read"] / read
        print(f"{name:14}{seconds * 1e3:9.2f}{rate:8.1f}{speed:15.2f}x{bandwidth:15.0%}")
    faster = times["kernel+lse"] / times["int8+lse"]
    print(f"8 bits: {less:.2f}x less memory, {faster:.2f}x as fast as {args.dtype}")
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        record = {"schema_version": 1, "config": settings, "seed": args.seed, "seconds": times}
        args.json.write_text(json.dumps({**record, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
