"""The block manager, with its real pool, table and index, against one made of lists."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv import OutOfBlocks
from tests.core.fakes import ROWS, admit_row, batch_of, bind_row, make_manager
from tests.core.naive import NaiveBlocks


class ManagerTwins(RuleBasedStateMachine):
    """The manager and `NaiveBlocks` do the same; tables, contents and orders must agree."""

    @initialize(
        num_groups=st.sampled_from([1, 3]),
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(4, 12),
    )
    def make(self, num_groups, block_size, num_blocks):
        self.real = make_manager(num_blocks * num_groups, block_size, num_groups)
        self.naive = NaiveBlocks(num_blocks * num_groups, block_size, num_groups)

    @property
    def free(self):
        return [row for row in range(ROWS) if row not in self.naive.tables]

    @property
    def available(self):
        return len(self.naive.blank) + len(self.naive.cached)

    @precondition(lambda self: self.free)
    @rule(
        shared=st.sampled_from([0, 4, 8]),
        own=st.lists(st.integers(10, 12), min_size=1, max_size=5),
        salt=st.sampled_from(["", "", "salt"]),
    )
    def admit(self, shared, own, salt):
        tokens = list(range(shared)) + own
        row = self.free[0]
        seq = bind_row(self.real, row, tokens, salt)
        hits, expected = self.real.find_prefix(seq), self.naive.find(tokens, salt)
        assert hits.tolist() == expected
        missing = self.naive.missing(tokens, expected)
        assert self.real.missing_blocks(seq, hits) == missing
        if missing <= self.available:
            admit_row(self.real, row, tokens, salt)
            self.naive.admit(row, tokens, salt, expected)

    @precondition(lambda self: self.naive.tables)
    @rule(data=st.data(), some=st.booleans())
    def step(self, data, some):
        """Grow and advance; some of the rows may be taken back in between."""
        unfinished = [
            row for row in self.naive.tables if len(self.naive.tokens[row]) > self.computed(row)
        ]
        rows = data.draw(st.permutations(unfinished))
        rows = rows[: data.draw(st.integers(1, 4))] if some else rows
        left = {row: len(self.naive.tokens[row]) - self.computed(row) for row in rows}
        counts = {row: data.draw(st.integers(1, most)) for row, most in left.items()}
        need = sum(map(len, self.naive.needs(counts)))
        assert self.real.shortfall(batch_of(self.real, counts)) == max(0, need - self.available)
        if need > self.available:
            with pytest.raises(OutOfBlocks):
                self.real.grow(batch_of(self.real, counts))
            return
        held = self.real.table.num_blocks.copy()
        copies = self.real.grow(batch_of(self.real, counts))
        fresh = [
            block
            for g in range(self.real.num_groups)
            for row in counts
            for block in self.table(g, row)[held[g, row] :]
        ]
        given = copies[:, 1].tolist() + fresh
        assert copies.tolist() == self.naive.grow(counts, given)
        if counts and data.draw(st.integers(0, 3)) == 0:
            gone = next(iter(counts))
            self.release(gone)
            del counts[gone]
        self.real.advance(batch_of(self.real, counts))
        self.naive.advance(counts)

    def computed(self, row):
        return self.naive.computed[row]

    def table(self, g, row):
        return self.real.table.block_table[g, row, : self.real.table.num_blocks[g, row]].tolist()

    @precondition(lambda self: self.free and self.naive.tables)
    @rule(data=st.data())
    def fork(self, data):
        row, child = data.draw(st.sampled_from(sorted(self.naive.tables))), self.free[0]
        computed = self.computed(row)
        tokens = [*self.naive.tokens[row][:computed], 20 + child, 21, 22]
        seq = bind_row(self.real, child, tokens, self.naive.salts[row])
        seq.hashes = self.real.table.sequences[row].hashes[: computed // self.real.block_size]
        self.real.table.bind(seq, child, [])
        self.real.fork(row, np.array([child], np.int32))
        self.real.table.start(child)
        self.naive.fork(row, child, tokens)

    @precondition(lambda self: self.naive.tables)
    @rule(data=st.data())
    def leave(self, data):
        self.release(data.draw(st.sampled_from(sorted(self.naive.tables))))

    def release(self, row):
        self.real.release(np.array([row], np.int32))
        self.naive.release(row)

    @rule(sure=st.integers(0, 4))
    def reset(self, sure):
        if not sure:
            self.real.reset_prefix_cache()
            self.naive.reset()

    @invariant()
    def agree(self):
        if not hasattr(self, "real"):
            return
        self.real.audit()
        pool = self.real.pool
        for row, tables in self.naive.tables.items():
            assert [self.table(g, row) for g in range(self.real.num_groups)] == tables
            assert self.real.table.num_computed[row] == self.computed(row)
        every = np.arange(pool.num_blocks, dtype=np.int32)
        assert pool.ref_count.tolist() == [self.naive.refs(block) for block in every]
        assert (pool.num_cached, pool.num_available) == (len(self.naive.cached), self.available)
        assert self.real.pledged_blocks(self.real.table.running) == self.naive.pledged()
        findable = [self.naive.findable(block) for block in every]
        assert self.real.index.findable(every).tolist() == findable


TestManagerTwins = ManagerTwins.TestCase
TestManagerTwins.settings = settings(max_examples=50, stateful_step_count=25)
