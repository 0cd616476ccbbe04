"""One model's attention caches in both layouts, and the ways to attend to them.

Used by `decode_attention.py`. A pass goes through several layers, as a step of a model does, so
that each cache comes from memory and not from what the pass before left in the processor's caches.
"""

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch
from reading import Reader

from pagedkv.device import memory
from pagedkv.device.operators import CpuPagedOp, PagedBias, paged_attention
from pagedkv.device.quantize import quantize

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PASS = 512 << 20  # bytes that a pass reads at least: more than caches hold

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What is attended to, by how many queries of each sequence."""

    batch: int = 16
    context: int = 4096
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    block_size: int = 16
    queries: int = 1
    dtype: str = "fp32"

    def __str__(self) -> str:
        queries = f", {self.queries} queries" if self.queries > 1 else ""
        return (
            f"{self.batch} x {self.context} tokens{queries}, {self.heads}/{self.kv_heads} heads "
            f"of {self.dim}, block {self.block_size}, {self.dtype}"
        )

    @property
    def num_bytes(self) -> int:
        """Keys and values of one layer."""
        vectors = 2 * self.batch * self.context * self.kv_heads
        return vectors * self.dim * DTYPES[self.dtype].itemsize


@dataclass
class Setup:
    """The caches of some layers, and a step's queries."""

    shape: Shape
    query: torch.Tensor  # [B * queries, Hq, D]
    table: np.ndarray  # int32[B, W]
    paged: list[Pair]  # [num_blocks, block_size, Hkv, D] each
    packed: list[Pair]  # the same in 8 bits
    dense: list[Pair]  # [B, Hkv, context, D] each, of the same contents

    def bias(self, *, want_block_lse: bool) -> PagedBias:
        """The mask of one step."""
        s = self.shape
        starts = np.arange(s.batch + 1, dtype=np.int32) * np.int32(s.queries)
        lengths = np.full(s.batch, s.context, np.int32)
        size = s.block_size
        return PagedBias.build(starts, lengths, self.table, size, want_block_lse=want_block_lse)

    def dense_query(self) -> torch.Tensor:
        """[B, Hq, queries, D], as a model brings them."""
        s = self.shape
        return self.query.view(s.batch, s.queries, s.heads, s.dim).transpose(1, 2).contiguous()

    def folded_query(self) -> torch.Tensor:
        """[B, Hkv, group * queries, D]: a KV head's query heads as queries of one head."""
        s = self.shape
        return self.dense_query().view(s.batch, s.kv_heads, -1, s.dim)

    def mask(self) -> torch.Tensor | None:
        """fp32[queries, context], added to scores; None if the only query sees everything."""
        s = self.shape
        if s.queries == 1:
            return None
        seen = torch.ones(s.queries, s.context, dtype=torch.bool).tril(s.context - s.queries)
        return torch.zeros(seen.shape, dtype=self.query.dtype).masked_fill(~seen, -math.inf)


def prepare(shape: Shape, seed: int, layers: int, allocate: Callable[..., torch.Tensor]) -> Setup:
    """Random contents, the same in all layers; blocks in random order.

    Args:
        shape: What to make.
        seed: Of contents and order.
        layers: 0 for as many as make a pass of `PASS` bytes, two at least.
        allocate: `memory.empty`, or `torch.empty` for small pages.
    """
    generator = torch.Generator().manual_seed(seed)
    width = -(-shape.context // shape.block_size)
    blocks = shape.batch * width
    table = np.random.default_rng(seed).permutation(blocks).astype(np.int32)
    order = torch.from_numpy(table.astype(np.int64))
    dtype = DTYPES[shape.dtype]

    def pair(make: Callable[[int], torch.Tensor]) -> Pair:
        first, second = (_placed(make(i), allocate) for i in range(2))
        return first, second

    size = (blocks, shape.block_size, shape.kv_heads, shape.dim)
    paged = pair(lambda _: torch.randn(size, generator=generator).to(dtype))

    def contiguous(i: int) -> torch.Tensor:
        rows = paged[i].index_select(0, order).view(shape.batch, -1, *size[2:])
        return rows[:, : shape.context].transpose(1, 2)

    layers = layers or max(2, -(-PASS // shape.num_bytes))
    each = range(layers)
    queries = shape.batch * shape.queries
    return Setup(
        shape=shape,
        query=torch.randn(queries, shape.heads, shape.dim, generator=generator).to(dtype),
        table=table.reshape(shape.batch, width),
        paged=[paged, *(pair(lambda i: paged[i]) for _ in each[1:])],
        packed=[pair(lambda i: quantize(paged[i])) for _ in each],
        dense=[pair(contiguous) for _ in each],
    )


def _placed(x: torch.Tensor, allocate: Callable[..., torch.Tensor]) -> torch.Tensor:
    return allocate(tuple(x.shape), x.dtype).copy_(x)


Times = npt.NDArray[np.float64]
Attend = Callable[[Pair], object]  # one layer


def contenders(s: Setup) -> dict[str, Callable[[], object]]:
    """Name -> a pass over all layers; returns what the last one gave."""
    with_lse, without = (s.bias(want_block_lse=want) for want in (True, False))
    exact, plain, folded, mask = s.query.float(), s.dense_query(), s.folded_query(), s.mask()
    group = s.shape.heads // s.shape.kv_heads
    folded_mask = None if mask is None else mask.repeat(group, 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    blocks, read = torch.from_numpy(s.table.astype(np.int64).ravel()), Reader()

    def gather(cache: torch.Tensor) -> torch.Tensor:
        taken = cache.index_select(0, blocks).view(s.shape.batch, -1, *cache.shape[2:])
        return taken[:, : s.shape.context].transpose(1, 2)

    def dense(kv: Pair) -> torch.Tensor:
        return attention(folded, *kv, attn_mask=folded_mask)

    def over(caches: list[Pair], attend: Attend) -> Callable[[], object]:
        return lambda: [attend(kv) for kv in caches][-1]

    ways = {
        "kernel": over(s.paged, lambda kv: paged_attention(s.query, *kv, without, op=CpuPagedOp)),
        "kernel+lse": over(
            s.paged, lambda kv: paged_attention(s.query, *kv, with_lse, op=CpuPagedOp)
        ),
        "int8+lse": over(s.packed, lambda kv: paged_attention(exact, *kv, with_lse, op=CpuPagedOp)),
        "torch dense": over(s.dense, dense),
        "torch gqa": over(
            s.dense, lambda kv: attention(plain, *kv, attn_mask=mask, enable_gqa=True)
        ),
        "plain read": over(s.paged, lambda kv: [x.view(torch.float32).sum() for x in kv]),
        "bare read": over(s.paged, lambda kv: [read(x) for x in kv]),
        "gather+dense": over(s.paged, lambda kv: dense((gather(kv[0]), gather(kv[1])))),
    }
    if mask is not None:
        ways["torch unmasked"] = over(s.dense, lambda kv: attention(folded, *kv))
    return ways


def check(s: Setup) -> float:
    """The largest difference between the kernel's output and torch's dense attention."""
    ways = contenders(s)
    ours, theirs = ways["kernel+lse"](), ways["torch gqa"]()
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    return float(
        (ours.view(s.shape.batch, s.shape.queries, *ours.shape[1:]) - theirs.transpose(1, 2))
        .abs()
        .max()
    )


def times_by_turns(
    functions: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object] | None
) -> dict[str, Times]:
    """Seconds of each call in each round: [rounds]; `before` runs untimed before each."""
    times = {name: np.empty(rounds) for name in functions}
    for function in functions.values():
        function()  # compiles, allocates
    for i in range(rounds):
        for name, function in functions.items():
            if before is not None:
                before()
            start = time.perf_counter()
            function()
            times[name][i] = time.perf_counter() - start
    return times


def allocator(pages: str) -> Callable[..., torch.Tensor]:
    """What allocates caches in `huge` or `small` pages."""
    if pages == "huge":
        return memory.empty
    return lambda shape, dtype: torch.empty(shape, dtype=dtype)


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
