"""The hash chain, and the prefix index against a dict."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv.core.prefix import END, FEW, MANY, UNUSED, PrefixIndex, chain_root, extend_chain


def ids(*numbers):
    return np.array(numbers, np.int32)


def chain(tokens, block_size=2, salt=""):
    hashes = []
    extend_chain(hashes, ids(*tokens), len(tokens) // block_size, block_size, salt)
    return hashes


class IndexTwins(RuleBasedStateMachine):
    """A `PrefixIndex` and a dict from digest to blocks do the same."""

    # As bytes in this order all fall into one chain, in the other they spread.
    digests = st.builds(int.to_bytes, st.integers(0, 150), st.just(16), st.just("big"))
    digests |= st.builds(int.to_bytes, st.integers(0, 150), st.just(16), st.just("little"))

    @initialize(num_groups=st.sampled_from([1, 3]))
    def make(self, num_groups):
        self.num_blocks = 140 * num_groups
        self.num_groups = num_groups
        self.index = PrefixIndex(self.num_blocks, num_groups)
        self.entries = {}

    def entry_of(self, block):
        return next((d for d, blocks in self.entries.items() if block in blocks), None)

    @rule(digest=digests, many=st.booleans(), checked=st.booleans())
    def insert(self, digest, many, checked):
        used = {block for blocks in self.entries.values() for block in blocks}
        spare = [b for b in range(self.num_blocks) if b not in used]
        for i in range(80 if many else 1):
            order = "big" if digest[0] == 0 else "little"
            key = (int.from_bytes(digest, order) + i).to_bytes(16, order)
            blocks, spare = spare[: self.num_groups], spare[self.num_groups :]
            if len(blocks) == self.num_groups:
                if checked and not self.index.knows_any([key]):
                    assert self.index.insert_many([key], ids(blocks), new=True) == [0]
                else:
                    assert self.index.insert(key, ids(*blocks)) == (key not in self.entries)
                self.entries.setdefault(key, blocks)

    @rule(data=st.data(), new=st.booleans())
    def insert_together(self, data, new):
        """Enough to be put in at once, or few; some are known or come twice."""
        used = {block for blocks in self.entries.values() for block in blocks}
        spare = [b for b in range(self.num_blocks) if b not in used]
        spare = data.draw(st.permutations(spare))
        most = len(spare) // self.num_groups
        count = data.draw(st.sampled_from([min(most, 3), min(most, MANY), most]))
        order, start = data.draw(st.sampled_from(["big", "little"])), data.draw(st.integers(0, 150))
        keys = [(start + i % (1 + start % 140)).to_bytes(16, order) for i in range(count)]
        if new:
            keys = [key for key in dict.fromkeys(keys) if key not in self.entries]
        blocks = np.array(spare[: len(keys) * self.num_groups], np.int32)
        blocks = blocks.reshape(len(keys), self.num_groups)
        fresh = []
        for i, key in enumerate(keys):
            if key not in self.entries:
                self.entries[key] = blocks[i].tolist()
                fresh.append(i)
        assert self.index.insert_many(keys, blocks, new=new) == fresh

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def match(self, data):
        known = st.sampled_from(sorted(self.entries))
        hashes = data.draw(st.lists(st.one_of(known, self.digests), max_size=6))
        if data.draw(st.booleans()):  # enough to be looked up at once
            hashes = sorted(self.entries) * (FEW // len(self.entries) + 1) + hashes
        expected = []
        for digest in hashes:
            if digest not in self.entries:
                break
            expected.append(self.entries[digest])
        found = self.index.match(hashes)
        assert found.shape == (len(expected), self.num_groups)
        assert found.tolist() == expected
        assert self.index.knows_any(hashes) == any(digest in self.entries for digest in hashes)

    @rule(data=st.data())
    def remove(self, data):
        size = {"max_size": 5} if data.draw(st.booleans()) else {"min_size": 40}
        blocks = st.lists(st.integers(0, self.num_blocks - 1), unique=True, **size)
        blocks = data.draw(blocks)
        doomed = {self.entry_of(block) for block in blocks} - {None}
        hashes, freed = self.index.hashes_of(ids(*blocks)), self.index.remove(ids(*blocks))
        assert set(hashes) == doomed
        assert len(hashes) == len(doomed)
        assert sorted(freed.tolist()) == sorted(b for d in doomed for b in self.entries.pop(d))

    @rule()
    def clear(self):
        blocks = self.index.clear()
        assert sorted(blocks.tolist()) == sorted(b for bs in self.entries.values() for b in bs)
        self.entries.clear()

    @invariant()
    def agree(self):
        if not hasattr(self, "index"):
            return
        used = {block for blocks in self.entries.values() for block in blocks}
        every = np.arange(self.num_blocks, dtype=np.int32)
        assert len(self.index) == len(self.entries)
        assert np.flatnonzero(self.index.findable(every)).tolist() == sorted(used)
        self.index.audit()


TestIndexTwins = IndexTwins.TestCase
TestIndexTwins.settings = settings(max_examples=25)


def test_equal_prefixes_have_equal_chains_and_a_change_reaches_every_later_block():
    one, other = chain([1, 2, 3, 4, 5, 6]), chain([1, 2, 9, 4, 5, 6])
    assert chain([1, 2, 3, 4, 5, 6]) == one
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[2] != other[2]


def test_the_same_block_after_another_parent_is_another_block():
    assert chain([1, 2, 7, 7])[1] != chain([3, 4, 7, 7])[1]


def test_only_full_blocks_are_hashed():
    assert len(chain([1, 2, 3])) == 1
    assert chain([1]) == []


@pytest.mark.parametrize("steps", [[1, 2, 3], [3], [0, 3, 3]])
def test_a_chain_is_the_same_however_it_is_lengthened(steps):
    tokens, hashes = ids(*range(6)), []
    for blocks in steps:
        extend_chain(hashes, tokens, blocks, 2, "")
        assert len(hashes) == blocks
    assert hashes == chain(range(6))


def test_a_chain_that_is_long_enough_is_left_alone():
    hashes = chain(range(6))
    before = list(hashes)
    extend_chain(hashes, ids(9, 9), 1, 2, "")
    assert hashes == before


def test_salts_and_block_sizes_share_nothing():
    roots = {chain_root(salt, size) for salt in ("", "a", "b", "a\0") for size in (1, 2, 256)}
    assert len(roots) == 12
    assert not set(chain(range(8), salt="a")) & set(chain(range(8), salt="b"))
    assert not set(chain([5, 5], 1)) & set(chain([5, 5, 5, 5], 2))


def test_a_chain_does_not_depend_on_the_process():
    """The hashes go into events; another process must find the same."""
    assert chain([1, 2])[0].hex() == "448f95aec0cb61fc628f3beab912e7d6"


A, B, C = (bytes([i]) * 16 for i in range(3))


def test_the_first_of_equal_contents_wins():
    index = PrefixIndex(4)
    assert index.insert(A, ids(2))
    assert not index.insert(A, ids(3))
    assert index.match([A]).tolist() == [[2]]
    assert index.findable(ids(2, 3)).tolist() == [True, False]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_of_equal_contents_inserted_together_the_first_wins(num_groups):
    index = PrefixIndex(8, num_groups)
    blocks = np.arange(4 * num_groups, dtype=np.int32).reshape(4, num_groups)
    assert index.insert_many([A, B, A, C], blocks) == [0, 1, 3]
    assert index.match([A, B, C]).tolist() == blocks[[0, 1, 3]].tolist()


@pytest.mark.parametrize("num_hashes", [FEW - 1, FEW, FEW + 1, 3 * FEW])
def test_a_long_chain_is_matched_up_to_its_first_gap(num_hashes):
    hashes = chain(range(2 * num_hashes))
    for gap in (None, 0, FEW - 1, FEW, num_hashes - 1):
        index = PrefixIndex(num_hashes)
        index.insert_many(hashes, np.arange(num_hashes, dtype=np.int32)[:, None])
        if gap is not None and gap < num_hashes:
            index.remove(ids(gap))
        end = num_hashes if gap is None else min(gap, num_hashes)
        assert index.match(hashes).tolist() == [[i] for i in range(end)]
        assert index.knows_any(hashes) == (num_hashes > 1 or end > 0)
        assert not index.knows_any(chain(range(9, 9 + 2 * num_hashes), salt="another"))


def test_reclaiming_the_block_of_one_group_makes_the_entry_unfindable_in_all():
    index = PrefixIndex(6, num_groups=3)
    index.insert(A, ids(0, 1, 2))
    index.insert(B, ids(3, 4, 5))
    assert index.hashes_of(ids(4)) == [B]
    assert index.remove(ids(4)).tolist() == [3, 4, 5]
    assert index.match([A, B]).tolist() == [[0, 1, 2]]


def test_a_match_ends_at_the_first_gap():
    index = PrefixIndex(4)
    for block, digest in enumerate([A, B, C]):
        index.insert(digest, ids(block))
    index.remove(ids(1))
    assert index.match([A, B, C]).tolist() == [[0]]
    assert index.match([B, C]).shape == (0, 1)


def corrupt_count(index):
    index._count += 1


def corrupt_hash(index):
    index._words[0] ^= np.uint64(1)


def corrupt_chain(index):
    index._next[[0, 4]] = UNUSED, END


def corrupt_cycle(index):
    index._next[index._numbers[:2]] = index._numbers[1]


def corrupt_back_pointer(index):
    index._entry_of[0] = END


def corrupt_stale_block(index):
    index._entry_of[5] = index._entry_of[0]


def corrupt_lost_entry(index):
    index._numbers[-1] = index._numbers[0]


@pytest.mark.parametrize(
    ("corrupt", "finding"),
    [
        (corrupt_count, "miscounted"),
        (corrupt_hash, "does not lead to itself"),
        (corrupt_chain, "a number never used"),
        (corrupt_cycle, "in no chain, or in two"),
        (corrupt_back_pointer, "not its blocks' own"),
        (corrupt_stale_block, "an entry that is gone"),
        (corrupt_lost_entry, "an entry is lost"),
    ],
)
def test_the_audit_finds(auditor, corrupt, finding):
    index = PrefixIndex(12, num_groups=2)
    index.insert(A, ids(0, 1))
    index.insert(B, ids(2, 3))
    index.audit()
    corrupt(index)
    with pytest.raises(AssertionError, match=finding):
        index.audit()
    auditor.excuse(index)
