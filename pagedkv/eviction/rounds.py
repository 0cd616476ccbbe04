"""When eviction happens: at points that depend on the sequence alone, never on the batch.

A *round* takes place when the number of computed tokens reaches a multiple of ``chunk`` inside the
prompt, or a multiple of the block size beyond it. No step may cross a round, so what a sequence
keeps is the same however the scheduler cuts its prompt and whoever runs beside it. The tokens
between two rounds form an *epoch*; scores that forget, forget between epochs and never inside one.
"""

import numpy as np
from msgspec import Struct

from pagedkv.eviction.view import Bool, Int

__all__ = ["Cadence"]


class Cadence(Struct, frozen=True):
    """The rule that places the rounds.

    Attributes:
        chunk: Tokens between rounds in the prompt; a multiple of ``block_size``.
        block_size: Tokens between rounds after the prompt.
    """

    chunk: int
    block_size: int

    def is_round(self, computed: Int, prompt: Int) -> Bool:
        """Whether a round takes place at this many computed tokens: [N]."""
        inside = computed <= prompt
        every = np.where(inside, self.chunk, self.block_size)
        due: Bool = (computed > 0) & (computed % every == 0)
        return due

    def next_round(self, computed: Int, prompt: Int) -> Int:
        """Return the first round after this many computed tokens: [N].

        A step may compute up to it and no further.
        """
        inside = (computed // self.chunk + 1) * self.chunk
        beyond = (np.maximum(computed, prompt) // self.block_size + 1) * self.block_size
        return np.where(inside <= prompt, inside, beyond)

    def epoch_end(self, computed: Int, prompt: Int) -> Int:
        """Return the round that ends the epoch of the latest computed token: [N]."""
        return self.next_round(np.maximum(computed, 1) - 1, prompt)

    def ended(self, start: Int, prompt: Int) -> Int:
        """Return the length of the epoch that ended at ``start``, 0 where none did: [N] queries."""
        inside = np.minimum(start - 1, prompt) // self.chunk * self.chunk
        before = np.where(start - self.block_size > prompt, start - self.block_size, inside)
        return np.where(self.is_round(start, prompt), start - before, 0)

    def bucket(self, window: float) -> int:
        """Return ``window`` rounded up so that rounds and window buckets fall together.

        The result is a multiple of the block size, and it divides ``chunk`` or is a multiple of it.
        """
        if window >= self.chunk:
            return -int(-window // self.chunk) * self.chunk
        blocks = self.chunk // self.block_size
        fewest = -int(-window // self.block_size)
        return next(n for n in range(fewest, blocks + 1) if blocks % n == 0) * self.block_size
