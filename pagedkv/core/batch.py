"""The rows that compute in a step, and what follows from who they are."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Bool, Int32, Int64, at_rows
from pagedkv.core.plan import Adjustments, Penalties, SamplingBatch
from pagedkv.core.sampling import AdjustmentFields
from pagedkv.core.table import SequenceTable

__all__ = ["Batch"]

NOBODY: Int64 = np.empty(0, np.int64)
FIRST, ALL = slice(1), slice(None)


class Batch:
    """B rows of a table, how many tokens each computes, and the facts of their sequences.

    What `SequenceTable.bind` writes stands until a row is released, so what is gathered from it
    here, when first asked for, holds as long as the same rows run. While all that run decode, one
    batch serves step after step and nothing is gathered anew; plans share its arrays, and nobody
    writes into them.

    Attributes:
        rows: [B] Rows, each at most once.
        counts: [B] Tokens that each computes.
        at: ``rows`` as they index fastest.
        num_tokens: T, the sum of ``counts``.
    """

    def __init__(
        self, table: SequenceTable, rows: Int32, counts: Int32, num_tokens: int | None = None
    ) -> None:
        self.table = table
        self.rows = rows
        self.counts = counts
        self.at = at_rows(rows)
        self.num_tokens = int(counts.sum()) if num_tokens is None else num_tokens
        self._running: Int32 | None = None

    @classmethod
    def decoding(cls, table: SequenceTable) -> "Batch":
        """Return the batch in which every running row computes one token."""
        many = len(table.running)
        made = cls(table, table.running.copy(), np.ones(many, np.int32), many)
        made._running = table.running
        return made

    @property
    def decodes(self) -> bool:
        """Whether each row computes one token."""
        return self.num_tokens == len(self.rows)

    @property
    def holds(self) -> bool:
        """Whether a batch from `decoding` still is what that would return.

        Whoever starts or ends puts another array in the place of ``table.running``.
        """
        return self._running is self.table.running

    def over(self, counts: Int32, num_tokens: int) -> "Batch":
        """Return the same rows with other counts; what was gathered of them is kept."""
        made = Batch.__new__(Batch)
        made.table, made.rows, made.at, made._running = self.table, self.rows, self.at, None
        made.counts, made.num_tokens = counts, num_tokens
        facts = vars(self).keys() & {"seq_ids", "tenants", "by_token", "forked"}
        vars(made).update({name: vars(self)[name] for name in facts})
        return made

    def where(self, chosen: Bool) -> "Batch":
        """Return the batch of the chosen rows: [B]; itself if they are all."""
        if np.count_nonzero(chosen) == len(chosen):
            return self
        return Batch(self.table, self.rows[chosen], self.counts[chosen])

    @property
    def groups(self) -> slice:
        """The groups whose tables' lengths tell those of all: the first alone if they are alike."""
        table = self.table
        alike = table.num_groups == 1 or not np.count_nonzero(table.ragged[self.at])
        return FIRST if alike else ALL

    # Where each row's tokens lie among the T of the step

    @cached_property
    def start(self) -> Int32:
        """[B + 1] Where each row's tokens begin."""
        start = np.zeros(len(self.counts) + 1, np.int32)
        np.cumsum(self.counts, out=start[1:])
        return start

    @cached_property
    def member(self) -> Int64:
        """[T] The index of each token's row among the B."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def offset(self) -> Int32:
        """[T] The place of each token among its row's."""
        return (np.arange(self.num_tokens) - self.start[self.member]).astype(np.int32)

    @cached_property
    def token_rows(self) -> Int32:
        """[T] Each token's row."""
        return self.rows if self.decodes else self.rows[self.member]

    # Facts

    @cached_property
    def seq_ids(self) -> Int64:
        """[B] The sequences."""
        return self.table.seq_id[self.rows]

    @cached_property
    def tenants(self) -> Int32:
        """[B] Their tenants."""
        return self.table.tenant[self.rows]

    @property
    def first_time(self) -> Int32:
        """[B] How many of the tokens were never computed before."""
        scored = self.table.num_scored[self.at]
        if not np.count_nonzero(scored):
            return self.counts
        computed = self.table.num_computed[self.at]
        counts: Int32 = np.maximum(computed + self.counts - np.maximum(computed, scored), 0)
        return counts

    @cached_property
    def policies(self) -> list[tuple[int, Int32]]:
        """Each eviction policy among the rows, by number, and the indices of its rows."""
        ids = self.table.policy_id[self.at]
        return [
            (each, np.flatnonzero(ids == each).astype(np.int32))
            for each in np.unique(ids[ids >= 0]).tolist()
        ]

    @cached_property
    def rotates(self) -> Bool | None:
        """[B] Whose policy closes the gaps that it leaves; None if nobody's does."""
        if not self.table.keeps_scores:
            return None
        rotates = self.table.rotates[self.rows]
        return rotates if rotates.any() else None

    @cached_property
    def by_token(self) -> Int64:
        """The indices of rows whose policy evicts single tokens."""
        if not self.table.keeps_scores:
            return NOBODY
        return np.flatnonzero(self.table.by_token[self.at])

    @cached_property
    def forked(self) -> bool:
        """Whether any may share a block that is not full. A fork starts rows."""
        return bool(np.count_nonzero(self.table.forked[self.at]))

    @cached_property
    def prompt_logprobs(self) -> Int32 | None:
        """[B] What each asks of its prompt; None if nobody asks."""
        asked = self.table.prompt_logprobs[self.rows]
        return asked if (asked >= 0).any() else None

    # Draws

    @cached_property
    def draws(self) -> "Draws":
        """All rows draw a token each, after their last."""
        return Draws(self.table, self.rows, self.start[1:] - 1)

    def check(self) -> None:
        """Check that what was gathered still is what the table says, if the batch still `holds`.

        AssertionError names what is not.
        """
        if self.holds:
            fresh = Batch.decoding(self.table)
            _compare(self, fresh)
            _compare(self.draws, fresh.draws)


class Draws:
    """S rows that draw a token, and how.

    Attributes:
        rows: [S] Rows, each at most once.
        index: [S] Among the step's tokens, the one that each draws after.
    """

    def __init__(self, table: SequenceTable, rows: Int32, index: Int32) -> None:
        self.table = table
        self.rows = rows
        self.index = index

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """[S] each: the parameters, by name."""
        return {name: column[self.rows] for name, column in self.table.sampling.items()}

    @cached_property
    def most_logprobs(self) -> int:
        """The most alternatives that any wants; -1 if none wants any log-probability."""
        return int(self.columns["num_logprobs"].max(initial=-1))

    @cached_property
    def penalised(self) -> Int32:
        """The indices of those that have any penalty."""
        return np.flatnonzero(self.table.sampling.penalised[self.rows]).astype(np.int32)

    @cached_property
    def adjustments(self) -> AdjustmentFields:
        """What they ask of certain tokens at every step."""
        return self.table.sampling.adjustments_of(self.rows)

    @cached_property
    def min_tokens(self) -> Int32 | None:
        """[S] How many are drawn before each may stop; None if all may at once."""
        least = self.table.sampling.min_tokens[self.rows]
        return least if least.any() else None

    @cached_property
    def num_prompt(self) -> Int32:
        """[S] Their prompts' lengths."""
        return self.table.num_prompt[self.rows]

    @cached_property
    def tenants(self) -> Int32:
        """[S] Their tenants."""
        return self.table.tenant[self.rows]

    @cached_property
    def limit(self) -> Int32:
        """[S] The number of known tokens at which each ends."""
        return self.table.limit[self.rows]

    @cached_property
    def stop_ids(self) -> Int32 | None:
        """[S, width] Tokens that end each; None if none does."""
        stop_ids = self.table.sampling.stop_ids[self.rows]
        return stop_ids if (stop_ids >= 0).any() else None

    def only(self, chosen: Int64) -> "Draws":
        """Return the draws of these indices, in ascending order; itself if they are all."""
        if len(chosen) == len(self.rows):
            return self
        return Draws(self.table, self.rows[chosen], self.index[chosen])

    def append(self, token_ids: Int32) -> tuple[Bool, Bool]:
        """Append the drawn tokens; return which of them stop, and which rows are full: [S] each."""
        known = self.table.append_tokens(self.rows, token_ids)
        full: Bool = known >= self.limit
        if self.stop_ids is None:
            return np.zeros(len(full), np.bool_), full
        stops: Bool = (self.stop_ids == token_ids[:, None]).any(axis=1)
        if self.min_tokens is not None:  # an executor may draw what was barred
            stops &= known - self.num_prompt > self.min_tokens
        return stops, full

    def sampling(self) -> SamplingBatch:
        """Return the parameters of the draws."""
        position = self.table.num_known[self.rows] - self.num_prompt
        return SamplingBatch(
            **self.columns,
            position=position,
            most_logprobs=self.most_logprobs,
            penalties=self._penalties(),
            adjustments=self._adjustments(position),
        )

    def _adjustments(self, position: Int32) -> Adjustments | None:
        """What they ask of certain tokens; and whoever may not stop yet draws none that stops."""
        kept_sample, kept_token, sample, token, bias = self.adjustments
        if self.min_tokens is not None and self.stop_ids is not None:
            early = (position < self.min_tokens)[:, None] & (self.stop_ids >= 0)
            barred, which = early.nonzero()
            sample = np.concatenate([sample, barred.astype(np.int32)])
            token = np.concatenate([token, self.stop_ids[barred, which]])
            bias = np.concatenate([bias, np.full(len(barred), -np.inf, np.float32)])
        if len(kept_sample) == len(sample) == 0:
            return None
        return Adjustments(
            kept_sample=kept_sample, kept_token=kept_token, sample=sample, token=token, bias=bias
        )

    def _penalties(self) -> Penalties | None:
        sample = self.penalised
        if not len(sample):
            return None
        table, rows = self.table, self.rows[sample]
        known = table.num_known[rows]
        member = np.repeat(np.arange(len(sample)), known)
        offset = np.arange(len(member)) - np.repeat(np.cumsum(known) - known, known)
        row = rows[member]
        return Penalties(
            sample=sample[member],
            token=table.token_ids[row, offset],
            generated=offset >= table.num_prompt[row],
        )


def _compare(kept: Batch | Draws, fresh: Batch | Draws) -> None:
    for name in vars(kept).keys() & vars(type(kept)).keys() - {"draws"}:
        one, other = getattr(kept, name), getattr(fresh, name)
        np.testing.assert_equal(one, other, f"{name} of a batch is out of date")
