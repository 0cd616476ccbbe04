"""Paged attention in plain torch: slow, obvious, and what the native kernel is tested against."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .quantize import dequantize
from .turns import Turns

__all__ = ["CONTIGUOUS", "Batch", "run"]

CONTIGUOUS = 1 << 40  # the block size of keys that lie in one piece


@dataclass(frozen=True)
class Batch:
    """A bias in the terms of the kernel: which keys each query sees, and where they lie."""

    query_start: npt.NDArray[np.int64]
    resident: npt.NDArray[np.int64]
    first_limit: npt.NDArray[np.int64]  # keys that a sequence's first query sees
    causal: bool  # each further query sees one more
    table: npt.NDArray[np.int32]
    slot_base: npt.NDArray[np.int64]
    block_size: int
    window: int
    num_slots: int  # slots that the keys must at least have; -1 if a block id is negative
    overrun: bool  # a sequence has more tokens than its row of the table has slots
    turns: Turns | None  # of queries before they meet a table's blocks

    @classmethod
    def read(cls, bias: Any, *, from_end: bool, from_start: bool) -> "Batch":
        """Read one of xformers' block-diagonal biases, paged or not.

        Args:
            bias: The bias.
            from_end: Causal, the last query sees every key.
            from_start: Causal, the first query sees the first key only.
        """
        starts = np.asarray(bias.q_seqinfo.seqstart_py, np.int64)
        key_starts = np.asarray(bias.k_seqinfo.seqstart_py, np.int64)
        padded = hasattr(bias.k_seqinfo, "seqlen_py")
        resident = np.diff(key_starts)
        if padded:
            resident = np.asarray(bias.k_seqinfo.seqlen_py, np.int64)
        first = np.ones_like(resident) if from_start else resident
        if from_end:
            first = resident - np.diff(starts) + 1
        if hasattr(bias, "block_tables"):
            table, size = getattr(bias, "host_table", None), bias.page_size
            table = bias.block_tables.cpu().numpy() if table is None else table
            base = np.zeros_like(resident)
            used = np.arange(table.shape[1]) * size < resident[:, None]
            highest = int(table.max(where=used, initial=-1))
            lowest = int(table.min(where=used, initial=0))
            slots = (highest + 1) * size if lowest >= 0 else -1
        else:
            table, size = np.zeros((len(resident), 1), np.int32), CONTIGUOUS
            base = key_starts[:-1]
            slots = int((base + resident).max(initial=0))
        causal, window = from_end or from_start, getattr(bias, "window", 0)
        overrun = bool((resident > table.shape[1] * size).any())
        turns = getattr(bias, "turns", None)
        return cls(
            starts, resident, first, causal, table, base, size, window, slots, overrun, turns
        )

    def limit(self, b: int, i: int) -> int:
        """How many keys the i-th query of sequence b sees, window aside."""
        seen = self.first_limit[b] + (i if self.causal else 0)
        return int(min(max(seen, 0), self.resident[b]))

    def slots(self, b: int) -> torch.Tensor:
        """int64[resident], the slots of sequence b in order."""
        index = np.arange(self.resident[b])
        block = self.table[b, index // self.block_size].astype(np.int64)
        slots = self.slot_base[b] + block * self.block_size + index % self.block_size
        return torch.from_numpy(slots)


def run(
    batch: Batch,
    prepared: dict[Any, Any],
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    scale: float,
) -> None:
    """Fill the outputs, one dense fp32 softmax per sequence over its gathered keys.

    Args:
        batch: The bias.
        prepared: Not used; `cpu.call.run` takes the same arguments.
        inputs: query [1, T, G, H, D], key and value [1, slots, G, H, D] or packed in 8 bits.
        outputs: out fp32[1, T, G, H, D], lse fp32[G * H, T], block lse fp32[T, G * H, W] or None.
        scale: Of the scores.
    """
    q, k, v = inputs
    dim = q.shape[-1]
    out, lse, block_lse = outputs
    for b in range(len(batch.resident)):
        rows = slice(*batch.query_start[b : b + 2].tolist())
        slots = batch.slots(b)
        keys = dequantize(k[0, slots], dim)
        if batch.turns is None:
            scores = torch.einsum("qghd,kghd->ghqk", q[0, rows].float(), keys)
        else:
            asked = _turned(batch.turns, b, q[0, rows].float(), len(slots) // batch.block_size + 1)
            entry = torch.arange(len(slots), device="cpu") // batch.block_size
            scores = torch.einsum("kqghd,kghd->ghqk", asked[entry], keys)
        scores = (scores * scale).masked_fill(~_seen(batch, b), -math.inf)
        weights = torch.nan_to_num(scores.softmax(-1))  # a query that sees nothing: 0, not NaN
        out[0, rows] = torch.einsum("ghqk,kghd->qghd", weights, dequantize(v[0, slots], dim))
        flat = scores.flatten(0, 1)  # [Hq, queries, keys]
        lse[:, rows] = flat.logsumexp(-1)
        if block_lse is not None:
            block_lse[rows] = _by_block(flat, batch.block_size, block_lse.shape[-1])


def _turned(turns: Turns, b: int, query: torch.Tensor, entries: int) -> torch.Tensor:
    """[queries, G, H, D] -> the same for each of a sequence's first table entries."""
    index = torch.from_numpy(turns.index[b, :entries].astype(np.int64))
    asked = query.expand(len(index), *query.shape)
    return turns.apply(asked, index)


def _seen(batch: Batch, b: int) -> torch.Tensor:
    """bool[queries, keys]: which keys of sequence b each of its queries sees."""
    limits = [batch.limit(b, i) for i in range(int(np.diff(batch.query_start)[b]))]
    limit = torch.from_numpy(np.array(limits, np.int64))[:, None]
    key = torch.arange(int(batch.resident[b]), device="cpu")
    seen = key < limit
    return seen & (key >= limit - batch.window) if batch.window else seen


def _by_block(scores: torch.Tensor, block_size: int, width: int) -> torch.Tensor:
    """[Hq, queries, keys] -> log-sum-exp per block [queries, Hq, width]."""
    short = width * block_size - scores.shape[-1]
    whole = torch.nn.functional.pad(scores, (0, short), value=-math.inf)
    blocks = whole.view(*scores.shape[:-1], width, block_size)
    return blocks.logsumexp(-1).transpose(0, 1)
