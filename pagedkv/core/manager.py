"""Blocks for sequences: the only writer of pool, sequence table and prefix index."""

from collections.abc import Callable

import numpy as np

from pagedkv.config import CacheConfig
from pagedkv.core.arrays import Bool, Int32, Int64, at_rows
from pagedkv.core.compaction import Repacking, repack
from pagedkv.core.pool import BlockPool
from pagedkv.core.prefix import PrefixIndex, block_digest, extend_chain, runs
from pagedkv.core.request import Request, Sequence
from pagedkv.core.table import SequenceTable
from pagedkv.errors import ConfigError
from pagedkv.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, short_hash

__all__ = ["BlockManager"]

DEFAULT_NUM_BLOCKS = 1024


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
        self._events: list[KVEvent] | None = [] if config.enable_kv_cache_events else None

    # Admission

    def find_prefix(self, seq: Sequence) -> Int32:
        """Return the cached blocks that a waiting sequence can start from: [hits, groups].

        One token is always left to compute, for its logits, and more if its policy has to see
        them computed.
        """
        if not self.enable_prefix_caching:
            return np.zeros((0, self.num_groups), np.int32)
        usable = min(len(seq.token_ids) - 1, seq.max_prefix) // self.block_size
        salt = seq.request.cache_salt
        extend_chain(seq.hashes, seq.token_ids, usable, self.block_size, salt)
        return self.index.match(seq.hashes[:usable])

    def missing_blocks(self, seq: Sequence, hits: Int32) -> int:
        """Return how many available blocks a sequence takes to compute all its known tokens.

        A hit that nobody holds counts: adopting it makes it unavailable to others.
        """
        full = min(-(-len(seq.token_ids) // self.block_size), seq.max_blocks) - len(hits)
        revived = int((self.pool.ref_count[hits] == 0).sum())
        return full * self.num_groups + revived

    def pledged_blocks(self, rows: Int32) -> int:
        """Return how many blocks rows still need for the tokens they already know."""
        known = -(-self.table.num_known[rows] // self.block_size)
        need = np.minimum(known, self.table.max_blocks[rows]) - self.table.num_blocks[:, rows]
        return int(np.maximum(need, 0).sum())

    def admit(self, seq: Sequence, hits: Int32) -> None:
        """Let a bound sequence start from the blocks that `find_prefix` returned."""
        row, count = seq.row, len(hits)
        tokens = count * self.block_size
        self.pool.share(hits.ravel())
        counts = np.full((self.num_groups, 1), count, np.int32)
        rows = np.array([row], np.int32)
        self.table.append_blocks(rows, counts, hits.T.ravel())
        self.table.note_tokens(rows, np.array([tokens], np.int32))
        self.table.num_computed[row] = tokens
        self.table.next_position[row] = tokens
        self.table.num_resident[:, row] = tokens
        if not seq.num_preemptions:  # what a preempted one finds again is its own, and no merit
            seq.num_cached_tokens = tokens
            self.pool.cached.hit(hits.ravel(), seq.request.priority)

    # Growth

    def shortfall(self, rows: Int32, counts: Int32) -> int:
        """Return how many blocks are lacking for `grow` with the same arguments; 0 is enough."""
        most = int(counts.sum()) // self.block_size + 3 * len(rows)  # whatever their tails are
        if most * self.num_groups <= self.pool.num_available:
            return 0
        fresh, copied = self._needs(rows, counts)
        return max(0, int(fresh.sum() + copied.sum()) - self.pool.num_available)

    def grow(self, rows: Int32, counts: Int32) -> Int32:
        """Give each row the slots that its next tokens are written to.

        A shared block that a row would write into is replaced by a copy of its own first.

        Args:
            rows: [B] Rows, each at most once.
            counts: [B] Tokens that each is about to write, at least 1.

        Returns:
            [C, 2] Blocks to copy before writing, source to target.

        Raises:
            OutOfBlocks: `shortfall` is not 0; nothing changes.
        """
        fresh, copied = self._needs(rows, counts)
        num_copies = int(copied.sum())
        ids = self.allocate(num_copies + int(fresh.sum()))
        copies = self._unshare(rows, copied, ids[:num_copies])
        self.table.append_blocks(rows, fresh, ids[num_copies:])
        return copies

    def _needs(self, rows: Int32, counts: Int32) -> tuple[Int32, Bool]:
        """Return the blocks to append and which tails to copy: both [groups, B]."""
        at = at_rows(rows)
        held = self.table.num_blocks[:, at]
        resident = self.table.num_resident[:, at]
        fresh = -(-(resident + counts) // self.block_size) - held
        # Only forks share a block that is not full: elsewhere there is nothing to look up.
        if not self.table.forked[rows].any():
            return fresh, np.zeros(fresh.shape, np.bool_)
        inside = resident % self.block_size > 0
        tails = self._tails(rows)
        shared = inside & (self.pool.ref_count[tails] > 1)
        if shared.any():
            # If every holder of a block writes now, the last of them may keep it.
            ids, last, writers = np.unique(
                tails[shared][::-1], return_index=True, return_counts=True
            )
            keeps = last[writers == self.pool.ref_count[ids]]
            where = np.flatnonzero(shared)
            shared.flat[where[len(where) - 1 - keeps]] = False
        return fresh, shared

    def num_copies(self, rows: Int32) -> int:
        """Return how many tail blocks rows would have to copy to write on, all of them now."""
        return int(self._needs(rows, np.ones(len(rows), np.int32))[1].sum())

    def _tails(self, rows: Int32) -> Int32:
        """Return each table's last block, or 0 where it has none: [groups, B]."""
        last = np.maximum(self.table.num_blocks[:, rows] - 1, 0)
        groups = np.arange(self.num_groups)[:, None]
        tails: Int32 = self.table.block_table[groups, rows[None, :], last]
        return tails

    def _unshare(self, rows: Int32, copied: Bool, targets: Int32) -> Int32:
        if not len(targets):
            return np.empty((0, 2), np.int32)
        group, member = np.nonzero(copied)
        sources = self._tails(rows)[copied]
        at = rows[member]
        self.table.block_table[group, at, self.table.num_blocks[group, at] - 1] = targets
        self.pool.release(sources, self.index.findable(sources))
        return np.stack([sources, targets], axis=1)

    def allocate(self, count: int) -> Int32:
        """Take blocks, each with one reference; reclaimed ones become unfindable: [count] ids.

        Raises:
            OutOfBlocks: Fewer are available; nothing changes.
        """
        ids = self.pool.allocate(count)
        findable = ids[self.index.findable(ids)]
        self._unpublish(findable)
        if self.on_reclaim is not None and len(findable):
            self.on_reclaim(findable)
        return ids

    def _unpublish(self, findable: Int32) -> None:
        if len(findable):
            hashes, blocks = self.index.remove(findable)
            self.pool.forget(blocks)
            if self._events is not None:
                self._events.append(BlockRemoved(block_hashes=[short_hash(h) for h in hashes]))

    # After a step

    def advance(self, rows: Int32, counts: Int32) -> None:
        """Count tokens as computed and make the blocks they filled findable."""
        before = self.table.num_computed[rows]
        after = before + counts
        self.table.note_tokens(rows, counts)
        self.table.num_computed[rows] = after
        self.table.num_resident[:, at_rows(rows)] += counts
        self.table.next_position[rows] += counts
        if self.enable_prefix_caching:
            first, end = before // self.block_size, after // self.block_size
            sealed = np.flatnonzero(first != end)
            if len(sealed):
                sealed = sealed[self.table.publishable(rows[sealed])]
                self._publish(rows[sealed], first[sealed], end[sealed])

    def _publish(self, rows: Int32, first: Int32, end: Int32) -> None:
        """Make full blocks of rows findable, row after row: each row's from first to end."""
        table, counts = self.table, end - first
        digests = self._digests(rows, first, end)
        start = np.cumsum(counts) - counts
        member = np.repeat(np.arange(len(rows)), counts)
        # Blocks that left a sliding window without loss moved the later ones forward.
        gone = (table.num_computed[rows] - table.num_resident[:, rows]) // self.block_size
        index = np.arange(len(member)) + (first - start - gone)[:, member]
        blocks = table.block_table[np.arange(self.num_groups)[:, None], rows[member], index].T
        fresh = self.index.insert_many(digests, blocks)
        priorities = np.array([self._request(row).priority for row in rows.tolist()], np.int32)
        self.pool.cached.stored(blocks[fresh], priorities[member[fresh], None])
        if self._events is not None:
            for i, row in enumerate(rows.tolist()):
                own = [int(first[i] - start[i]) + new for new in fresh if member[new] == i]
                for begin, stop in runs(own):
                    self._events.append(self._stored(row, begin, stop))

    def _digests(self, rows: Int32, first: Int32, end: Int32) -> list[bytes]:
        """Return the hashes of the same blocks; what can be gathered is, at once."""
        table, size = self.table, self.block_size
        slots = first[:, None] * size + np.arange(size)
        content = table.token_ids[rows[:, None], slots].tobytes()
        stride = size * table.token_ids.itemsize
        digests: list[bytes] = []
        spans = zip(rows.tolist(), first.tolist(), end.tolist(), strict=True)
        for i, (row, block, stop) in enumerate(spans):
            seq = table.sequences[row]
            assert seq is not None
            hashes = seq.hashes
            if block and len(hashes) == block == stop - 1:
                hashes.append(block_digest(hashes[-1], content[i * stride : (i + 1) * stride]))
            else:
                extend_chain(hashes, table.token_ids[row], stop, size, seq.request.cache_salt)
            digests += hashes[block:stop]
        return digests

    def _request(self, row: int) -> Request:
        seq = self.table.sequences[row]
        assert seq is not None
        return seq.request

    def _stored(self, row: int, first: int, end: int) -> BlockStored:
        seq, size = self.table.sequences[row], self.block_size
        assert seq is not None
        hashes = seq.hashes
        return BlockStored(
            block_hashes=[short_hash(digest) for digest in hashes[first:end]],
            parent_block_hash=short_hash(hashes[first - 1]) if first else None,
            token_ids=self.table.token_ids[row, first * size : end * size].tolist(),
            block_size=size,
        )

    def fork(self, row: int, children: Int32) -> None:
        """Give rows without blocks the same blocks and progress as ``row``, shared."""
        self.table.forked[row] = self.table.forked[children] = True
        self.table.copy_entries(row, children)
        for _ in children:
            self.pool.share(self.table.blocks_of(row))

    def drop(self, rows: Int32, keep: Bool) -> Int32:
        """Take table entries from running rows; blocks that others share stay theirs.

        Args:
            rows: [B] Rows, each at most once.
            keep: [groups, B, width] Which entries stay; only whole blocks may go.

        Returns:
            [groups, B] Blocks that each table lost.
        """
        before = self.table.num_blocks[:, rows]
        ids = self.table.keep_blocks(rows, keep)
        self.pool.release(ids, self.index.findable(ids))
        lost: Int32 = before - self.table.num_blocks[:, rows]
        self.table.num_resident[:, rows] -= lost * self.block_size
        return lost

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
        num_blocks = packed.num_blocks.reshape(shape[:2])[:, served]
        table.replace_blocks(rows[served], new.reshape(shape)[:, served], num_blocks)
        return resident - left, rows[~served]

    def _served(self, old: Int32, leaving: Bool, fresh: Bool, num_rows: int) -> Bool:
        """Return which rows the pool has fresh blocks for: [B], the first admitted first."""
        served = np.ones(num_rows, np.bool_)
        while True:
            goes = np.tile(served, self.num_groups)[:, None]
            ids, drops = np.unique(old[leaving & goes], return_counts=True)
            freed = int((self.pool.ref_count[ids] == drops).sum())
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
        return np.concatenate(taken) if taken else np.zeros((0, 2), np.int64)

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
        self._unpublish(ids[self.index.findable(ids)])

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; blocks that sequences hold stay theirs, and unfindable."""
        self.table.publishes[:] = False
        self.pool.forget(self.index.clear())
        if self._events is not None:
            self._events.append(AllBlocksCleared())

    def take_events(self) -> list[KVEvent]:
        """Return the events since the last call, oldest first."""
        taken, self._events = self._events or [], None if self._events is None else []
        return taken

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
        idle = (self.index.entry_of >= 0) & (self.pool.ref_count == 0)
        assert int(idle.sum()) == self.pool.num_cached, "cached and findable disagree"
