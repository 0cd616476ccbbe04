"""Blocks for sequences: the only writer of pool and sequence table."""

from collections.abc import Callable

import numpy as np

from pagedkv.config import CacheConfig
from pagedkv.core.arrays import Bool, Int32, Int64, at_rows
from pagedkv.core.batch import Batch
from pagedkv.core.compaction import Repacking, repack
from pagedkv.core.gaps import Holes
from pagedkv.core.pool import BlockPool
from pagedkv.core.prefix import PrefixIndex, extend_chain
from pagedkv.core.publisher import NOTHING_SEALED, Publisher, Sealed
from pagedkv.core.request import Sequence
from pagedkv.core.table import SequenceTable
from pagedkv.errors import ConfigError
from pagedkv.events import KVEvent

__all__ = ["BlockManager"]

DEFAULT_NUM_BLOCKS = 1024
NO_BLOCKS: Int32 = np.empty(0, np.int32)
NO_COPIES: Int32 = np.empty((0, 2), np.int32)
NO_MOVES: Int64 = np.empty((0, 2), np.int64)


class BlockManager:
    """Gives blocks to sequences, shares them, copies them on write and takes them back.

    Methods come in pairs: a question that changes nothing (`missing_blocks`, `shortfall`) and the
    command it guards (`admit`, `grow`). A command whose question was answered well cannot fail.
    """

    def __init__(self, config: CacheConfig, max_num_seqs: int, num_groups: int = 1) -> None:
        if num_groups < 1:
            raise ConfigError(
                f"num_groups is {num_groups}", where="num_groups", remedy="give 1 or more"
            )
        self.block_size = config.block_size
        self.num_groups = num_groups
        self.enable_prefix_caching = config.enable_prefix_caching
        num_blocks = config.num_blocks or DEFAULT_NUM_BLOCKS
        self.pool = BlockPool(num_blocks, config.reclaim)
        self.table = SequenceTable(max_num_seqs, config.block_size, num_groups)
        self.index = PrefixIndex(num_blocks, num_groups)
        self._moves: list[Int64] = []
        # Is told which cached blocks were just given to somebody else.
        self.on_reclaim: Callable[[Int32], object] | None = None
        self.publisher = Publisher(
            self.pool, self.table, self.index, records=config.enable_kv_cache_events
        )

    # Admission

    def find_prefix(self, seq: Sequence) -> Int32:
        """Return the cached blocks that a waiting sequence can start from: [hits, groups].

        One token is always left to compute, for its logits, and more if its policy has to see
        them computed.
        """
        if not self.enable_prefix_caching:
            return np.zeros((0, self.num_groups), np.int32)
        return self.index.match(self.usable_hashes(seq))

    def usable_hashes(self, seq: Sequence) -> list[bytes]:
        """Return the hashes of the blocks that a waiting sequence could start from."""
        own = seq.fork_at if seq.siblings else len(seq.token_ids)
        usable = min(own - 1, seq.max_prefix) // self.block_size
        salt = seq.request.cache_salt
        extend_chain(seq.hashes, seq.token_ids, usable, self.block_size, salt)
        return seq.hashes[:usable]

    def missing_blocks(self, seq: Sequence, hits: Int32) -> int:
        """Return how many available blocks a sequence takes to compute all its known tokens.

        A hit that nobody holds counts: adopting it makes it unavailable to others.
        """
        full = min(-(-len(seq.token_ids) // self.block_size), seq.max_blocks) - len(hits)
        revived = int((self.pool.references(hits) == 0).sum()) if len(hits) else 0
        return full * self.num_groups + revived

    def pledged_blocks(self, rows: Int32) -> int:
        """Return how many blocks rows still need for the tokens they already know."""
        table, at = self.table, at_rows(rows)
        # Of what was forgotten no more is needed.
        tokens = table.num_resident[:, at] + (table.num_known[at] - table.num_computed[at])
        known = np.minimum(-(-tokens // self.block_size), table.max_blocks[at])
        return int(np.maximum(known - table.num_blocks[:, at], 0).sum())

    def num_distinct(self, rows: Int32 | Int64) -> int:
        """Return how many blocks rows hold, those that several hold counted once."""
        held = self.table.num_blocks[:, rows]
        width = int(held.max(initial=0))
        used = np.arange(width) < held[:, :, None]
        return len(np.unique(self.table.block_table[:, rows, :width][used]))

    def admit(self, seq: Sequence, hits: Int32) -> None:
        """Let a bound sequence start from the blocks that `find_prefix` returned."""
        row, count = seq.row, len(hits)
        tokens = count * self.block_size
        if not count:  # a bound row is empty
            return
        self.pool.share(hits.ravel())
        counts = np.full((self.num_groups, 1), count, np.int32)
        rows = np.array([row], np.int32)
        self.table.append_blocks(rows, counts, hits.T.ravel())
        if self.table.by_token[row]:
            self.table.note_tokens(rows, np.array([tokens], np.int32))
        self.table.num_computed[row] = tokens
        self.table.next_position[row] = tokens
        self.table.num_resident[:, row] = tokens
        if not seq.num_preemptions:  # what a preempted one finds again is its own, and no merit
            seq.num_cached_tokens = tokens
            self.pool.cached.hit(hits.ravel(), seq.request.priority)

    # Growth

    def shortfall(self, batch: Batch) -> int:
        """Return how many blocks are lacking for `grow` with the same batch; 0 is enough."""
        # Whatever their tails are, each takes at most this many.
        most = batch.num_tokens // self.block_size + (3 if batch.forked else 1) * len(batch.rows)
        if most * self.num_groups <= self.pool.num_available:
            return 0
        fresh, copied = self._needs(batch)
        num_copies = 0 if copied is None else int(copied.sum())
        return max(0, self._count(fresh) + num_copies - self.pool.num_available)

    def grow(self, batch: Batch) -> Int32:
        """Give each row the slots that its next tokens are written to.

        A shared block that a row would write into is replaced by a copy of its own first.

        Args:
            batch: Rows and the tokens that each is about to write, at least 1.

        Returns:
            [C, 2] Blocks to copy before writing, source to target.

        Raises:
            OutOfBlocks: `shortfall` is not 0; nothing changes.
        """
        fresh, copied = self._needs(batch)
        num_copies = 0 if copied is None else int(copied.sum())
        ids = self.allocate(num_copies + self._count(fresh))
        copies = NO_COPIES
        if copied is not None and num_copies:
            copies = self._unshare(batch.rows, copied, ids[:num_copies])
        self.table.append_blocks(batch.rows, fresh, ids[num_copies:])
        return copies

    def grow_one(self, row: int, count: int) -> None:
        """Give a row that shares no block it writes to the slots for its next ``count`` tokens."""
        table, rows = self.table, np.array((row,), np.int32)
        end = -(-(table.num_resident[:, row] + count) // self.block_size)
        fresh = end - table.num_blocks[:, row]
        table.append_blocks(rows, fresh[:, None], self.allocate(int(fresh.sum())))

    def _needs(self, batch: Batch) -> tuple[Int32, Bool | None]:
        """Return the blocks to append and which tails to copy, None for none: both [groups, B].

        Of the former only [1, B] if they are the same in every group.
        """
        table, at, size, groups = self.table, batch.at, self.block_size, batch.groups
        resident = table.num_resident[groups, at]
        fresh = (resident + (batch.counts + (size - 1))) // size - table.num_blocks[groups, at]
        # Only forks share a block that is not full: elsewhere there is nothing to look up.
        if not batch.forked:
            return fresh, None
        inside = resident % size > 0
        tails = table.tail[:, at]
        shared = inside & (self.pool.references(tails) > 1)
        if shared.any():
            # If every holder of a block writes now, the last of them may keep it.
            ids, last, writers = np.unique(
                tails[shared][::-1], return_index=True, return_counts=True
            )
            keeps = last[writers == self.pool.references(ids)]
            where = np.flatnonzero(shared)
            shared.flat[where[len(where) - 1 - keeps]] = False
        return fresh, shared

    def _count(self, fresh: Int32) -> int:
        """Return how many blocks there are to append in all groups."""
        return int(fresh.sum()) * (self.num_groups // len(fresh))

    def num_copies(self, rows: Int32) -> int:
        """Return how many tail blocks rows would have to copy to write on, all of them now."""
        copied = self._needs(Batch(self.table, rows, np.ones(len(rows), np.int32)))[1]
        return 0 if copied is None else int(copied.sum())

    def _unshare(self, rows: Int32, copied: Bool, targets: Int32) -> Int32:
        table, (group, member) = self.table, np.nonzero(copied)
        at = rows[member]
        sources = table.tail[group, at]
        table.block_table[group, at, table.num_blocks[group, at] - 1] = targets
        table.tail[group, at] = targets
        self.pool.release(sources, self.index.findable(sources))
        return np.stack([sources, targets], axis=1)

    def allocate(self, count: int) -> Int32:
        """Take blocks, each with one reference; reclaimed ones become unfindable: [count] ids.

        Raises:
            OutOfBlocks: Fewer are available; nothing changes.
        """
        if not count:
            return NO_BLOCKS
        reclaimed = self.pool.num_reclaimed
        ids = self.pool.allocate(count)
        if reclaimed != self.pool.num_reclaimed:
            cached = ids[reclaimed - self.pool.num_reclaimed :]  # so findable; blank ones are not
            self.publisher.withdraw(cached)
            if self.on_reclaim is not None:
                self.on_reclaim(cached)
        return ids

    # After a step

    def advance(self, batch: Batch, sealed: Sealed | None = None) -> None:
        """Count tokens as computed and make findable what `about_to_fill` said, or says now."""
        table, at, counts = self.table, batch.at, batch.counts
        if len(batch.by_token):
            table.note_tokens(batch.rows[batch.by_token], counts[batch.by_token])
        if sealed is None:
            sealed = self.about_to_fill(batch)
        table.num_computed[at] += counts
        table.num_resident[:, at] += counts
        table.next_position[at] += counts
        if len(sealed.rows):
            self.publisher.seal(sealed)

    def about_to_fill(self, batch: Batch) -> Sealed:
        """Return the blocks that a batch's tokens, which are known, fill and that may be found."""
        return self.publisher.filled(batch) if self.enable_prefix_caching else NOTHING_SEALED

    def fork(self, row: int, children: Int32) -> None:
        """Give rows without blocks the same blocks and progress as ``row``, shared."""
        self.table.forked[row] = self.table.forked[children] = True
        self.table.copy_entries(np.full_like(children, row), children)
        for _ in children:
            self.pool.share(self.table.blocks_of(row))

    def take_over(self, children: Int32, parents: Int32) -> None:
        """Let rows go on as others, whose tokens, blocks and progress they share from here on.

        What they held themselves is released. No bytes move until one writes into a shared block.

        Args:
            children: [N] Forked rows, each once.
            parents: [N] Rows, none of them a child.
        """
        table, columns = self.table, (children, parents)
        left, gained = (self._tails_first(rows) for rows in columns)
        self.pool.share(gained)
        self.pool.release(left, self.index.findable(left))
        table.copy_entries(parents, children)
        table.token_ids[children] = table.token_ids[parents]
        table.num_known[children] = table.num_known[parents]
        table.num_scored[children] = table.num_scored[parents]
        for child, parent in zip(children.tolist(), parents.tolist(), strict=True):
            seq, other = table.sequences[child], table.sequences[parent]
            assert seq is not None
            assert other is not None
            seq.follow(other)

    def _tails_first(self, rows: Int32) -> Int32:
        """Return the blocks of rows, each row's tails first: [N] ids."""
        held = self.table.num_blocks[:, rows]
        width = int(held.max(initial=0))
        used = np.arange(width) < held[:, :, None]
        ids = self.table.block_table[:, rows, :width]
        order = (1, 2, 0)
        blocks: Int32 = ids.transpose(order)[:, ::-1][used.transpose(order)[:, ::-1]]
        return blocks

    def drop(self, rows: Int32, holes: Holes) -> None:
        """Take table entries from running rows; blocks that others share stay theirs.

        Args:
            rows: [B] Rows, as for `SequenceTable.drop_blocks`.
            holes: Which entries go: in use, and full.
        """
        ids = self.table.drop_blocks(rows, holes)
        self.pool.release(ids, self.index.findable(ids))

    def compact(self, rows: Int32, keep: Bool) -> tuple[Int32, Int32]:
        """Take single tokens from running rows and pack the rest into the fewest blocks.

        A block whose slots change is given up and a fresh one taken, so that nothing is ever
        written into what others hold or may find; the moves go out with the next plan. Only where
        given up blocks are held by others can fresh ones be lacking: such rows have lost the
        tokens all the same, but hold their old blocks and must be preempted at once.

        Args:
            rows: [B] Rows that evict by token, each at most once, first admitted first.
            keep: [groups, B, width] Which slots' tokens stay; width in whole blocks.

        Returns:
            [groups, B] Tokens that each table lost, and the rows that could not be served.
        """
        table, shape = self.table, (self.num_groups, len(rows), -1)
        resident = table.num_resident[:, rows]
        keep = np.logical_and(keep, np.arange(keep.shape[2]) < resident[:, :, None])
        packed = repack(keep.reshape(-1, keep.shape[2]), resident.ravel(), self.block_size)
        width = packed.entry.shape[1]
        old = table.block_table[:, rows, :width].reshape(-1, width)
        used = np.arange(width) < table.num_blocks[:, rows].ravel()[:, None]
        leaving = used & ~packed.stays
        served = self._served(old, leaving, packed.fresh, len(rows))
        goes = np.tile(served, self.num_groups)
        ids = old[:, ::-1][(leaving & goes[:, None])[:, ::-1]]
        self.pool.release(ids, self.index.findable(ids))
        fresh = packed.fresh & goes[:, None]
        new = np.take_along_axis(old, np.maximum(packed.entry, 0), axis=1)
        new[fresh] = self.allocate(int(fresh.sum()))
        self._move(packed, goes, old, new)
        table.tokens.keep(rows, keep)
        table.num_resident[:, rows] = left = keep.sum(axis=2)
        table.ragged[rows] = self.num_groups > 1
        num_blocks = packed.num_blocks.reshape(shape[:2])[:, served]
        table.replace_blocks(rows[served], new.reshape(shape)[:, served], num_blocks)
        return resident - left, rows[~served]

    def _served(self, old: Int32, leaving: Bool, fresh: Bool, num_rows: int) -> Bool:
        """Return which rows the pool has fresh blocks for: [B], the first admitted first."""
        served = np.ones(num_rows, np.bool_)
        while True:
            goes = np.tile(served, self.num_groups)[:, None]
            ids, drops = np.unique(old[leaving & goes], return_counts=True)
            freed = int((self.pool.references(ids) == drops).sum())
            if int((fresh & goes).sum()) <= self.pool.num_available + freed:
                return served
            served[np.flatnonzero(served)[-1]] = False

    def _move(self, packed: Repacking, goes: Bool, old: Int32, new: Int32) -> None:
        size = self.block_size
        at = goes[packed.table]
        of, source, target = (x[at] for x in (packed.table, packed.source, packed.target))
        slots = (
            old[of, source // size].astype(np.int64) * size + source % size,
            new[of, target // size].astype(np.int64) * size + target % size,
        )
        moved = slots[0] != slots[1]  # a block that was given up may be the one that comes back
        self._moves.append(np.stack(slots, axis=1)[moved])

    def take_moves(self) -> Int64:
        """Return the slots to copy before anything else, source to target: [M, 2].

        All sources are read before any target is written. They are handed out once. Those of a
        row that has ended since do no harm: what its blocks are used for next is written later.
        """
        taken, self._moves = self._moves, []
        return np.concatenate(taken) if taken else NO_MOVES

    def holders(self, blocks: Int64) -> Bool:
        """Return which running rows hold any of these blocks: [running]."""
        rows = self.table.running
        used = np.arange(self.table.block_table.shape[2]) < self.table.num_blocks[:, rows, None]
        found: Bool = np.isin(self.table.block_table[:, rows], blocks)
        holding: Bool = np.any(found & used, axis=(0, 2))
        return holding

    def release(self, rows: Int32) -> None:
        """Take back the blocks of rows and free the rows; findable blocks stay cached."""
        for row in rows.tolist():
            ids = self.table.blocks_of(row)
            self.pool.release(ids, self.index.findable(ids))
        self.table.release(rows)

    def disown(self, row: int) -> None:
        """Make the blocks that a row holds unfindable: their content is not to be trusted."""
        ids = self.table.blocks_of(row)
        self.publisher.withdraw(ids[self.index.findable(ids)])

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; blocks that sequences hold stay theirs, and unfindable."""
        self.table.publishes[:] = False
        self.publisher.clear()

    def take_events(self) -> list[KVEvent]:
        """Return the events since the last call, oldest first."""
        return self.publisher.take_events()

    def audit(self) -> None:
        """Check pool, table and index, and recount every reference from the tables."""
        self.pool.audit()
        self.table.audit()
        self.index.audit()
        references = np.zeros(self.pool.num_blocks, np.int64)
        for row in np.flatnonzero(self.table.num_blocks[0]).tolist():
            np.add.at(references, self.table.blocks_of(row), 1)
        assert (references == self.pool.ref_count).all(), "a reference count is not its tables' sum"
        held = self.table.num_blocks * self.block_size
        assert (self.table.num_resident <= held).all(), "tokens are resident outside any block"
        every = np.arange(self.pool.num_blocks, dtype=np.int32)
        idle = self.index.findable(every) & (self.pool.ref_count == 0)
        assert int(idle.sum()) == self.pool.num_cached, "cached and findable disagree"
