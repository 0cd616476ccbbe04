"""The entries that policies rank: blocks of the tables, or the single tokens in them."""

from typing import Any

import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Float32, Int32, Int64, whole_tables
from pagedkv.core.groups import GroupLayout
from pagedkv.core.manager import BlockManager
from pagedkv.core.table import SequenceTable
from pagedkv.core.tokens import TokenColumns
from pagedkv.eviction import Policy, View

__all__ = ["Entries"]

NO_ENTRIES: Int32 = np.zeros((0, 0), np.int32)
NOT_READ: Float32 = np.zeros((0, 0), np.float32)


class Entries:
    """What is known of the entries of one scheduler's tables, as the eviction plane reads it."""

    def __init__(self, config: EngineConfig, layout: GroupLayout, manager: BlockManager) -> None:
        self._table = manager.table
        self._pool = manager.pool
        self._layout = layout
        self._num_kv_heads = config.model.num_kv_heads

    def owner(self, chosen: Policy) -> SequenceTable | TokenColumns:
        """Return who keeps what a policy knows of the entries that it ranks."""
        return self._table.tokens if chosen.unit == "token" else self._table

    def size(self, chosen: Policy) -> int:
        """Return the tokens of an entry."""
        return 1 if chosen.unit == "token" else self._table.block_size

    def in_use(self, chosen: Policy, rows: Int32) -> Int32:
        """Return how many entries each table has: [groups, B]."""
        table = self._table
        counts = table.num_resident if chosen.unit == "token" else table.num_blocks
        in_use: Int32 = counts[:, rows]
        return in_use

    def width(self, chosen: Policy, rows: Int32) -> int:
        """Return how many entries the widest table has room for."""
        blocks = int(self._table.num_blocks[:, rows].max(initial=1))
        return blocks * self._table.block_size // self.size(chosen)

    def view(
        self,
        chosen: Policy,
        rows: Int32,
        *,
        width: int | None = None,
        groups: int | None = None,
        entries: bool = True,
    ) -> View:
        """Return the eviction plane's view of some rows' tables.

        Args:
            width: Entries per table; if omitted, what the widest table has room for.
            groups: The first so many alone; if omitted, all.
            entries: Whether to gather what is known of entries; if not, the view has none.
        """
        table, layout = self._table, self._layout
        groups = groups or table.num_groups
        heads = self._num_kv_heads if layout.heads_per_group == 1 else 1
        if groups < table.num_groups or table.num_groups % heads:
            heads = 1

        row = np.tile(rows, groups) if groups > 1 else rows
        tables = table.tables_of(rows)[: len(row)]
        size, computed = self.size(chosen), table.num_computed[row]
        resident = table.num_resident.reshape(-1)[tables]
        score = weight = NOT_READ
        first_position = NO_ENTRIES
        if entries:
            width = width or self.width(chosen, rows)
            score, weight, first_position = self._columns(chosen, tables, width, resident, computed)
        return View(
            score=score,
            weight=weight,
            first_position=first_position,
            num_resident=resident,
            num_computed=computed,
            num_prompt=table.num_prompt[row],
            block_size=size,
            stride=table.block_size,
            layers=groups // heads if groups == table.num_groups else 1,
            heads=heads,
            pressure=self._pool.num_held / self._pool.num_blocks,
        )

    def _columns(
        self, chosen: Policy, tables: Int64, width: int, resident: Int32, computed: Int32
    ) -> tuple[Float32, Float32, Int32]:
        """Return score, weight and first position of the entries of tables: [N, width] each.

        They lie entry after entry: tables are many and short.
        """
        owner, scorer, size = self.owner(chosen), chosen.scorer(), self.size(chosen)

        def of(column: Any) -> Any:
            held = whole_tables(column).take(tables).view(column.dtype)
            return np.asfortranarray(held.reshape(-1, column.shape[2])[:, :width])

        if scorer.counts and not scorer.weighs:  # all that is asked is who was observed at all
            sealed = np.arange(width, dtype=np.int32)[:, None] < resident // size
            return of(owner.score), sealed.astype(np.float32).T, NO_ENTRIES
        first_position = of(owner.first_position)
        if scorer.observe == "none":
            score = weight = np.zeros_like(first_position, np.float32)
        elif scorer.counts:
            score = of(owner.score)
            weight = View.queries_since_sealed(first_position, computed, size)
        else:
            score, weight = of(owner.score), of(owner.weight)
        return score, weight, first_position
