"""Where else blocks can live: host memory, to which whole sequences are swapped and back.

Integers only: which block goes where. The moves of a step are part of its plan.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Int32
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import Sequence, SwappedSequence
from pagedkv.core.table import PROGRESS_COLUMNS

__all__ = ["HostTier"]

TOKENS = "tokens."
NOTHING: Int32 = np.empty((0, 2), np.int32)


class HostTier:
    """The host blocks, and the sequences whose state lies in them: all of one or nothing.

    A swapped sequence keeps everything: block contents, scores, positions, what it has forgotten.
    Host blocks that a plan reads from are released when it is committed, not before, so that no
    block is both read and written in one step.

    Args:
        num_blocks: Host blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: Int32 = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = num_blocks
        self._out: list[Int32] = []
        self._in: list[Int32] = []
        self._left: list[Sequence] = []
        self._returned: list[Sequence] = []
        self._under_way = False
        self._held: dict[int, int] = {}  # blocks by sequence, for the audit

    @property
    def num_free(self) -> int:
        """Host blocks that hold nothing."""
        return self._num_free

    def swap_out(self, manager: BlockManager, seq: Sequence) -> None:
        """Write down where a running sequence's state goes; the caller frees its row after.

        There must be as many free host blocks as it holds.
        """
        table, row = manager.table, seq.row
        num_blocks = table.num_blocks[:, row].copy()
        width = int(num_blocks.max())
        used = np.arange(width) < num_blocks[:, None]
        device = table.block_table[:, row, :width][used]
        self._num_free -= len(device)
        host = self._free[self._num_free : self._num_free + len(device)].copy()
        columns: dict[str, npt.NDArray[Any]] = {
            name: getattr(table, name)[:, row, :width].copy() for name in table.kept_columns
        }
        if table.by_token[row]:
            most = int(table.num_resident[:, row].max())
            columns |= {
                TOKENS + name: getattr(table.tokens, name)[:, row, :most].copy()
                for name in table.tokens.COLUMNS
            }
        progress: dict[str, npt.NDArray[Any]] = {
            name: getattr(table, name)[..., row].copy() for name in PROGRESS_COLUMNS
        }
        seq.swapped = SwappedSequence(host, num_blocks, columns, progress)
        self._held[seq.seq_id] = len(host)
        self._out.append(np.stack([device, host], axis=1))
        self._left.append(seq)

    def swap_in(self, manager: BlockManager, seq: Sequence) -> None:
        """Give a swapped sequence, bound to a row, new blocks and the state it had.

        Raises:
            OutOfBlocks: The pool has too few; nothing changes.
        """
        assert seq.swapped is not None
        host, num_blocks, columns, progress = seq.swapped
        rows = np.array([seq.row], np.int32)
        ids = manager.allocate(len(host))
        table = manager.table
        table.append_blocks(rows, num_blocks[:, None], ids)
        for name, column in columns.items():
            owner = table.tokens if name.startswith(TOKENS) else table
            getattr(owner, name.removeprefix(TOKENS))[:, seq.row, : column.shape[1]] = column
        for name, value in progress.items():
            getattr(table, name)[..., seq.row] = value
        self._in.append(np.stack([host, ids], axis=1))
        self._returned.append(seq)

    def take_moves(self, *, carried_out: bool) -> tuple[Int32, Int32]:
        """Return a plan's moves: [N, 2] pool to host, [N, 2] host to pool.

        Args:
            carried_out: Whether the plan will be; if not, its moves wait for one that is.
        """
        if not carried_out or not (self._out or self._in):
            return NOTHING, NOTHING
        moves = np.concatenate([NOTHING, *self._out]), np.concatenate([NOTHING, *self._in])
        self._out, self._in, self._under_way = [], [], True
        return moves

    def commit(self) -> None:
        """A plan's moves were made: sequences that returned no longer need host blocks."""
        self._end(self._returned)

    def discard(self) -> None:
        """A plan's moves were not made: who returned is still here, who left never arrived."""
        self._end(self._left)

    def _end(self, gone: list[Sequence]) -> None:
        if self._under_way:
            for seq in gone:
                self.drop(seq)
            self._left, self._returned, self._under_way = [], [], False

    def drop(self, seq: Sequence) -> None:
        """Give up what a sequence has here, if anything."""
        if seq.swapped is None:
            return
        host = seq.swapped.blocks
        self._free[self._num_free : self._num_free + len(host)] = host
        self._num_free += len(host)
        del self._held[seq.seq_id]
        seq.swapped = None

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold."""
        held = sum(self._held.values())
        assert held + self._num_free == self.num_blocks, "a host block is neither held nor free"
        free = self._free[: self._num_free]
        assert len(np.unique(free)) == len(free), "a host block is free twice"
