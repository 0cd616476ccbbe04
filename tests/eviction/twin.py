"""The arrays that core keeps, reduced to what eviction touches, and driven step by step."""

import numpy as np

from pagedkv import eviction
from tests.eviction.naive import mix

WIDTH = 64


class Twin:
    """Tables of ``layers * heads`` groups and some rows, under one policy."""

    def __init__(
        self, policy, size, prompts, *, layers=1, heads=1, seed=0, names=None, pressure=0.0
    ):
        self.policy, self.size, self.layers, self.heads = policy, size, layers, heads
        self.seed, self.pressure = seed, pressure
        self.groups, rows = layers * heads, len(prompts)
        self.names = np.arange(rows) if names is None else np.asarray(names)
        self.prompt = np.asarray(prompts)
        self.computed = np.zeros(rows, np.int32)
        self.resident = np.zeros((self.groups, rows), np.int32)
        shape = (self.groups, rows, WIDTH)
        self.score, self.weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.first = np.zeros(shape, np.int32)
        self.cadence = policy.cadence(size)
        self.score_of = policy.scorer()

    def view(self, rows):
        flat = lambda column: np.tile(column[rows], self.groups)  # noqa: E731
        pack = lambda column: column[:, rows].reshape(-1, WIDTH)  # noqa: E731
        return eviction.View(
            score=pack(self.score),
            weight=pack(self.weight),
            first_position=pack(self.first),
            num_resident=self.resident[:, rows].ravel(),
            num_computed=flat(self.computed),
            num_prompt=flat(self.prompt),
            block_size=self.size,
            layers=self.layers,
            heads=self.heads,
            pressure=self.pressure,
        )

    def step(self, count):
        """Compute ``count[row]`` tokens, cut at rounds, then evict where a round is due."""
        room = self.cadence.next_round(self.computed, self.prompt) - self.computed
        count = np.minimum(count, room)
        everyone = np.arange(len(count))
        for row in everyone:
            for group in range(self.groups):
                at = self.resident[group, row] + np.arange(count[row])
                new = at[at % self.size == 0]
                self.first[group, row, new // self.size] = (
                    self.computed[row] + new - self.resident[group, row]
                )
        before = self.view(everyone)
        counts = np.tile(count, self.groups)
        seen = self.observe(before, counts)
        score, weight = eviction.update(self.policy, before, counts, seen)
        self.score = score.reshape(self.score.shape).copy()
        self.weight = weight.reshape(self.score.shape).copy()
        self.resident += count.astype(np.int32)
        self.computed += count.astype(np.int32)
        due = (count > 0) & self.cadence.is_round(self.computed, self.prompt)
        if due.any():
            self.evict(np.flatnonzero(due))

    def observe(self, before, counts):
        """What the device would deliver, from the definitions in `pagedkv.eviction.scores`."""
        kind = self.score_of.observe
        out = np.zeros(before.score.shape, np.float32)
        static = self.score_of.static
        start = eviction.observe_from(self.policy, before, counts)
        for n in np.flatnonzero(counts).tolist():
            group, row = divmod(n, len(self.names))
            who = (self.seed, group, int(self.names[row]))
            computed, resident = int(before.num_computed[n]), int(before.num_resident[n])
            firsts = before.first_position[n].tolist()
            for q in range(0 if static else start[n], counts[n]):
                visible = resident + q + 1
                for entry in range(visible // self.size):
                    key = (firsts[entry],) if static else (computed + q, firsts[entry])
                    value = mix(*who, *key)
                    out[n, entry] = self.combine(kind, out[n, entry], value, visible)
        return out

    def combine(self, kind, so_far, value, visible):
        mass = value / 64
        lift = mass * visible / self.size
        return {
            "none": so_far,
            "mass_sum": so_far + mass,
            "lobo_sum": so_far + mass,
            "mass_max": max(so_far, mass),
            "mass_last": mass,
            "mass_low": so_far + (lift < 1),
            "lift_sum": so_far + lift,
            "lift_max": max(so_far, lift),
        }.get(kind, value)

    def evict(self, rows):
        keep = eviction.select(self.policy, self.view(rows))
        order, kept = eviction.survivors(keep)
        held = -(-self.resident[:, rows] // self.size)
        shape = (self.groups, len(rows))
        self.resident[:, rows] -= (held - kept.reshape(shape)) * self.size
        for column in (self.score, self.weight, self.first):
            moved = np.take_along_axis(column[:, rows].reshape(-1, WIDTH), order, axis=1)
            moved[np.arange(WIDTH) >= kept[:, None]] = 0
            column[:, rows] = moved.reshape(*shape, WIDTH)

    def firsts(self, group, row):
        """First positions of a table's blocks."""
        return self.first[group, row, : -(-self.resident[group, row] // self.size)].tolist()
