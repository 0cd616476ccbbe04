"""The entries that policies rank: blocks of the tables, or the single tokens in them."""

from typing import Any

import msgspec
import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Float32, Int32, at_rows, whole_tables
from pagedkv.core.groups import GroupLayout
from pagedkv.core.manager import BlockManager
from pagedkv.core.replay import scored_entries
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
        return scored_entries(self._table, chosen.unit)

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

    def facts(self, chosen: Policy, rows: Int32, *, groups: int | None = None) -> View:
        """Return the eviction plane's view of some rows' tables, without their entries.

        Args:
            groups: The first so many alone; if omitted, all.
        """
        table, layout = self._table, self._layout
        groups = groups or table.num_groups
        heads = self._num_kv_heads if layout.heads_per_group == 1 else 1
        if groups < table.num_groups or table.num_groups % heads:
            heads = 1
        row = np.tile(rows, groups) if groups > 1 else rows
        return View(
            score=NOT_READ,
            weight=NOT_READ,
            first_position=NO_ENTRIES,
            num_resident=table.num_resident[:groups, rows].ravel(),
            num_computed=table.num_computed[row],
            num_prompt=table.num_prompt[row],
            block_size=self.size(chosen),
            stride=table.block_size,
            layers=groups // heads if groups == table.num_groups else 1,
            heads=heads,
            pressure=self._pool.num_held / self._pool.num_blocks,
        )

    def view(
        self,
        chosen: Policy,
        rows: Int32,
        *,
        width: int | None = None,
        facts: View | None = None,
    ) -> View:
        """Return the eviction plane's view of some rows' tables.

        What is known of entries lies entry after entry: tables are many and short.

        Args:
            width: The first so many entries of each table; if omitted, all that the widest has
                room for.
            facts: What `facts` gives of these rows, of however many groups; if omitted, of all.
        """
        facts = facts or self.facts(chosen, rows)
        width = width or self.width(chosen, rows)
        owner, scorer, at = self.owner(chosen), chosen.scorer(), at_rows(rows)
        tables = self._table.tables_of(rows)[: len(facts.num_resident)]
        groups = len(tables) // len(rows)

        def of(column: Any) -> Any:
            if isinstance(at, slice):
                return np.asfortranarray(column[:groups, at, :width].reshape(-1, width))
            held = whole_tables(column).take(tables).view(column.dtype)
            return np.asfortranarray(held.reshape(-1, column.shape[2])[:, :width])

        first_position, score, weight = NO_ENTRIES, NOT_READ, NOT_READ
        if scorer.places:
            first_position = of(owner.first_position)
        if scorer.observe == "none":
            score = weight = np.zeros_like(first_position, np.float32)
        elif not scorer.counts:
            score, weight = of(owner.score), of(owner.weight)
        elif scorer.weighs:
            score, since = of(owner.score), View.queries_since_sealed
            weight = since(first_position, facts.num_computed, facts.block_size)
        else:  # all that is asked is who was observed at all
            sealed = np.arange(width, dtype=np.int32)[:, None] < facts.num_sealed
            score, weight = of(owner.score), sealed.astype(np.float32).T
        return msgspec.structs.replace(
            facts, score=score, weight=weight, first_position=first_position
        )
