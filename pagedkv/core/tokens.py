"""What eviction knows of single tokens, for sequences whose policy evicts by token."""

import numpy as np

from pagedkv.core.arrays import Bool, Float32, Int32

__all__ = ["TokenColumns"]


class TokenColumns:
    """Columns beside the block tables, one entry per resident token and in the tables' order.

    They take no memory until a sequence that evicts by token is admitted; entries past a table's
    resident tokens are 0.

    Attributes:
        first_position: [groups, rows, width] Where each token stands in its sequence.
        score, weight: [groups, rows, width] What the policy knows of it.
    """

    COLUMNS = ("first_position", "score", "weight")

    def __init__(self, num_groups: int, num_rows: int) -> None:
        shape = (num_groups, num_rows, 0)
        self.first_position: Int32 = np.zeros(shape, np.int32)
        self.score: Float32 = np.zeros(shape, np.float32)
        self.weight: Float32 = np.zeros(shape, np.float32)

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """All columns."""
        return self.COLUMNS

    @property
    def width(self) -> int:
        """Tokens per table that there is room for."""
        return int(self.score.shape[2])

    def reserve(self, width: int, rows: Int32) -> None:
        """Make room for ``width`` tokens per table; only what ``rows`` hold is carried over."""
        if width <= self.width:
            return
        for name in self.COLUMNS:
            old = getattr(self, name)
            # Fresh zeros cost no memory until they are written.
            new = np.zeros((*old.shape[:2], max(width, 2 * self.width)), old.dtype)
            new[:, rows, : old.shape[2]] = old[:, rows]
            setattr(self, name, new)

    def clear(self, rows: Int32) -> None:
        """Forget what is known of rows."""
        for name in self.COLUMNS:
            getattr(self, name)[:, rows] = 0

    def append(self, rows: Int32, resident: Int32, computed: Int32, counts: Int32) -> None:
        """Note the positions of tokens that have become resident; there is room for them.

        Args:
            rows: [B]
            resident: [groups, B] Tokens resident before.
            computed: [B] The position of each row's first new token.
            counts: [B] How many are new.
        """
        member = np.repeat(np.arange(len(rows)), counts)
        offset = np.arange(len(member)) - np.repeat(np.cumsum(counts) - counts, counts)
        groups = np.arange(len(resident))[:, None]
        at = groups, rows[member], resident[:, member] + offset
        self.first_position[at] = computed[member] + offset

    def keep(self, rows: Int32, keep: Bool) -> None:
        """Close the gaps that tokens leave; the order of the rest stands.

        Args:
            rows: [B]
            keep: [groups, B, width] Which entries stay; False where none is in use.
        """
        width = keep.shape[2]
        order = np.argsort(~keep, axis=2, kind="stable")
        stay = np.arange(width) < keep.sum(axis=2)[:, :, None]
        for name in self.COLUMNS:
            column = getattr(self, name)
            moved = np.take_along_axis(column[:, rows, :width], order, axis=2)
            column[:, rows, :width] = np.where(stay, moved, 0)

    def drop_blocks(self, rows: Int32, gone: Bool, resident: Int32, block_size: int) -> None:
        """Drop the tokens of whole blocks.

        Args:
            rows: [B]
            gone: [groups, B, width] Which blocks go.
            resident: [groups, B] Tokens resident before.
            block_size: Tokens in a block.
        """
        # Who stands beside these rows may have more blocks than there are columns for.
        most = -(-int(resident.max()) // block_size)
        stays = np.repeat(~gone[:, :, :most], block_size, axis=2)
        self.keep(rows, stays & (np.arange(stays.shape[2]) < resident[:, :, None]))

    def copy(self, parents: Int32, children: Int32) -> None:
        """Give each child what is known of its parent's tokens: [N] rows each."""
        for name in self.COLUMNS:
            column = getattr(self, name)
            column[:, children] = column[:, parents]
