"""Block management with dicts and lists: slow, obvious, and the standard for the real one."""

from itertools import zip_longest


class NaiveBlocks:
    """What `BlockManager` should do, one block at a time.

    References are not kept but counted from the tables, contents not hashed but compared.

    Attributes:
        blank: Free blocks without content, the last is taken first.
        cached: Free blocks with content, the first is taken first.
        entries: (salt, every token up to a block's end) to the blocks, one per group.
        tables: Sequence to its block table per group.
    """

    def __init__(self, num_blocks, block_size, num_groups):
        self.block_size = block_size
        self.num_groups = num_groups
        self.blank = list(range(num_blocks))[::-1]
        self.cached = []
        self.entries = {}
        self.tables = {}
        self.tokens = {}
        self.salts = {}
        self.computed = {}
        self.silent = set()  # who began before a reset publishes nothing

    def refs(self, block):
        return sum(table.count(block) for tables in self.tables.values() for table in tables)

    def findable(self, block):
        return any(block in blocks for blocks in self.entries.values())

    def key(self, tokens, salt, i):
        return salt, tuple(tokens[: (i + 1) * self.block_size])

    def blocks_for(self, tokens):
        return -(-tokens // self.block_size)

    def find(self, tokens, salt):
        hits = []
        for i in range((len(tokens) - 1) // self.block_size):
            blocks = self.entries.get(self.key(tokens, salt, i))
            if blocks is None:
                break
            hits.append(blocks)
        return hits

    def missing(self, tokens, hits):
        revived = sum(block in self.cached for blocks in hits for block in blocks)
        return (self.blocks_for(len(tokens)) - len(hits)) * self.num_groups + revived

    def pledged(self):
        return sum(
            max(0, self.blocks_for(len(self.tokens[name])) - len(table))
            for name, tables in self.tables.items()
            for table in tables
        )

    def admit(self, name, tokens, salt, hits):
        self.tokens[name], self.salts[name] = list(tokens), salt
        self.computed[name] = len(hits) * self.block_size
        self.tables[name] = [[blocks[g] for blocks in hits] for g in range(self.num_groups)]
        self.cached = [b for b in self.cached if not any(b in blocks for blocks in hits)]

    def needs(self, counts):
        """Return the tails to copy and the blocks to append: [(group, name)], [(group, name)]."""
        copies, fresh = [], []
        for g in range(self.num_groups):
            for name, count in counts.items():
                table = self.tables[name][g]
                more = self.blocks_for(self.computed[name] + count) - len(table)
                fresh += [(g, name)] * more
                if self.computed[name] % self.block_size and self.refs(table[-1]) > 1:
                    writers = [n for n in counts if self.tables[n][g][-1:] == table[-1:]]
                    last_keeps = len(writers) == self.refs(table[-1])
                    if not (last_keeps and writers[-1] == name):
                        copies.append((g, name))
        return copies, fresh

    def grow(self, counts, given):
        """Follow a growth that took the blocks ``given``; return the copies it must have made."""
        copies, fresh = self.needs(counts)
        assert len(given) == len(copies) + len(fresh), "another number of blocks was taken"
        self.take(given)
        made = []
        for (g, name), block in zip(copies, given, strict=False):
            made.append([self.tables[name][g][-1], block])
            self.tables[name][g][-1] = block
        for (g, name), block in zip(fresh, given[len(copies) :], strict=True):
            self.tables[name][g].append(block)
        return made

    def take(self, given):
        blank = given[: len(self.blank)]
        if self.num_groups == 1:
            assert blank == self.blank[::-1][: len(blank)], "not last freed first"
        assert set(blank) <= set(self.blank)
        self.blank = [b for b in self.blank if b not in blank]
        reclaimed = given[len(blank) :]
        assert reclaimed == self.cached[: len(reclaimed)], "not first freed first"
        self.cached = self.cached[len(reclaimed) :]
        for key, blocks in list(self.entries.items()):
            if set(blocks) & set(reclaimed):
                del self.entries[key]
                self.blank += [b for b in blocks if b in self.cached]
                self.cached = [b for b in self.cached if b not in blocks]

    def advance(self, counts):
        for name, count in counts.items():
            before = self.computed[name]
            self.computed[name] += count
            if name in self.silent:
                continue
            for i in range(before // self.block_size, self.computed[name] // self.block_size):
                key = self.key(self.tokens[name], self.salts[name], i)
                own = [table[i] for table in self.tables[name]]
                found = self.entries.setdefault(key, own)
                if found == own:
                    continue
                for table, block in zip(self.tables[name], found, strict=True):
                    table[i] = block
                self.cached = [block for block in self.cached if block not in found]
                self.blank += [block for block in own if not self.refs(block)]

    def fork(self, name, child, tokens):
        self.tables[child] = [list(table) for table in self.tables[name]]
        self.tokens[child], self.salts[child] = tokens, self.salts[name]
        self.computed[child] = self.computed[name]
        if name in self.silent:
            self.silent.add(child)

    def release(self, name):
        tables = self.tables.pop(name)
        self.silent.discard(name)
        for tails in zip_longest(*(table[::-1] for table in tables)):
            for block in tails:
                if block is not None and not self.refs(block):
                    (self.cached if self.findable(block) else self.blank).append(block)

    def reset(self):
        self.entries.clear()
        self.silent |= self.tables.keys()
        self.blank += sorted(self.cached)
        self.cached = []
