"""Attention with turned queries through operators that turn none: one call per kind of run.

Consecutive blocks that want the same turn form a run. Each (sequence, run) is a sequence of its
own in a batch of partial attentions, asked by queries turned for it; the parts are merged by their
log-sum-exps, which is exact. A sequence's last run holds the step's own tokens and is causal; the
runs before it are seen whole. Where everybody has one query, as in decode, so is the last: then one
call serves all runs.
"""

import numpy as np
import torch
from torch import Tensor

from pagedkv.core.arrays import Int32, Int64
from pagedkv.device.operators import PagedBias, PagedOp, paged_attention
from pagedkv.device.send import Send
from pagedkv.device.turns import Turns

__all__ = ["TurnedBias"]

_Answer = tuple[Tensor, Tensor, Tensor | None]


class TurnedBias:
    """A step's bias with turns; made once per step and group, shared by its layers.

    After `attend`, `block_lse` and `lse` are the last layer's, shaped as `PagedBias`' are.

    Args:
        query_start: int32 [B + 1] Where each sequence's queries begin.
        num_resident: int32 [B] Tokens resident, this step's included.
        block_table: int32 [B, W]
        block_size: Slots of a block.
        turns: For [B, W].
        want_block_lse: Fill `block_lse` as well.
        send: Puts arrays where the keys are.
    """

    def __init__(
        self,
        query_start: Int32,
        num_resident: Int32,
        block_table: Int32,
        block_size: int,
        turns: Turns,
        *,
        want_block_lse: bool = False,
        send: Send = torch.from_numpy,
    ) -> None:
        self._turns = turns
        self._width = block_table.shape[1]
        self.block_lse: Tensor | None = None
        self.lse: Tensor | None = None
        seq, first, count = _runs(num_resident, turns.index, block_size)
        last = np.append(seq[1:] != seq[:-1], True)
        queries = np.diff(query_start)
        seen = np.where(last, num_resident[seq] - first * block_size, count * block_size)

        def call(runs: Int64, causal: bool) -> tuple[_Part, PagedBias]:
            part = _Part(seq[runs], first[runs], count[runs], query_start, turns.index, send)
            bias = PagedBias.build(
                np.append(0, np.cumsum(queries[seq[runs]])).astype(np.int32),
                seen[runs],
                part.table(block_table),
                block_size,
                causal=causal,
                want_block_lse=want_block_lse,
                send=send,
            )
            return part, bias

        own, old = np.flatnonzero(last), np.flatnonzero(~last)
        if len(old) and queries.max() == 1:
            self._calls = [call(np.append(own, old), False)]
        else:
            self._calls = [call(own, True), *([call(old, False)] if len(old) else [])]
        # A view at most: nothing may be computed from what is not sent yet.
        parts = [part for part, _ in self._calls]
        self._old_token = parts[-1].token[0 if len(parts) == 2 else int(query_start[-1]) :]
        self._num_tokens = int(query_start[-1])

    def prepare(self, operator: type[PagedOp], send: Send) -> None:
        """As `PagedOp.prepare`."""
        for _, bias in self._calls:
            operator.prepare(bias, send)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, operator: type[PagedOp]
    ) -> Tensor:
        """Return attention over all runs: [T, Hq, D]; shapes as in `paged_attention`."""
        answers: list[_Answer] = []
        for part, bias in self._calls:
            asked = part.turned(query, self._turns)
            out = paged_attention(asked, keys, values, bias, scale, operator)
            assert bias.lse is not None
            answers.append((out, bias.lse, bias.block_lse))
        out, self.lse, self.block_lse = self._merged(answers)
        return out

    def _merged(self, answers: list[_Answer]) -> _Answer:
        """Put the parts together: [T, Hq, D], [Hq, T], and None or [T, Hq, W]."""
        out, lse, block_lse = answers[0]
        tokens = self._num_tokens
        if block_lse is not None:
            shape = (tokens, out.shape[1], self._width)
            whole = torch.full(shape, -torch.inf, dtype=torch.float32, device=out.device)
            for (part, _), (_, _, entries) in zip(self._calls, answers, strict=True):
                assert entries is not None
                part.scatter(entries, whole)
            block_lse = whole
        if not len(self._old_token):
            return out, lse, block_lse
        if len(answers) == 2:
            old, old_lse, _ = answers[1]
        else:
            old, old_lse = out[tokens:], lse[:, tokens:]
        merged = _merged(out[:tokens], lse[:, :tokens], old, old_lse, self._old_token)
        return *merged, block_lse


class _Part:
    """Some runs, and the (run, query) pairs that ask them, packed run after run.

    Attributes:
        token: int64 [N] The packed query of each pair.
    """

    def __init__(
        self,
        seq: Int64,
        first: Int64,
        count: Int64,
        query_start: Int32,
        index: Int32,
        send: Send,
    ) -> None:
        self._seq, self._first, self._count = seq, first, count
        queries = np.diff(query_start)[seq]
        run = np.repeat(np.arange(len(seq)), queries)
        begin = np.repeat(np.cumsum(queries) - queries, queries)
        token = query_start[seq][run] + np.arange(len(run)) - begin
        row = index[seq, first][run].astype(np.int64)
        token = token.astype(np.int64)
        self.token = send(token)
        self._row = send(row) if row.any() else None
        pair, column = np.nonzero(np.arange(count.max(initial=1)) < count[run][:, None])
        at = (pair, column, token[pair], first[run[pair]] + column)
        self._scattered = tuple(send(each) for each in at)

    def table(self, block_table: Int32) -> Int32:
        """Return the runs' own block tables: [runs, widest]."""
        entry = self._first[:, None] + np.arange(int(self._count.max(initial=1)))
        inside = np.minimum(entry, block_table.shape[1] - 1)
        return np.ascontiguousarray(block_table[self._seq[:, None], inside])

    def turned(self, query: Tensor, turns: Turns) -> Tensor:
        """Return the queries of the pairs, turned for their runs: [N, Hq, D]."""
        asked = query.index_select(0, self.token)
        return asked if self._row is None else turns.apply(asked, self._row)

    def scatter(self, source: Tensor, target: Tensor) -> None:
        """Write pairs' block lse [N, Hq, widest] to their entries of [T, Hq, W]."""
        pair, column, token, entry = self._scattered
        target[token, :, entry] = source[pair, :, column]


def _runs(num_resident: Int32, index: Int32, block_size: int) -> tuple[Int64, Int64, Int64]:
    """Return the runs of equal turn: their sequence, first entry and number of entries."""
    width = index.shape[1]
    used = np.arange(width) < -(-num_resident // block_size)[:, None]
    begins = used.copy()
    begins[:, 1:] &= index[:, 1:] != index[:, :-1]
    seq, first = np.nonzero(begins)
    after = np.append(first[1:], 0)
    ends = np.append(seq[1:] != seq[:-1], True)
    blocks = used.sum(axis=1)[seq]
    return seq, first, np.where(ends, blocks, after) - first


def _merged(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    """Add partial attentions [N, Hq, D] of packed queries ``token`` to [T, Hq, D].

    Each query's parts are added in the order of its runs, so its result does not depend on the
    batch.
    """
    own, more = lse.t(), part_lse.t()
    top = own.scatter_reduce(0, token[:, None].expand_as(more), more, "amax")
    weight = torch.exp(more - top[token])
    kept = torch.exp(own - top)
    total = kept.index_add(0, token, weight)
    mixed = (out.float() * kept.unsqueeze(2)).index_add_(
        0, token, part.float() * weight.unsqueeze(2)
    )
    merged = (mixed / total.unsqueeze(2)).to(out.dtype)
    return merged, (top + torch.log(total)).t().contiguous()
