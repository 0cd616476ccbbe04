"""Which blocks hold which prefix: a chain of keyed hashes and an index from hash to blocks.

A full block's hash covers its tokens and, through its parent's hash, every token before it and
the request's salt. Equal hash means equal prefix under equal salt: 128 bits of BLAKE2b leave no
chance worth counting, so tokens are not compared again.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ids
from hashlib import blake2b
from itertools import groupby

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Bool, Int32, Int64

__all__ = ["PrefixIndex", "block_digest", "extend_chain", "runs"]

DIGEST_BYTES = 16


def chain_root(salt: str, block_size: int) -> bytes:
    """Return the parent hash of a first block; differs for every salt and block size."""
    key = blake2b(salt.encode()).digest()
    return blake2b(block_size.to_bytes(4, "little"), key=key, digest_size=DIGEST_BYTES).digest()


def extend_chain(
    hashes: list[bytes], token_ids: Int32, num_blocks: int, block_size: int, salt: str
) -> None:
    """Lengthen ``hashes`` in place until it covers the first ``num_blocks`` blocks.

    Args:
        hashes: The chain so far, one digest per full block.
        token_ids: [at least num_blocks * block_size] The sequence's tokens.
    """
    if len(hashes) >= num_blocks:
        return
    parent = hashes[-1] if hashes else chain_root(salt, block_size)
    start = len(hashes) * block_size
    content = np.ascontiguousarray(token_ids[start : num_blocks * block_size]).tobytes()
    stride = block_size * token_ids.itemsize
    for begin in range(0, len(content), stride):
        # `block_digest`, without a call per block: long prompts spend their time here.
        parent = blake2b(
            parent + content[begin : begin + stride], digest_size=DIGEST_BYTES
        ).digest()
        hashes.append(parent)


def block_digest(parent: bytes, content: bytes) -> bytes:
    """Return the hash of a full block from its parent's and its own tokens, int32 in order."""
    return blake2b(parent + content, digest_size=DIGEST_BYTES).digest()


class PrefixIndex:
    """Finds the blocks of a hashed prefix, one per group.

    Entry numbers stand for sealed blocks' contents; ``entry_of`` leads from a block id back to
    its entry, so that reclaiming any block of an entry makes the whole entry unfindable.
    """

    def __init__(self, num_blocks: int, num_groups: int = 1) -> None:
        self.num_groups = num_groups
        self.entry_of: Int32 = np.full(num_blocks, -1, np.int32)
        self._entries: dict[bytes, int] = {}
        self._hashes: npt.NDArray[np.object_] = np.empty(0, object)
        self._blocks: Int32 = np.zeros((0, num_groups), np.int32)
        self._unused: list[int] = []

    def __len__(self) -> int:
        return len(self._entries)

    def findable(self, ids: Int32) -> Bool:
        """Return for each block id whether its content can be found."""
        return self.entry_of[ids] >= 0

    def knows_any(self, hashes: Ids[bytes]) -> bool:
        """Return whether any of the hashes can be found."""
        return not self._entries.keys().isdisjoint(hashes)

    def digest_of(self, block: int) -> bytes | None:
        """Return the hash of what a block holds; None if it cannot be found."""
        entry = int(self.entry_of[block])
        digest: bytes | None = self._hashes[entry] if entry >= 0 else None
        return digest

    def match(self, hashes: Ids[bytes]) -> Int32:
        """Return the blocks of the longest known prefix of the chain: [hits, num_groups]."""
        found: list[int] = []
        for digest in hashes:
            entry = self._entries.get(digest)
            if entry is None:
                break
            found.append(entry)
        return self._blocks[found]

    def insert(self, digest: bytes, block_ids: Int32) -> bool:
        """Make a sealed block findable; the first of equal contents wins.

        Args:
            digest: The block's hash.
            block_ids: [num_groups] The blocks that hold it.

        Returns:
            Whether it was new.
        """
        if digest in self._entries:
            return False
        if not self._unused:
            self._grow()
        entry = self._unused.pop()
        self._entries[digest] = entry
        self._hashes[entry] = digest
        self._blocks[entry] = block_ids
        self.entry_of[block_ids] = entry
        return True

    def insert_many(self, digests: Ids[bytes], block_ids: Int32) -> Int64:
        """Make sealed blocks findable, as `insert` does one: [N] hashes, [N, num_groups] blocks.

        Returns:
            The indices of those that were new, ascending.
        """
        fresh = np.arange(len(digests))
        if len(set(digests)) < len(digests) or self.knows_any(digests):
            first = dict(zip(reversed(digests), reversed(range(len(digests))), strict=True))
            new = [i for digest, i in first.items() if digest not in self._entries]
            fresh = np.array(sorted(new), np.int64)
            digests, block_ids = [digests[i] for i in fresh.tolist()], block_ids[fresh]
        while len(self._unused) < len(digests):
            self._grow()
        keep = len(self._unused) - len(digests)
        taken = self._unused[keep:]
        del self._unused[keep:]
        self._entries.update(zip(digests, taken, strict=True))
        entries = np.array(taken, np.intp)
        self._hashes[entries] = digests
        self._blocks[entries] = block_ids
        self.entry_of[block_ids] = entries[:, None]
        return fresh

    def remove(self, ids: Int32) -> tuple[list[bytes], Int32]:
        """Make unfindable every entry that has one of the blocks ``ids``, each named once.

        Returns:
            The hashes removed, and the blocks of those entries: [N] ids, those in ``ids`` included.
        """
        entries = self.entry_of[ids]
        entries = entries[entries >= 0]
        if self.num_groups > 1:  # several blocks lead to one entry
            entries = np.unique(entries)
        gone: list[bytes] = self._hashes[entries].tolist()
        for digest in gone:
            del self._entries[digest]
        self._hashes[entries] = None
        self._unused.extend(entries.tolist())
        blocks = self._blocks[entries].ravel()
        self.entry_of[blocks] = -1
        return gone, blocks

    def clear(self) -> Int32:
        """Make everything unfindable; return the blocks concerned."""
        blocks = np.flatnonzero(self.entry_of >= 0).astype(np.int32)
        self.remove(blocks)
        return blocks

    def _grow(self) -> None:
        size = len(self._hashes)
        more = max(64, size)
        self._hashes = np.append(self._hashes, np.full(more, None))
        self._blocks = np.concatenate(
            [self._blocks, np.full((more, self.num_groups), -1, np.int32)]
        )
        self._unused.extend(range(size + more - 1, size - 1, -1))

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold."""
        assert len(self._entries) + len(self._unused) == len(self._hashes), "an entry is lost"
        for digest, entry in self._entries.items():
            assert self._hashes[entry] == digest, f"entry {entry} holds another hash"
            blocks = self._blocks[entry]
            assert (self.entry_of[blocks] == entry).all(), f"entry {entry} is not its blocks' own"
        live = self.num_groups * len(self._entries)
        assert int((self.entry_of >= 0).sum()) == live, "a block points at an entry that is gone"


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Split ascending numbers where they do not follow on: (first, end) of each run."""
    for _, pairs in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        yield run[0], run[-1] + 1
