"""What running sequences may forget: carries eviction policies out on the sequence table.

The eviction plane says what a policy is; this says when it looks, what it is told, and keeps the
record that lets a preempted sequence forget the same things again.
"""

import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Bool, Int32
from pagedkv.core.groups import GroupLayout
from pagedkv.core.manager import BlockManager
from pagedkv.core.plan import Observation, StepPlan, StepResult
from pagedkv.core.request import UNBOUNDED, Eviction, SavedScores, Sequence
from pagedkv.core.table import SCORE_COLUMNS
from pagedkv.errors import PolicyError
from pagedkv.eviction import (
    Policy,
    View,
    check,
    lookback,
    observe_from,
    policy,
    select,
    update,
)

__all__ = ["Retention"]


class Retention:
    """Eviction for the sequences of one scheduler.

    Rounds of eviction lie at token counts that depend on the sequence alone, and no step crosses
    one; so what a sequence keeps is the same whoever runs beside it.

    Columns by table row: `policy_id` (-1 evicts nothing), `rotates` (cache positions), `lost_mass`.
    """

    def __init__(self, config: EngineConfig, layout: GroupLayout, manager: BlockManager) -> None:
        self._config = config
        self._layout = layout
        self._manager = manager
        self._table = manager.table
        self._policies: list[Policy] = []
        rows = self._table.num_rows
        self.policy_id: Int32 = np.full(rows, -1, np.int32)
        self.rotates: Bool = np.zeros(rows, np.bool_)
        self._windows: Int32 = np.array(layout.windows, np.int32)

    # Before a sequence runs

    def resolve(self, text: str | Policy | None) -> Policy:
        """Return a request's policy, checked against model and cache.

        Raises:
            PolicyError: It cannot be read, or cannot hold on this model and cache.
        """
        cache = self._config.cache
        wanted = cache.eviction if text is None else text
        parsed = wanted if isinstance(wanted, Policy) else policy(wanted)
        if parsed.unit == "token":
            raise PolicyError(
                "unit=token needs compaction, which is not built",
                where="policy.unit",
                remedy="give unit=block",
            )
        return check(
            parsed,
            cache.block_size,
            # Closing gaps would move keys inside a window that is measured in positions.
            has_rope=self._config.model.rope and not any(self._config.model.sliding_window),
            granularity=cache.granularity,
        )

    def max_blocks(self, policy: Policy) -> int:
        """Return the most blocks per table that the policy lets a sequence hold at once."""
        if policy.most_tokens is None:
            return UNBOUNDED
        size = self._manager.block_size
        most = max(policy.most_tokens, *self._layout.windows)
        # The cap, the chunk in flight, and a block each that sinks, window and tail round up to.
        return -(-most // size) + self._cadence_chunk(policy) // size + 3

    def _cadence_chunk(self, policy: Policy) -> int:
        return policy.cadence(self._manager.block_size).chunk

    def usable_prefix(self, policy: Policy) -> int:
        """Return how many tokens a sequence may take from the prefix cache.

        A cached prefix was made without eviction and is scored by nobody, so only as much of it
        is safe as leaves the first round of eviction and all that it looks back on to be computed.
        """
        if not policy.evicts:
            return UNBOUNDED
        looks_back = lookback(policy, self._manager.block_size)
        least = policy.most_tokens if policy.adaptive is None else policy.adaptive[0]
        # A threshold evicts before the cap is reached, a pyramid's last layer as well.
        early = policy.threshold is not None or policy.spread == "pyramid"
        if looks_back is None or least is None or early or policy.scorer().static:
            return 0
        return max(0, least - looks_back)

    def bind(self, seq: Sequence) -> None:
        """Set a row's policy when its sequence is admitted, and what is left to replay."""
        row = seq.row
        self.policy_id[row] = self._policy_id(seq.policy) if seq.policy.evicts else -1
        self.rotates[row] = seq.policy.evicts and seq.policy.positions == "cache"
        self._table.replay_until[row] = seq.saved.computed if seq.saved else 0

    def _policy_id(self, policy: Policy) -> int:
        if policy not in self._policies:
            self._policies.append(policy)
        return self._policies.index(policy)

    # While a step is planned

    def limit(self, rows: Int32, need: Int32) -> Int32:
        """Return ``need`` cut so that no row computes across a round of its policy."""
        for chosen, at in self._by_policy(rows):
            computed = self._table.num_computed[rows[at]]
            cadence = chosen.cadence(self._manager.block_size)
            ahead = cadence.next_round(computed, self._table.num_prompt[rows[at]]) - computed
            replay = self._table.replay_until[rows[at]] - computed
            ahead = np.where(replay > 0, np.minimum(ahead, replay), ahead)
            need = need.copy()
            need[at] = np.minimum(need[at], ahead)
        return need

    def place(self, rows: Int32) -> None:
        """Choose the positions that the next tokens of rotating rows are written at.

        At a block boundary a sequence starts over from the number of tokens it still has, so
        positions stay as small as its cache. Inside a block they go on: a block's keys are turned
        as one.
        """
        table = self._table
        at = rows[self.rotates[rows] & (table.num_computed[rows] % table.block_size == 0)]
        table.next_position[at] = table.num_resident[:, at].max(axis=0, initial=0)

    def turns(self, rows: Int32, width: int) -> Int32 | None:
        """Return by how many positions each block's queries must be turned: [groups, B, width].

        A query at resident index n with position w sees a block whose first key has index c and
        position r at distance n - c; the rotation alone gives w - r. Turning the query by the
        difference is exact and leaves keys alone (relative rotary positions, Su et al. 2021).
        None if every turn is 0.
        """
        if not self.rotates[rows].any():
            return None
        table = self._table
        index = np.arange(width, dtype=np.int32)
        used = index < table.num_blocks[:, rows, None]
        query = table.num_resident[:, rows] - table.next_position[rows]
        key = table.rotation[:, rows, :width] - index * table.block_size
        turned = used & self.rotates[rows, None]
        turns: Int32 = np.where(turned, query[:, :, None] + key, 0)
        return turns if turns.any() else None

    def observations(self, rows: Int32, counts: Int32) -> list[Observation]:
        """Return what the executor is to observe for the policies of the rows."""
        wanted = []
        for chosen, at in self._by_policy(rows):
            live = at[self._table.num_computed[rows[at]] >= self._table.replay_until[rows[at]]]
            if len(live):
                view = self._view(rows[live], groups=1)
                wanted.append(
                    Observation(
                        kind=chosen.scorer().observe,
                        gqa=chosen.gqa,
                        members=live.astype(np.int32),
                        first_query=observe_from(chosen, view, counts[live]).astype(np.int32),
                    )
                )
        return wanted

    # After a step

    def observe(self, plan: StepPlan, result: StepResult, alive: Bool) -> None:
        """Let the scores of running sequences take in what a step observed.

        Call it before the step's tokens are counted as computed.

        Args:
            alive: [B] Which of the plan's sequences still run.
        """
        table = self._table
        for wanted, observed in zip(plan.observations, result.observed, strict=True):
            live = np.flatnonzero(alive[wanted.members])
            rows, members = plan.rows[wanted.members[live]], wanted.members[live]
            if not len(rows):
                continue
            counts = np.diff(plan.query_start)[members]
            width = observed.values.shape[2]
            values = observed.values[:, live].reshape(-1, width)
            view = self._view(rows, width=width)
            chosen = self._policies[int(self.policy_id[rows[0]])]
            score, weight = update(chosen, view, np.tile(counts, table.num_groups), values)
            shape = (table.num_groups, len(rows), width)
            table.score[:, rows, :width] = score.reshape(shape)
            table.weight[:, rows, :width] = weight.reshape(shape)
            table.mass[:, rows, :width] = observed.mass[:, live]

    def evict(self, rows: Int32) -> None:
        """Let windows slide, then hold the rounds that are due and take what they decide.

        What a window hides goes first, and for nothing: a round must not give up visible blocks
        in its place, nor depend on how many steps the sliding took.

        Call it after the step's tokens were counted as computed.
        """
        if self._windows.any():
            self._slide(rows)
        for chosen, at in self._by_policy(rows):
            cadence = chosen.cadence(self._manager.block_size)
            computed, prompt = self._table.num_computed[rows[at]], self._table.num_prompt[rows[at]]
            due = rows[at[cadence.is_round(computed, prompt)]]
            if len(due):
                self._round(chosen, due)
            self._restore(rows[at])

    def _round(self, chosen: Policy, rows: Int32) -> None:
        """Hold one round for rows of one policy, or hold it again if it was held before.

        Layers with a sliding window take no part: what it hides goes anyway, and a gap within it
        would let queries see further back than the model ever did.
        """
        table = self._table
        keep = select(chosen, self._view(rows)).reshape(table.num_groups, len(rows), -1)
        keep[self._windows > 0] = True
        for i in np.flatnonzero(table.num_computed[rows] <= table.replay_until[rows]).tolist():
            self._replay(int(rows[i]), keep[:, i])
        width = keep.shape[2]
        used = np.arange(width) < table.num_blocks[:, rows, None]
        gone = used & ~keep
        losing = gone.any(axis=(0, 2))
        rows, keep, gone = rows[losing], keep[:, losing], gone[:, losing]
        if not len(rows):
            return
        mass = np.where(gone, table.mass[:, rows, :width], 0).sum(axis=(0, 2), dtype=np.float64)
        self._log(rows, keep)
        lost = self._manager.drop(rows, keep)
        table.num_evicted[rows] += lost.sum(axis=0) * table.block_size
        table.forfeited[rows] += mass

    def _slide(self, rows: Int32) -> None:
        """Drop the blocks that no later query of a sliding-window layer can see: no loss."""
        table, size = self._table, self._table.block_size
        resident = table.num_resident[:, rows]
        blind = np.maximum(resident - self._windows[:, None] + 1, 0) // size
        blind[self._windows == 0] = 0
        sliding = np.flatnonzero(blind.any(axis=0))
        if len(sliding):
            width = int(table.num_blocks[:, rows[sliding]].max())
            self._manager.drop(rows[sliding], np.arange(width) >= blind[:, sliding, None])

    def _view(self, rows: Int32, *, width: int | None = None, groups: int | None = None) -> View:
        """Return the eviction plane's view of some rows' tables."""
        table, layout = self._table, self._layout
        groups = groups or table.num_groups
        if width is None:
            width = int(table.num_blocks[:, rows].max(initial=1))
        heads = self._config.model.num_kv_heads if layout.heads_per_group == 1 else 1
        if table.num_groups % heads:
            heads = 1
        flat = (groups * len(rows), width)
        return View(
            score=table.score[:groups, rows, :width].reshape(flat),
            weight=table.weight[:groups, rows, :width].reshape(flat),
            first_position=table.first_position[:groups, rows, :width].reshape(flat),
            num_resident=table.num_resident[:groups, rows].ravel(),
            num_computed=np.tile(table.num_computed[rows], groups),
            num_prompt=np.tile(table.num_prompt[rows], groups),
            block_size=table.block_size,
            layers=groups // heads if groups == table.num_groups else 1,
            heads=heads if groups == table.num_groups else 1,
            pressure=self._manager.pool.num_held / self._manager.pool.num_blocks,
        )

    def _by_policy(self, rows: Int32) -> list[tuple[Policy, Int32]]:
        """Return each policy among the rows and the indices of its rows."""
        ids = self.policy_id[rows]
        return [
            (self._policies[i], np.flatnonzero(ids == i).astype(np.int32))
            for i in np.unique(ids[ids >= 0]).tolist()
        ]

    # Preemption: a sequence that has evicted forgets the same things again

    def _log(self, rows: Int32, keep: Bool) -> None:
        """Record a round in the logs of the rows that hold it for the first time."""
        for i, row in enumerate(rows.tolist()):
            seq = self._table.sequences[row]
            assert seq is not None
            computed = int(self._table.num_computed[row])
            seq.evictions.setdefault(
                computed, Eviction(keep[:, i, : self._table.num_blocks[:, row].max()].copy())
            )

    def _replay(self, row: int, keep: Bool) -> None:
        """Overwrite what a round decided with what it decided before: [groups, width] in place."""
        seq = self._table.sequences[row]
        assert seq is not None
        logged = seq.evictions.get(int(self._table.num_computed[row]))
        keep[:] = np.arange(keep.shape[1]) < self._table.num_blocks[:, row, None]
        if logged is not None:
            keep[:, : logged.keep.shape[1]] = logged.keep

    def save(self, seq: Sequence) -> None:
        """Remember a row's scores before its sequence is preempted, unless it was replaying."""
        row, table = seq.row, self._table
        computed = int(table.num_computed[row])
        if self.policy_id[row] >= 0 and computed >= table.replay_until[row]:
            width = int(table.num_blocks[:, row].max())
            columns = [getattr(table, name)[:, row, :width].copy() for name in SCORE_COLUMNS]
            seq.saved = SavedScores(
                computed, columns, int(table.num_evicted[row]), float(table.forfeited[row])
            )

    def certificate(self, seq: Sequence) -> tuple[float, float]:
        """Return the tokens a sequence has forgotten and the mass forfeited, means over groups."""
        replaying = seq.row < 0 or self._table.replay_until[seq.row] > 0
        evicted, forfeited = 0, 0.0
        if replaying and seq.saved is not None:
            evicted, forfeited = seq.saved.num_evicted, seq.saved.forfeited
        elif seq.row >= 0:
            evicted = int(self._table.num_evicted[seq.row])
            forfeited = float(self._table.forfeited[seq.row])
        return evicted / self._layout.num_groups, forfeited / self._layout.num_groups

    def _restore(self, rows: Int32) -> None:
        """Give rows that have just finished replaying the scores they had."""
        table = self._table
        replaying = table.replay_until[rows] > 0
        for row in rows[
            replaying & (table.num_computed[rows] >= table.replay_until[rows])
        ].tolist():
            seq = table.sequences[row]
            assert seq is not None
            assert seq.saved is not None
            for name, column in zip(SCORE_COLUMNS, seq.saved.columns, strict=True):
                getattr(table, name)[:, row, : column.shape[1]] = column
            table.forfeited[row] = seq.saved.forfeited
            table.replay_until[row] = 0
