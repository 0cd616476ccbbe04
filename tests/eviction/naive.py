"""Eviction written down plainly, from the definitions: one token, one block at a time.

Nothing here is shared with the package but `Policy`, a struct of plain data. A block remembers
every query that observed it; a score is computed from that history when a round comes.
"""

import functools
import math

MASK = 0xFFFFFFFF


@functools.cache
def mix(*words):
    """A small number from 0 to 63 that stands for an attention mass in 64ths."""
    state = 1
    for word in words:
        state = (state * 1_000_003 + word * 7_919 + 12_345) % 1_000_033
    return state // 7 % 64


@functools.cache
def is_round(n, prompt, chunk, size):
    return n > 0 and n % (chunk if n <= prompt else size) == 0


class Block:
    def __init__(self, first):
        self.first = first
        self.fill = 0
        self.seen = []  # (query position, mass, tokens visible to the query)


class Table:
    """One table of one sequence: grows token by token."""

    def __init__(self, policy, size, prompt, group, row, seed, *, stride=None):
        self.policy, self.size, self.prompt = policy, size, prompt
        self.stride = stride or size  # tokens between rounds; size 1 with a stride ranks tokens
        self.group, self.row, self.seed = group, row, seed
        self.chunk = math.ceil(policy.chunk / self.stride) * self.stride
        self.blocks = []
        self.computed = 0
        self.even = 1  # what a query's masses add up to: the number of heads where they are summed

    @property
    def resident(self):
        return sum(block.fill for block in self.blocks)

    @property
    def sealed(self):
        return sum(block.fill == self.size for block in self.blocks)

    def at_round(self):
        return self.is_round(self.computed)

    def add_token(self):
        if not self.blocks or self.blocks[-1].fill == self.size:
            self.blocks.append(Block(self.computed))
        self.blocks[-1].fill += 1
        visible = self.resident
        for block in self.blocks:
            if block.fill == self.size:
                mass = mix(self.seed, self.group, self.row, self.computed, block.first) / 64
                block.seen.append((self.computed, mass, visible))
        self.computed += 1

    # Scores

    def is_round(self, computed):
        return is_round(computed, self.prompt, self.chunk, self.stride)

    def epoch_start(self, query):
        return next((at for at in range(query, 0, -1) if self.is_round(at)), 0)

    def epoch_end(self, query):
        return next(at for at in range(query + 1, 9999) if self.is_round(at))

    def bucket(self):
        size = self.stride
        width = math.ceil(self.policy.parameter / size) * size
        if self.policy.parameter >= self.chunk:
            return math.ceil(self.policy.parameter / self.chunk) * self.chunk
        while self.chunk % width:
            width += size
        return width

    def windowed(self, block, value):
        width, last = self.bucket(), self.computed - 1
        ends = {q: (self.epoch_end(q) - 1) // width for q in range(last + 1)}
        # Only buckets that end some epoch are observed.
        heard = [(q, value(m, v)) for q, m, v in block.seen if ends[q] == q // width]
        now = last // width
        before = max((bucket for bucket in ends.values() if bucket < now), default=-1)
        missing = width - (last + 1 - now * width)  # of the window's queries, before this bucket
        current = sum(x for q, x in heard if q // width == now)
        earlier = sum(x for q, x in heard if q // width == before)
        return (width * current + missing * earlier) / width  # so that equal counts rank equal

    def hash(self, first):
        word = (first + int(self.policy.parameter) * 0x9E3779B9) & MASK
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            word = ((word ^ (word >> shift)) * factor) & MASK
        word ^= word >> 16
        return (word >> 8) / 2**24

    def rank(self, block):
        score = self.policy.score
        masses = [m for _, m, _ in block.seen]
        lifts = [m * v / self.size for _, m, v in block.seen]
        low = lambda m, v: m * v < self.even * self.size  # noqa: E731
        if score == "age":
            return block.first
        if score == "random":
            return self.hash(block.first)
        if score in ("key_norm", "key_diff"):
            return -mix(self.seed, self.group, self.row, block.first)
        if score == "value_key_norm":
            return mix(self.seed, self.group, self.row, block.first)
        if score == "window":
            return self.windowed(block, lambda m, v: m)
        if score == "low":
            return -self.windowed(block, low)
        if score == "ema":
            now = self.epoch_start(self.computed - 1)
            fade = [self.policy.parameter ** (now - self.epoch_start(q)) for q, _, _ in block.seen]
            return sum(f * m for f, m in zip(fade, masses, strict=True)) / sum(fade)
        return {
            "sum": lambda: sum(masses),
            "mean": lambda: sum(masses) / len(masses),
            "lobo": lambda: sum(masses) / len(masses),
            "max": lambda: max(masses),
            "last": lambda: masses[-1],
            "lift": lambda: sum(lifts) / len(lifts),
            "lift_max": lambda: max(lifts),
        }[score]()

    # Budgets

    def cap(self, pressure):
        policy = self.policy
        if policy.tokens is not None:
            return policy.tokens
        if policy.adaptive is not None:
            low, high = policy.adaptive
            return high - math.ceil((high - low) * pressure)
        if policy.ratio is not None:
            kept = math.ceil(self.computed * (1 - policy.ratio))
            return max(kept, policy.sinks + policy.recent, self.size)
        return math.inf

    def recent(self, pressure):
        if not self.policy.recent_share:
            return self.policy.recent
        return math.floor((self.cap(pressure) - self.policy.sinks) * self.policy.recent_share)

    def candidates(self, pressure):
        sinks = math.ceil(self.policy.sinks / self.size)
        guarded = self.resident - self.recent(pressure)
        found = []
        for index, block in enumerate(self.blocks):
            holds_recent = (index + 1) * self.size > guarded
            if index >= sinks and block.fill == self.size and not holds_recent:
                found.append(block)
        return found

    def num_evictions(self, limit, pressure):
        policy, found = self.policy, self.candidates(pressure)
        over = max(0, self.sealed - limit)
        least = policy.sinks + self.recent(pressure) + self.size
        spare = max(0, self.sealed - math.ceil(max(least, policy.floor) / self.size))
        wanted = 0
        if policy.threshold is not None:
            ranks = [self.rank(block) for block in self.blocks if block.fill == self.size]
            mean = sum(ranks) / len(ranks)
            wanted = min(spare, sum(self.rank(b) < policy.threshold * mean for b in found))
        elif policy.lowest is not None and (over > 0 or self.cap(pressure) == math.inf):
            wanted = min(spare, max(1, math.floor(len(found) * policy.lowest)))
        return min(max(over, wanted), len(found))

    def lowest(self, count, pressure):
        """The candidates to drop, lowest rank first; sorting is stable, so the oldest first."""
        return sorted(self.candidates(pressure), key=self.rank)[:count]

    def drop(self, gone):
        self.blocks = [block for block in self.blocks if block not in gone]


def limits(tables, pressure):
    """The sealed blocks that each table of a row may hold: ``[layer][head]``."""
    policy, size, layers = tables[0][0].policy, tables[0][0].size, len(tables)
    if policy.spread != "pyramid" or layers == 1:
        return [
            [
                math.ceil(t.cap(pressure) / size) if t.cap(pressure) < math.inf else math.inf
                for t in heads
            ]
            for heads in tables
        ]
    found, carried, done = [], 0.0, 0
    for depth, heads in enumerate(tables):
        held = policy.sinks + heads[0].recent(pressure)
        heavy = max(heads[0].cap(pressure) - held, 0)
        least = heavy / 20
        most = 2 * heavy - least
        carried += (held + most - (most - least) * (depth / (layers - 1))) / size
        total = math.floor(carried + 0.5)
        found.append([max(1, total - done)] * len(heads))
        done = total
    return found


def evict_row(tables, pressure=0.0):
    """One round of one sequence: ``tables[layer][head]``."""
    if not tables[0][0].at_round():
        return
    policy = tables[0][0].policy
    for heads, bounds in zip(tables, limits(tables, pressure), strict=True):
        counts = [t.num_evictions(n, pressure) for t, n in zip(heads, bounds, strict=True)]
        if policy.spread == "ada" and len(heads) > 1:
            evict_jointly(heads, bounds, sum(counts), pressure)
        else:
            for table, count in zip(heads, counts, strict=True):
                table.drop(table.lowest(count, pressure))


def evict_jointly(heads, bounds, count, pressure):
    offered = []
    for head, (table, bound) in enumerate(zip(heads, bounds, strict=True)):
        floor = math.ceil(min(bound, table.sealed) * 0.2)
        lowest = table.lowest(max(0, table.sealed - floor), pressure)
        offered += [(table.rank(b), table.blocks.index(b), head, b) for b in lowest]
    offered.sort(key=lambda entry: entry[:3])
    gone = offered[:count]
    for head, table in enumerate(heads):
        table.drop([block for _, _, at, block in gone if at == head])
