"""Making blocks findable once they are computed, and unfindable again; and telling who listens."""

from collections.abc import Sequence as Ids
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.batch import Batch
from pagedkv.core.pool import BlockPool
from pagedkv.core.prefix import PrefixIndex, block_digest, extend_chain, runs
from pagedkv.core.table import SequenceTable
from pagedkv.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, short_hash

__all__ = ["NOTHING_SEALED", "Publisher", "Sealed"]


class Sealed(NamedTuple):
    """The blocks ``first`` to ``end`` of each row's tokens: full now, and not before.

    Attributes:
        rows: [N] Rows, each at most once.
        first, end: [N]
        digests: [(end - first).sum()] Their hashes, row after row.
        are_new: Whether these are known to be all different, and none findable.
    """

    rows: Int32
    first: Int32
    end: Int32
    digests: list[bytes]
    are_new: bool = False


NO_ROWS: Int32 = np.empty(0, np.int32)
NOTHING_SEALED = Sealed(NO_ROWS, NO_ROWS, NO_ROWS, [])


class Publisher:
    """The only writer of the prefix index.

    Args:
        records: Whether to keep events.
    """

    def __init__(
        self, pool: BlockPool, table: SequenceTable, index: PrefixIndex, *, records: bool
    ) -> None:
        self._pool = pool
        self._table = table
        self._index = index
        self._size = table.block_size
        self.records = records
        self._events: list[KVEvent] = []

    def filled(self, batch: Batch) -> Sealed:
        """Return the blocks that the tokens of a batch fill and that may be found."""
        before, size = self._table.num_computed[batch.at], self._size
        first, end = before // size, (before + batch.counts) // size
        at = (first != end).nonzero()[0]
        at = at[self._table.publishable(batch.rows[at])]
        return self._hashed(batch.rows[at], first[at], end[at]) if len(at) else NOTHING_SEALED

    def seal(self, sealed: Sealed) -> None:
        """Insert what `filled` gave, once its tokens are computed."""
        table, size = self._table, self._size
        rows, first, end, digests, are_new = sealed
        counts = end - first
        row, block = rows, first
        if len(digests) > len(rows):
            row = np.repeat(rows, counts)
            begin = np.repeat(np.cumsum(counts) - counts, counts)
            block = np.repeat(first, counts) + (np.arange(len(row)) - begin).astype(np.int32)
        # Blocks that left a sliding window without loss moved the later ones forward.
        gone = (table.num_computed[row] - table.num_resident[:, row]) // size
        groups = np.arange(table.num_groups)[:, None]
        blocks: Int32 = table.block_table[groups, row, block - gone].T
        fresh = self._index.insert_many(digests, blocks, new=are_new)
        if len(fresh) < len(digests):
            self._give_way(row, block - gone, digests, blocks)
        if self._pool.cached.order == "priority":
            self._pool.cached.stored(blocks[fresh], table.priority[row[fresh], None])
        if self.records:
            self._record(rows, first, counts, fresh)

    def publish(self, digests: list[bytes], blocks: Int32) -> None:
        """Insert sealed blocks of a single group, and keep no events: [N] hashes, which are all
        different and none findable, [N] blocks.
        """
        self._index.insert_many(digests, blocks[:, None], new=True)

    def _give_way(self, rows: Int32, index: Int32, digests: list[bytes], blocks: Int32) -> None:
        """Let sealed blocks whose content is findable elsewhere give way to those that hold it.

        A chain is then found from its root for as long as one of its holders keeps its leaf.

        Args:
            rows: [N] Whose blocks were sealed.
            index: [groups, N] Where they stand in their tables.
            digests: [N] Their hashes, which can all be found.
            blocks: [N, groups] The blocks.
        """
        found = self._index.blocks_of(digests)
        double = (found != blocks).any(axis=1).nonzero()[0]
        if not len(double):
            return
        self._pool.share(found[double].ravel())
        self._pool.release(blocks[double].ravel(), np.zeros(blocks[double].size, np.bool_))
        groups = np.arange(self._table.num_groups)[:, None]
        self._table.block_table[groups, rows[double], index[:, double]] = found[double].T

    def _hashed(self, rows: Int32, first: Int32, end: Int32) -> Sealed:
        """Return the blocks ``first`` to ``end`` of each row, [N] each, whose tokens are known, and
        lengthen their sequences' chains by the hashes that they lack.
        """
        table, size = self._table, self._size
        content, stride = b"", size * table.token_ids.itemsize
        found: list[bytes] = []
        spans = zip(rows.tolist(), first.tolist(), end.tolist(), strict=True)
        for i, (row, begin, stop) in enumerate(spans):
            seq = table.sequences[row]
            assert seq is not None
            hashes = seq.hashes
            if len(hashes) < stop:
                if begin and len(hashes) == begin == stop - 1:
                    content = content or self._content(rows, first)
                    hashes.append(block_digest(hashes[-1], content[i * stride : (i + 1) * stride]))
                else:
                    extend_chain(hashes, table.token_ids[row], stop, size, seq.request.cache_salt)
            found += hashes[begin:stop]
        return Sealed(rows, first, end, found)

    def _content(self, rows: Int32, first: Int32) -> bytes:
        """Return the tokens of a block of each row, one after the other: what decoding fills is
        gathered at once.
        """
        tokens = self._table.token_ids
        return tokens.reshape(len(tokens), -1, self._size)[rows, first].tobytes()

    def _record(self, rows: Int32, first: Int32, counts: Int32, fresh: Ids[int]) -> None:
        ends = np.cumsum(counts).tolist()
        for i, (begin, end) in enumerate(pairwise([0, *ends])):
            new = [int(first[i]) + at - begin for at in fresh if begin <= at < end]
            self._events += [self._stored(int(rows[i]), *run) for run in runs(new)]

    def _stored(self, row: int, first: int, end: int) -> BlockStored:
        seq, size = self._table.sequences[row], self._size
        assert seq is not None
        return BlockStored(
            block_hashes=[short_hash(digest) for digest in seq.hashes[first:end]],
            parent_block_hash=short_hash(seq.hashes[first - 1]) if first else None,
            token_ids=self._table.token_ids[row, first * size : end * size].tolist(),
            block_size=size,
        )

    def withdraw(self, ids: Int32) -> None:
        """Make findable blocks unfindable, and those of other groups that hold the same content."""
        if self.records and len(ids):
            hashes = [short_hash(digest) for digest in self._index.hashes_of(ids)]
            self._events.append(BlockRemoved(block_hashes=hashes))
        blocks = self._index.remove(ids)
        if len(blocks) > len(ids):  # other groups' as well, which may be cached
            self._pool.forget(blocks)

    def clear(self) -> None:
        """Make everything unfindable."""
        self._pool.forget(self._index.clear())
        if self.records:
            self._events.append(AllBlocksCleared())

    def take_events(self) -> list[KVEvent]:
        """Return the events since the last call, oldest first."""
        taken, self._events = self._events, []
        return taken
