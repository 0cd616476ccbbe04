"""What eviction sees of the block tables: one frozen struct of arrays, read and never written."""

import numpy as np
import numpy.typing as npt
from msgspec import Struct

__all__ = ["Bool", "Float32", "Int", "View"]

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Int = npt.NDArray[np.integer]


class View(Struct, frozen=True, kw_only=True, eq=False):
    """N block tables of one policy, W entries wide, entries in order of position.

    N is ``layers * heads * rows`` flattened in that order: group-major, as a
    ``[groups, rows, W]`` column reshaped to ``[-1, W]`` lies in memory.

    Attributes:
        score: [N, W] The score's first accumulator; 0 in a new entry.
        weight: [N, W] Its second one; 0 in a new entry.
        first_position: [N, W] Position, in its sequence, of each entry's first token.
        num_resident: [N] Tokens resident; every entry but the tail is full.
        num_computed: [N] Tokens computed so far, evicted ones included.
        num_prompt: [N] Tokens of the prompt; decides where the eviction rounds lie.
        block_size: Tokens in an entry: in a block, or 1 where single tokens are ranked.
        stride: Tokens between two rounds after the prompt: the size of the blocks, also where
            single tokens are ranked that lie in them; 0 is ``block_size``.
        layers: Layers with a table of their own; 1 where all share one.
        heads: KV heads with a table of their own in each of those layers.
        pressure: How much of the pool is in use, from 0 to 1; only ``adaptive`` reads it.
    """

    score: Float32
    weight: Float32
    first_position: Int
    num_resident: Int
    num_computed: Int
    num_prompt: Int
    block_size: int
    stride: int = 0
    layers: int = 1
    heads: int = 1
    pressure: float = 0.0

    @property
    def num_sealed(self) -> Int:
        """[N] Entries that are full; the tail, where there is one, comes after them."""
        sealed: Int = self.num_resident // self.block_size
        return sealed

    @property
    def entry(self) -> Int:
        """[W] The index of each entry in its table."""
        return np.arange(self.score.shape[1])

    @staticmethod
    def queries_since_sealed(first_position: Int, num_computed: Int, block_size: int) -> Float32:
        """Return how many tokens were computed since entries sealed, their last ones included.

        Args:
            first_position: [N, W] Position of each entry's first token.
            num_computed: [N] Tokens computed so far.
            block_size: Tokens in an entry.
        """
        since = (num_computed - (block_size - 1))[:, None] - first_position
        count: Float32 = np.maximum(since, 0).astype(np.float32)
        return count

    def before(self, count: Int) -> Bool:
        """Return which entries are among the first so many of their table, [N]: [N, W]."""
        # Entry after entry, for so the inner loops are long.
        first: Bool = (np.arange(self.score.shape[1], dtype=count.dtype)[:, None] < count).T
        return first

    @property
    def round_size(self) -> int:
        """Tokens between two rounds after the prompt, which places the rounds."""
        return self.stride or self.block_size

    def rows(self, chosen: Int | Bool) -> "View":
        """Return the view of some of the N tables; layers and heads no longer divide it."""
        return View(
            score=self.score[chosen],
            weight=self.weight[chosen],
            first_position=self.first_position[chosen],
            num_resident=self.num_resident[chosen],
            num_computed=self.num_computed[chosen],
            num_prompt=self.num_prompt[chosen],
            block_size=self.block_size,
            stride=self.stride,
            pressure=self.pressure,
        )
