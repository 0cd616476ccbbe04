"""Which blocks hold which prefix: a chain of keyed hashes and an index from hash to blocks.

A full block's hash covers its tokens and, through its parent's hash, every token before it and
the request's salt. Equal hash means equal prefix under equal salt: 128 bits of BLAKE2b leave no
chance worth counting, so tokens are not compared again.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ids
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby, takewhile
from struct import Struct, iter_unpack, unpack

import numpy as np

from pagedkv.core.arrays import Bool, Int32, Int64, UInt64

__all__ = ["PrefixIndex", "block_digest", "extend_chain", "runs"]

DIGEST_BYTES = 16
PAIR = Struct("=QQ")
MEAN_CHAIN = 2
FEW, MANY = 256, 128
"""From about here on, looking up hashes, and putting in new ones, is faster for all at once."""

END, UNUSED, REMOVED = -1, -2, -4

blank_state = blake2b(digest_size=DIGEST_BYTES).copy
"""A hash of nothing yet: copying one takes half the time of making one."""


@lru_cache
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
    for (block,) in iter_unpack(f"{block_size * token_ids.itemsize}s", content):
        # `block_digest`, without a call per block: long prompts spend their time here.
        state = blank_state()
        state.update(parent + block)
        parent = state.digest()
        hashes.append(parent)


def block_digest(parent: bytes, content: bytes) -> bytes:
    """Return the hash of a full block from its parent's and its own tokens, int32 in order."""
    state = blank_state()
    state.update(parent + content)
    return state.digest()


class PrefixIndex:
    """Finds the blocks of a hashed prefix, one per group.

    An entry is a sealed block's content: its hash, and the blocks that hold it. With one group an
    entry bears the number of its block; with several, each block leads to its entry, so that
    reclaiming any of them makes all unfindable. Hashes stand in an array and entries are linked
    into chains of two on average: a fifth of the memory of a dict.

    An entry that was removed cannot be found, but stays in its chain until its number is used
    again, so that removing any number of them is a few numpy calls. Few hashes are looked up one by
    one, through memory views, whose elements Python reads several times as fast as an array's;
    many at once.
    """

    def __init__(self, num_blocks: int, num_groups: int = 1) -> None:
        entries, many = num_blocks // num_groups, num_groups > 1
        self.num_groups = num_groups
        self._count = 0
        self._words: UInt64 = np.zeros(2 * entries, np.uint64)
        # What follows in the chain: an entry or END; of a removed entry REMOVED less that.
        self._next: Int32 = np.full(entries, UNUSED, np.int32)
        self._heads: Int32 = np.full(max(1, entries // MEAN_CHAIN), END, np.int32)
        # Of several groups: each block's entry, each entry's blocks, and all entries, those that
        # are not in use from ``_count`` on.
        self._entry_of: Int32 = np.full(num_blocks if many else 0, END, np.int32)
        self._blocks: Int32 = np.zeros((entries if many else 0, num_groups), np.int32)
        self._numbers: Int32 = np.arange(entries if many else 0, dtype=np.int32)

    def __len__(self) -> int:
        return self._count

    def findable(self, ids: Int32) -> Bool:
        """Return for each block id whether its content can be found."""
        known: Bool
        known = (
            self._next.take(ids) >= END if self.num_groups == 1 else self._entry_of.take(ids) >= 0
        )
        return known

    def hashes_of(self, ids: Int32) -> list[bytes]:
        """Return the hashes of what blocks hold, as far as it can be found, each once."""
        content = self._words.reshape(-1, 2)[self._entries_of(ids)].tobytes()
        return [content[at : at + DIGEST_BYTES] for at in range(0, len(content), DIGEST_BYTES)]

    def digest_of(self, block: int) -> bytes | None:
        """Return the hash of what a block holds; None if it cannot be found."""
        return next(iter(self.hashes_of(np.array([block], np.int32))), None)

    def knows_any(self, hashes: Ids[bytes]) -> bool:
        """Return whether any of the hashes can be found."""
        if len(hashes) <= FEW:
            return max(self._find(hashes), default=END) >= 0
        return bool((self._find_many(hashes) >= 0).any())

    def match(self, hashes: Ids[bytes]) -> Int32:
        """Return the blocks of the longest known prefix of the chain: [hits, num_groups]."""
        found = list(takewhile(lambda entry: entry >= 0, self._find(hashes[:FEW])))
        entries = np.array(found, np.int32)
        if len(found) == FEW < len(hashes):
            rest = self._find_many(hashes[FEW:])
            gaps = (rest < 0).nonzero()[0]
            entries = np.concatenate([entries, rest[: gaps[0]] if len(gaps) else rest])
        return self._blocks_of(entries)

    def blocks_of(self, hashes: Ids[bytes]) -> Int32:
        """Return the blocks of hashes that can all be found: [N, num_groups]."""
        return self._blocks_of(np.array(self._find_all(hashes), np.int32))

    def _find_all(self, hashes: Ids[bytes]) -> list[int]:
        """Return the entry of each hash, END if it is not known."""
        return list(self._find(hashes)) if len(hashes) <= FEW else self._find_many(hashes).tolist()

    def _find(self, hashes: Ids[bytes]) -> Iterator[int]:
        """Yield the same, one by one."""
        words, following, heads = self._words.data, self._next.data, self._heads.data
        chains = len(heads)
        for digest in hashes:
            low, high = PAIR.unpack(digest)
            entry = heads[low % chains]
            while entry >= 0 and (words[2 * entry] != low or words[2 * entry + 1] != high):
                entry = following[entry]
                if entry < END:
                    entry = REMOVED - entry
            yield entry if entry < 0 or following[entry] >= END else END

    def _find_many(self, hashes: Ids[bytes]) -> Int32:
        """Return the same for all at once: [N]. All walk their chains in step."""
        wanted = np.frombuffer(b"".join(hashes), np.uint64)
        low, high = wanted[0::2], wanted[1::2]
        lows, highs = self._words[0::2], self._words[1::2]
        found: Int32 = self._heads[self._chains_of(low)]
        at = np.arange(len(found))
        while len(at):
            entry = found[at]
            other = (lows[entry] != low[at]) | (highs[entry] != high[at])
            at = at[other & (entry >= 0)]
            found[at] = self._follow(found[at])
        found[self._next[found] < END] = END
        return found

    def _follow(self, entries: Int32) -> Int32:
        link = self._next[entries]
        return np.where(link < END, REMOVED - link, link)

    def insert(self, digest: bytes, block_ids: Int32) -> bool:
        """Make a sealed block findable; the first of equal contents wins.

        Args:
            digest: The block's hash.
            block_ids: [num_groups] The blocks that hold it.

        Returns:
            Whether it was new.
        """
        return bool(self.insert_many([digest], np.reshape(block_ids, (1, self.num_groups))))

    def insert_many(self, digests: Ids[bytes], block_ids: Int32, *, new: bool = False) -> Ids[int]:
        """Make sealed blocks findable, as `insert` does one: [N] hashes, [N, num_groups] blocks.

        Args:
            new: Whether it is known that they are: all different, and none findable.

        Returns:
            The indices of those that were new, ascending.
        """
        if len(digests) >= MANY:
            return self._insert_at_once(digests, block_ids, new=new)
        words, following, heads = self._words.data, self._next.data, self._heads.data
        fresh: list[int] = []
        chains, own = len(heads), self.num_groups == 1
        spare = self._numbers[self._count : self._count + len(digests)]
        entries = (block_ids[:, 0] if own else spare).tolist()
        halves = unpack(f"={2 * len(digests)}Q", b"".join(digests))
        for i, (low, high) in enumerate(zip(halves[0::2], halves[1::2], strict=True)):
            chain = low % chains
            # As in `_find`, which called for each would cost as much again.
            known = END if new else heads[chain]
            while known >= 0 and (words[2 * known] != low or words[2 * known + 1] != high):
                known = following[known]
                if known < END:
                    known = REMOVED - known
            if known >= 0 and following[known] >= END:
                continue
            entry = entries[i if own else len(fresh)]
            if following[entry] != UNUSED:
                self._unlink(entry, words, following, heads)
            words[2 * entry], words[2 * entry + 1] = low, high
            following[entry], heads[chain] = heads[chain], entry
            fresh.append(i)
        if not own:
            self._note_blocks(spare[: len(fresh)], block_ids[fresh])
        self._count += len(fresh)
        return fresh

    def _note_blocks(self, entries: Int32, block_ids: Int32) -> None:
        self._blocks[entries] = block_ids
        self._entry_of[block_ids] = entries[:, None]

    def _insert_at_once(self, digests: Ids[bytes], block_ids: Int32, *, new: bool) -> Ids[int]:
        """Do what `insert_many` does by the array; only entries that follow a removed one are taken
        out of their chains one by one.
        """
        fresh: Ids[int] = list(range(len(digests)))
        if not new:
            known = self._find_all(digests)
            first = dict(zip(reversed(digests), reversed(fresh), strict=True))
            fresh = [i for i in sorted(first.values()) if known[i] < 0]
            digests, block_ids = [digests[i] for i in fresh], block_ids[fresh]
        if self.num_groups == 1:
            entries = block_ids[:, 0]
        else:
            entries = self._numbers[self._count : self._count + len(fresh)]
            self._note_blocks(entries, block_ids)
        self._count += len(fresh)
        self._unlink_at_once(entries[self._next.take(entries) != UNUSED])
        halves = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
        self._words.reshape(-1, 2)[entries] = halves
        chains = self._chains_of(halves[:, 0])
        order = chains.argsort(kind="stable")
        chains, entries = chains[order], entries[order]
        # Each leads to the next of its chain, the last of them to what stood first there.
        after = self._heads[chains]
        shared = (chains[1:] == chains[:-1]).nonzero()[0]
        after[shared] = entries[shared + 1]
        self._next[entries] = after
        self._heads[chains[::-1]] = entries[::-1]  # what is written last stands: their first
        return fresh

    def _chains_of(self, low: UInt64) -> Int64:
        chains: Int64 = (low % np.uint64(len(self._heads))).astype(np.intp)
        return chains

    def _unlink_at_once(self, entries: Int32) -> None:
        """Take entries that were removed out of their chains: [N], each once."""
        leaving: Bool = np.zeros(len(self._next), np.bool_)  # no memory but what is written
        leaving[entries] = True
        while len(entries):  # first those that follow none that is leaving as well
            chains = self._chains_of(self._words[0::2].take(entries))
            before, here = np.full(len(entries), END, np.int32), self._heads[chains]
            at = (here != entries).nonzero()[0]
            while len(at):  # all walk their chains in step
                before[at] = passed = here[at]
                here[at] = self._follow(passed)
                at = at[here[at] != entries[at]]
            after = REMOVED - self._next[entries]
            first = before < 0
            self._heads[chains[first]] = after[first]
            behind = (~first & ~leaving[before]).nonzero()[0]
            link, after = before[behind], after[behind]
            self._next[link] = np.where(self._next[link] < END, REMOVED - after, after)
            leaving[entries[first]] = leaving[entries[behind]] = False
            entries = entries[leaving[entries]]

    @staticmethod
    def _unlink(
        entry: int,
        words: "memoryview[int]",
        following: "memoryview[int]",
        heads: "memoryview[int]",
    ) -> None:
        """Take an entry that was removed out of its chain."""
        chain, link = words[2 * entry] % len(heads), REMOVED - following[entry]
        here = heads[chain]
        if here == entry:
            heads[chain] = link
            return
        after = following[here]
        while after not in (entry, REMOVED - entry):
            here = after if after >= 0 else REMOVED - after
            after = following[here]
        following[here] = link if after == entry else REMOVED - link

    def remove(self, ids: Int32) -> Int32:
        """Make unfindable every entry that has one of the blocks ``ids``, each named once.

        Returns:
            The blocks of those entries: [N] ids, those in ``ids`` included.
        """
        entries = self._entries_of(ids)
        blocks = entries if self.num_groups == 1 else self._blocks_of(entries).ravel()
        self._next[entries] = REMOVED - self._next.take(entries)
        self._count -= len(entries)
        if self.num_groups > 1:
            self._entry_of[blocks] = END
            self._numbers[self._count : self._count + len(entries)] = entries
        return blocks

    def clear(self) -> Int32:
        """Make everything unfindable; return the blocks concerned."""
        return self.remove(self._blocks_of(self._in_use()).ravel())

    def _in_use(self) -> Int32:
        return np.flatnonzero(self._next >= END).astype(np.int32)

    def _entries_of(self, ids: Int32) -> Int32:
        """Return the entries that have one of the blocks, each once."""
        if self.num_groups == 1:
            return ids[self._next.take(ids) >= END]
        entries = np.unique(self._entry_of[ids])
        return entries[entries >= 0]

    def _blocks_of(self, entries: Int32) -> Int32:
        """Return the blocks of entries: [N, num_groups]."""
        return entries[:, None] if self.num_groups == 1 else self._blocks[entries]

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold. O(blocks)."""
        in_use = self._in_use()
        assert len(in_use) == self._count, "entries are miscounted"
        linked, here, most = 0, self._heads[self._heads >= 0], int((self._next != UNUSED).sum())
        while len(here) and linked <= most:
            assert (self._next[here] != UNUSED).all(), "a chain goes through a number never used"
            linked += len(here)
            here = self._follow(here)
            here = here[here >= 0]
        assert linked == most, "an entry is in no chain, or in two"
        hashes = self.hashes_of(self._blocks_of(in_use).ravel())
        assert self._find_many(hashes).tolist() == in_use.tolist(), "a hash does not lead to itself"
        if self.num_groups > 1:
            own = self._entry_of[self._blocks[in_use]] == in_use[:, None]
            assert own.all(), "an entry is not its blocks' own"
            live = int((self._entry_of >= 0).sum())
            assert live == self.num_groups * self._count, "a block leads to an entry that is gone"
            spare = self._numbers[self._count :]
            assert len(np.union1d(spare, in_use)) == len(self._numbers), "an entry is lost"


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Split ascending numbers where they do not follow on: (first, end) of each run."""
    for _, pairs in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        yield run[0], run[-1] + 1
