"""Running sequences as a struct of arrays: one row each, and their block tables beside them."""

import numpy as np

from pagedkv.core.arrays import Bool, Float32, Float64, Int32, Int64, at_rows, plan_width
from pagedkv.core.gaps import Holes, close_gaps
from pagedkv.core.request import Sequence
from pagedkv.core.sampling import SamplingColumns
from pagedkv.core.tokens import TokenColumns

__all__ = ["SequenceTable"]

FIRST_BLOCKS = 16
FREE = -1
ENTRY_COLUMNS = ("block_table", "first_position", "turn", "score", "weight", "mass")
SCORE_COLUMNS = ENTRY_COLUMNS[3:]
PROGRESS_COLUMNS = (
    "num_blocks",
    "num_resident",
    "num_computed",
    "next_position",
    "num_evicted",
    "forfeited",
    "left_out",
    "replay_until",
    "publishes",
    "ragged",
)


class SequenceTable:
    """Columns over ``max_num_seqs`` rows; every per-sequence fact of the decode path is here.

    Columns, by what they count:
        seq_id: The sequence in the row; -1 marks a free row.
        num_prompt, num_known: Tokens given; tokens given or generated.
        num_computed: Known tokens whose keys and values were computed.
        num_resident: [groups, rows] Those of them that are still in the pool.
        num_blocks: [groups, rows] Entries in use in ``block_table``.
        ragged: Whether the tables of its groups may differ in either; else the first tells of all.
        limit: The number of known tokens at which the sequence ends.
        max_blocks: The most blocks per table that the sequence ever holds at once.
        priority: Its request's priority.
        urgency: That priority and age as one number; lower is more urgent.
        tenant: Its request's tenant as a number.
        evicts: Whether its policy can forget anything.
        policy_id, rotates: That policy's number in `Retention`, -1 forgets nothing; and whether it
            closes the gaps that it leaves (cache positions).
        publishes: Whether its blocks may be found: not if it began before the cache was reset.
        forked: Whether it was forked, or forked from: it may share a block that is not full.
        token_ids: [rows, width] Known tokens.
        next_position: The position that the next token's query and key are rotated to.
        num_evicted: Tokens that eviction has forgotten, summed over groups.
        forfeited: The attention mass they had when they went, summed over groups.
        left_out: The leave-one-out error they had when they went, summed over groups.
        by_token: Whether the policy evicts single tokens; what it knows of them is in ``tokens``.
        prompt_logprobs: Alternatives to report per prompt token; -1 reports nothing.
        num_scored: Prompt tokens up to here have had their log-probabilities.
        cumulative: The sum of the log-probabilities of the tokens drawn, where they are reported.
        replay_until: While fewer tokens are computed, logged evictions are done over again.
        block_table: [groups, rows, width] Block ids in order of position; 0 where none is in use.
        tail: [groups, rows] The last of those, unless it is full: the next token goes there.
        first_position: Beside it, where each block's first token stands in its sequence.
        turn: Beside it, by how many positions queries are turned before they meet the block: 0
            where none is in use, or the policy closes no gaps (`positions`).
        score, weight, mass: Beside it, what the eviction policy knows of each block.
        sampling: How tokens are drawn, and which end the sequence: columns of their own.
        keeps_scores: Whether any sequence so far could forget.
        kept_columns: Those that some policy so far reads. The others are not moved: turns stay 0,
            all else means nothing. Who wants to look at more names it before the first request.

    Columns widen when first needed, never while a step is in flight: tokens by doubling, tables as
    `plan_width` has it.
    ``running`` lists the rows in order of admission; ``runs`` says of each row whether it is one.
    """

    def __init__(self, max_num_seqs: int, block_size: int, num_groups: int = 1) -> None:
        rows = max_num_seqs
        self.block_size = block_size
        self.num_rows = rows
        self.num_groups = num_groups
        self.seq_id: Int64 = np.full(rows, FREE, np.int64)
        self.num_prompt: Int32 = np.zeros(rows, np.int32)
        self.num_known: Int32 = np.zeros(rows, np.int32)
        self.num_computed: Int32 = np.zeros(rows, np.int32)
        self.limit: Int32 = np.zeros(rows, np.int32)
        self.max_blocks: Int32 = np.zeros(rows, np.int32)
        self.priority: Int32 = np.zeros(rows, np.int32)
        self.urgency: Int64 = np.zeros(rows, np.int64)
        self.evicts: Bool = np.zeros(rows, np.bool_)
        self.policy_id: Int32 = np.full(rows, -1, np.int32)
        self.rotates: Bool = np.zeros(rows, np.bool_)
        self.keeps_scores = False
        self.kept_columns: tuple[str, ...] = ()
        self.publishes: Bool = np.ones(rows, np.bool_)
        self.forked: Bool = np.zeros(rows, np.bool_)
        self.tenant: Int32 = np.zeros(rows, np.int32)
        self.num_resident: Int32 = np.zeros((num_groups, rows), np.int32)
        self.num_blocks: Int32 = np.zeros((num_groups, rows), np.int32)
        self.ragged: Bool = np.zeros(rows, np.bool_)
        self.tail: Int32 = np.zeros((num_groups, rows), np.int32)
        self.token_ids: Int32 = np.zeros((rows, FIRST_BLOCKS * block_size), np.int32)
        self.next_position: Int32 = np.zeros(rows, np.int32)
        self.num_evicted: Int64 = np.zeros(rows, np.int64)
        self.cumulative: Float64 = np.zeros(rows, np.float64)
        self.forfeited: Float64 = np.zeros(rows, np.float64)
        self.left_out: Float64 = np.zeros(rows, np.float64)
        self.by_token: Bool = np.zeros(rows, np.bool_)
        self.tokens = TokenColumns(num_groups, rows)
        self.prompt_logprobs: Int32 = np.full(rows, -1, np.int32)
        self.num_scored: Int32 = np.zeros(rows, np.int32)
        self.replay_until: Int32 = np.zeros(rows, np.int32)
        entries = (num_groups, rows, FIRST_BLOCKS)
        self.block_table: Int32 = np.zeros(entries, np.int32)
        self.first_position: Int32 = np.zeros(entries, np.int32)
        self.turn: Int32 = np.zeros(entries, np.int32)
        self.score: Float32 = np.zeros(entries, np.float32)
        self.weight: Float32 = np.zeros(entries, np.float32)
        self.mass: Float32 = np.zeros(entries, np.float32)
        self.sampling = SamplingColumns(rows)
        self.sequences: list[Sequence | None] = [None] * rows
        self.num_free_rows = rows
        self.running: Int32 = np.zeros(0, np.int32)
        self.runs: Bool = np.zeros(rows, np.bool_)

    @property
    def free_rows(self) -> Int32:
        """Rows that no running or reserved sequence holds, lowest first."""
        return np.flatnonzero(self.seq_id == FREE).astype(np.int32)

    def tables_of(self, rows: Int32) -> Int64:
        """Return the tables of rows, [B], counted group after group: [groups * B]."""
        first = np.arange(self.num_groups)[:, None] * self.num_rows
        tables: Int64 = (first + rows).ravel()
        return tables

    def bind(self, seq: Sequence, row: int, stop_ids: list[int]) -> None:
        """Write a sequence's facts into a row: its tokens, limits and sampling columns.

        Effect: the row counts as taken, with nothing computed and no blocks. It runs once
        `start` is called.
        """
        params = seq.request.sampling
        known = len(seq.token_ids)
        self.reserve_tokens(known + 1)
        self.token_ids[row, :known] = seq.token_ids
        self.seq_id[row] = seq.seq_id
        self.num_prompt[row] = seq.num_prompt
        self.num_known[row] = known
        self.num_computed[row] = 0
        self.next_position[row] = 0
        self.num_evicted[row] = 0
        self.forfeited[row] = 0
        self.left_out[row] = 0
        self.by_token[row] = False
        self.replay_until[row] = 0
        self.num_resident[:, row] = 0
        self.num_blocks[:, row] = 0
        self.ragged[row] = False
        most = seq.max_len if params.max_tokens is None else seq.num_prompt + params.max_tokens
        self.limit[row] = min(most, seq.max_len)
        self.max_blocks[row] = seq.max_blocks
        self.priority[row] = seq.request.priority
        self.urgency[row] = seq.urgency
        self.evicts[row] = seq.policy.evicts
        self.keeps_scores |= seq.policy.evicts
        self.forked[row] = False
        self.publishes[row] = True
        self.tenant[row] = seq.tenant_id
        self.sampling.bind(seq, row, stop_ids)
        self.cumulative[row] = seq.cumulative
        wanted = params.prompt_logprobs
        self.prompt_logprobs[row] = -1 if wanted is None else wanted
        self.num_scored[row] = seq.num_scored
        self.sequences[row] = seq
        self.num_free_rows -= 1

    def start(self, row: int) -> None:
        """Append a bound row to the order of running."""
        self.running = np.concatenate((self.running, np.array((row,), np.int32)))
        self.runs[row] = True

    def publishable(self, rows: Int32) -> Bool:
        """Return whether what rows compute may be found: [B].

        Only if every token before it was resident when it was computed, and none of it is from
        before the cache was reset.
        """
        may: Bool = self.publishes[rows]
        return may & (self.num_evicted[rows] == 0) if self.keeps_scores else may

    def release(self, rows: Int32) -> None:
        """Free rows; their blocks must have been released before."""
        for row in rows.tolist():  # one at a time, for slices of a row cost a tenth of a scatter
            self.seq_id[row] = FREE
            self.num_blocks[:, row] = 0
            self.block_table[:, row] = 0
            if self.rotates[row]:
                self.turn[:, row] = 0
            self.num_resident[:, row] = 0
            self.sequences[row] = None
            self.runs[row] = False
        self.num_free_rows += len(rows)
        self.running = self.running[self.runs[self.running]]

    def reserve_tokens(self, width: int) -> None:
        """Make ``token_ids`` at least ``width`` wide, and as wide as whole blocks are."""
        before, size = self.token_ids.shape[1], self.block_size
        if width > before:
            self.token_ids = self._widened(
                self.token_ids, max(-(-width // size) * size, 2 * before)
            )

    def reserve_blocks(self, width: int) -> None:
        """Make ``block_table`` and what stands beside it at least ``width`` wide."""
        if width > self.block_table.shape[-1]:
            for name in ENTRY_COLUMNS:
                kept = name in ("block_table", *self.kept_columns)
                column = getattr(self, name)[..., : None if kept else 0]
                setattr(self, name, self._widened(column, plan_width(width)))

    def _widened(self, array: Int32, width: int) -> Int32:
        """Return a column [..., rows, width] as much wider as asked; free rows lose theirs."""
        # Fresh zeros cost no memory until they are written.
        wider = np.zeros((*array.shape[:-1], width), array.dtype)
        taken = at_rows((self.seq_id != FREE).nonzero()[0])
        wider[..., taken, : array.shape[-1]] = array[..., taken, :]
        return wider

    def append_blocks(self, rows: Int32, counts: Int32, ids: Int32) -> None:
        """Append blocks to tables, for the tokens that come next; they have no scores yet.

        Args:
            rows: [B] Rows, each at most once.
            counts: [groups, B] Blocks each table gains; [1, B] if it is the same in every group.
            ids: [N] Block ids, table after table, group after group.
        """
        if not len(ids):
            return
        if self.num_groups == len(rows) == 1 and not self.kept_columns:  # a prompt
            self._append_run(int(rows[0]), ids)
            return
        # Flat indices: looking up by group, row and entry takes several times as long.
        where = np.flatnonzero(counts != 0)
        if self.num_groups == 1:
            table: Int64 = rows[where].astype(np.int64)  # entries may be more than 2**31
        elif len(counts) == 1:
            table = self.tables_of(rows[where])
        else:
            group, member = np.divmod(where, len(rows))
            table = group * self.num_rows + rows[member]
        index = self.num_blocks.ravel()[table]
        if len(ids) > len(table):  # some gain more than one
            many = np.resize(counts.ravel()[where], len(table))
            begin = np.repeat(np.cumsum(many) - many, many)
            table = np.repeat(table, many)
            index = np.repeat(index, many) + (np.arange(len(ids)) - begin).astype(np.int32)
        self.reserve_blocks(int(index.max()) + 1)
        entry = table * self.block_table.shape[2] + index
        self.block_table.reshape(-1)[entry] = ids
        # Of a table that gains several, the last stands.
        self.num_blocks.reshape(-1)[table] = index + 1
        self.tail.reshape(-1)[table] = ids
        if "first_position" in self.kept_columns:
            ahead = index * self.block_size - self.num_resident.ravel()[table]
            computed = self.num_computed[table % self.num_rows]
            self.first_position.reshape(-1)[entry] = computed + ahead
        for name in self.kept_columns:
            if name in SCORE_COLUMNS:
                getattr(self, name).reshape(-1)[entry] = 0

    def _append_run(self, row: int, ids: Int32) -> None:
        """Append blocks to a row's only table, of which nothing is kept."""
        first = int(self.num_blocks[0, row])
        end = first + len(ids)
        self.reserve_blocks(end)
        self.block_table[0, row, first:end] = ids
        self.num_blocks[0, row], self.tail[0, row] = end, ids[-1]

    def drop_blocks(self, rows: Int32, holes: Holes) -> Int32:
        """Drop table entries, of full blocks, and close the gaps; the order of the rest stands.

        Args:
            rows: [B] Rows, each at most once. All rotate or none does, unless what goes lies before
                all that stays: then nothing turns.
            holes: Which entries go; all of them are in use.

        Returns:
            The dropped block ids, each table's tail first.
        """
        table = self.tables_of(rows)
        gaps = close_gaps(holes, self.block_table.shape[2])
        for name in self.kept_columns:
            turns = name == "turn" and self.rotates[rows[0]]
            # Nearer by all that went; but it has moved up itself for what went before it.
            less = gaps.behind * np.int32(self.block_size) if turns else None
            gaps.close(getattr(self, name), table, less)
        dropped: Int32 = gaps.close(self.block_table, table).reshape(-1).take(gaps.gone)
        by_token = self.by_token[rows]
        if by_token.any():
            resident = self.num_resident[:, rows[by_token]]
            gone = holes.mask[:, by_token]
            self.tokens.drop_blocks(rows[by_token], gone, resident, self.block_size)
        self.ragged[rows] |= (holes.lost != holes.lost[:1]).any(axis=0)
        self.num_blocks.reshape(-1)[table] -= gaps.lost
        self.num_resident.reshape(-1)[table] -= gaps.lost * np.int32(self.block_size)
        return dropped

    def replace_blocks(self, rows: Int32, blocks: Int32, num_blocks: Int32) -> None:
        """Give rows that evict by token other blocks for the tokens that stayed.

        Args:
            rows: [B] Rows; ``tokens`` knows already which tokens stayed.
            blocks: [groups, B, width] Their blocks.
            num_blocks: [groups, B] How many of those are in use.
        """
        width = blocks.shape[2]
        self.block_table[:, rows] = 0
        self.block_table[:, rows, :width] = blocks * (np.arange(width) < num_blocks[:, :, None])
        self.num_blocks[:, rows] = num_blocks
        last = np.maximum(num_blocks - 1, 0)[:, :, None]
        self.tail[:, rows] = np.take_along_axis(blocks, last, axis=2)[:, :, 0]

    def note_tokens(self, rows: Int32, counts: Int32) -> None:
        """Let rows that evict by token, [B], know the tokens that come next; their blocks are
        there.
        """
        width = int(self.num_blocks[:, rows].max()) * self.block_size
        self.reserve_slots(width)
        self.tokens.append(rows, self.num_resident[:, rows], self.num_computed[rows], counts)

    def reserve_slots(self, width: int) -> None:
        """Make ``tokens`` at least ``width`` wide."""
        self.tokens.reserve(width, np.flatnonzero(self.by_token).astype(np.int32))

    def copy_entries(self, parents: Int32, children: Int32) -> None:
        """Give each child the block tables, scores and progress of its parent: [N] rows each."""
        for name in ("block_table", *self.kept_columns):
            column = getattr(self, name)
            column[:, children] = column[:, parents]
        for name in PROGRESS_COLUMNS:
            column = getattr(self, name)
            column[..., children] = column[..., parents]
        self.tail[:, children] = self.tail[:, parents]
        at = np.flatnonzero(self.by_token[parents])
        if len(at):
            self.tokens.copy(parents[at], children[at])

    def blocks_of(self, row: int) -> Int32:
        """Return a row's blocks, the tails of all groups first: [N] ids.

        Freed in this order, the blocks that hold one stretch of tokens are reclaimed together.
        """
        if self.num_groups == 1:
            own: Int32 = self.block_table[0, row, : self.num_blocks[0, row]][::-1].copy()
            return own
        count = self.num_blocks[:, row, None]
        at = count - 1 - np.arange(count.max())
        ids = np.take_along_axis(self.block_table[:, row], np.maximum(at, 0), axis=1)
        blocks: Int32 = ids.T[at.T >= 0]
        return blocks

    def append_tokens(self, rows: Int32, token_ids: Int32) -> Int32:
        """Append one generated token to each row; return how many tokens each then knows: [B]."""
        known = self.num_known[rows]
        self.reserve_tokens(int(known.max(initial=0)) + 1)
        self.token_ids[rows, known] = token_ids
        self.num_known[rows] = known = known + 1
        return known

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold."""
        rows = self.running
        assert len(np.unique(rows)) == len(rows), "a row runs twice"
        assert self.runs.sum() == len(rows) == self.runs[rows].sum(), "runs and running disagree"
        assert (self.seq_id[rows] != FREE).all(), "a free row runs"
        assert (self.num_computed[rows] <= self.num_known[rows]).all(), "computed unknown tokens"
        assert (self.num_resident[:, rows] <= self.num_computed[rows]).all(), "resident uncomputed"
        unused = np.arange(self.block_table.shape[2]) >= self.num_blocks[:, :, None]
        assert not (self.block_table * unused).any(), "an entry that is not in use names a block"
        for lengths in (self.num_blocks, self.num_resident):
            assert ((lengths == lengths[:1]) | self.ragged).all(), "tables differ in length unnoted"
        last = np.maximum(self.num_blocks - 1, 0)[:, :, None]
        tail = np.take_along_axis(self.block_table, last, axis=2)[:, :, 0]
        begun = self.num_resident % self.block_size > 0
        assert ((self.tail == tail) | ~begun).all(), "a tail is not the last block of its table"
        still = unused | ~self.rotates[:, None]
        assert not (self.turn * still).any(), "a turn without a block, or without need"
        free = self.seq_id == FREE
        assert self.num_free_rows == free.sum(), "free rows are miscounted"
        assert (self.num_blocks[:, free] == 0).all(), "a free row holds blocks"
        assert all((s is None) == f for s, f in zip(self.sequences, free, strict=True)), (
            "a row and its sequence disagree"
        )
