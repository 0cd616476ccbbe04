"""What happens when blocks lack: a ladder, cheapest rung first.

    reclaim     cached blocks nobody uses are reused; the pool does that by itself
    shrink      sequences with an elastic budget forget what they attend to least; one whose own
                score fails at that ends with an error
    swap        a victim's blocks move to host memory, and come back later as they were
    recompute   a victim's blocks are dropped, and its tokens computed again later
    fail        a sequence that is alone and still lacks blocks ends with an error

Shrinking is tried first. Of the next two the one that is modelled to cost less is taken: moving
blocks out and back, counted in tokens computed in that time, against the tokens to compute again. A
sequence that has forgotten something is swapped if there is any room for it: recomputing means
replaying all its evictions. Who has to give is a function handed in.
"""

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.request import Sequence
from pagedkv.core.retention import Retention
from pagedkv.core.roster import Roster
from pagedkv.core.shrink import shrink
from pagedkv.core.stats import Totals
from pagedkv.core.tiers import HostTier
from pagedkv.core.victims import Victim
from pagedkv.errors import ConfigError, shown

__all__ = ["Pressure"]


class Pressure:
    """The ladder over one scheduler's running sequences.

    Args:
        victim: Chooses whom to push back.
        swap_cost: What moving a block of every group out and back costs, in tokens computed.
    """

    def __init__(
        self,
        roster: Roster,
        retention: Retention,
        tier: HostTier,
        totals: Totals,
        victim: Victim,
        swap_cost: float,
    ) -> None:
        self._roster = roster
        self._retention = retention
        self._manager = retention.manager
        self._table = retention.table
        self._tier = tier
        self._totals = totals
        if not callable(victim):
            raise ConfigError(
                f"it is {shown(victim)}",
                where="victim",
                remedy="give a function of a table and rows, such as one of victims.VICTIMS",
            )
        self._victim = victim
        self._swap_cost = swap_cost

    def relieve(self, lacking: int, rows: Int32) -> None:
        """Climb the ladder by one rung; afterwards less lacks, or fewer sequences run.

        Args:
            lacking: Blocks that lack.
            rows: The running rows that may be asked to give, in order of admission.
        """
        freed = shrink(self._retention, lacking, rows)
        self._totals.blocks_shrunk += freed
        if self._roster.end_faulty() or freed:
            return
        first = self._sequence(int(rows[0]))
        if all(self._sequence(row).leader is first.leader for row in rows.tolist()):
            self._roster.fail_outgrown(first)
        else:
            self.push_back(self._sequence(self._choose(rows)))

    def push_back(self, seq: Sequence) -> None:
        """Preempt a running sequence by the cheaper of swapping and recomputing."""
        self._roster.preempt(seq, swap=self._swaps(seq))

    def _swaps(self, seq: Sequence) -> bool:
        blocks = int(self._table.num_blocks[:, seq.row].sum())
        if seq.beams:  # they share blocks, which a host tier does not know of
            return False
        if not 0 < blocks <= self._tier.num_free or not self._table.num_computed[seq.row]:
            return False
        if self._table.num_evicted[seq.row]:
            return True
        ids = self._table.blocks_of(seq.row)
        # What others hold as well will most likely be found again.
        lost = int((self._manager.pool.references(ids) == 1).sum())
        groups = self._manager.num_groups
        recompute = lost * self._manager.block_size / groups
        return self._swap_cost * blocks / groups <= recompute

    def _choose(self, rows: Int32) -> int:
        row = self._victim(self._table, rows)
        chosen = isinstance(row, int | np.integer) and row in rows.tolist()
        if not chosen or not self._table.runs[row]:
            ended = " and has ended it" if chosen else ""
            raise ConfigError(
                f"it chose row {shown(row)} of {rows.tolist()}{ended}",
                where=f"victim {shown(getattr(self._victim, '__name__', self._victim))}",
                remedy="return one of the rows given, and end none",
            )
        return int(row)

    def _sequence(self, row: int) -> Sequence:
        seq = self._table.sequences[row]
        assert seq is not None
        return seq
