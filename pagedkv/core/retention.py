"""What running sequences may forget: carries eviction policies out on the sequence table.

The eviction plane says what a policy is; this says when it looks, what it is told, and keeps the
record that lets a preempted sequence forget the same things again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Bool, Float32, Int32, at_rows
from pagedkv.core.batch import Batch
from pagedkv.core.entries import Entries
from pagedkv.core.gaps import Holes
from pagedkv.core.groups import GroupLayout
from pagedkv.core.manager import BlockManager
from pagedkv.core.plan import Observation, StepPlan, StepResult
from pagedkv.core.replay import (
    log_round,
    no_wider,
    replay_round,
    restore_scores,
    save_scores,
    until_logged,
)
from pagedkv.core.request import Certificate, Sequence
from pagedkv.core.table import ENTRY_COLUMNS
from pagedkv.errors import PolicyError
from pagedkv.eviction import (
    UNOBSERVED,
    Policy,
    View,
    check,
    condemn,
    may_evict,
    observe_from,
    policy,
    rank,
    reach,
    update,
)

__all__ = ["Heard", "Retention"]

Heard = tuple[Int32, Float32]
"""Rows, [B], and the attention mass of a step's last token on their entries: [groups, B, width]."""


class Retention:
    """Eviction for the sequences of one scheduler.

    Rounds of eviction lie at token counts that depend on the sequence alone, and no step crosses
    one; so what a sequence keeps is the same whoever runs beside it.
    """

    def __init__(self, config: EngineConfig, layout: GroupLayout, manager: BlockManager) -> None:
        self._config = config
        self._layout = layout
        self.manager = self._manager = manager
        self.table = self._table = manager.table
        self._policies: list[Policy] = []
        self.entries = Entries(config, layout, manager)
        self.windows: Int32 = np.array(layout.windows, np.int32)
        self.slides = bool(self.windows.any())
        self.faults: list[tuple[Int32, PolicyError]] = []  # of scores; `Roster.end_faulty` clears
        self._usual = self.resolve(config.cache.eviction)

    # Before a sequence runs

    def resolve(self, text: str | Policy | None) -> Policy:
        """Return a request's policy, checked against model and cache.

        Raises:
            PolicyError: It cannot be read, or cannot hold on this model and cache.
        """
        if text is None:
            return self._usual
        cache = self._config.cache
        return check(
            text if isinstance(text, Policy) else policy(text),
            cache.block_size,
            has_rope=self._config.model.rope,
            windowed=any(self._config.model.sliding_window),
            granularity=cache.granularity,
        )

    def bind(self, seq: Sequence) -> None:
        """Set a row's policy when its sequence is admitted, and what is left to replay."""
        row = seq.row
        table, evicts = self._table, seq.policy.evicts
        table.policy_id[row] = -1
        if evicts:
            table.policy_id[row] = self._policy_id(seq.policy)
            self._keep_columns(seq.policy)
        table.rotates[row] = evicts and seq.policy.positions == "cache"
        self.resume(seq)
        table.by_token[row] = evicts and seq.policy.unit == "token"
        if table.by_token[row]:
            table.tokens.clear(np.array([row], np.int32))

    def _keep_columns(self, chosen: Policy) -> None:
        """Let the table keep what a policy will read of blocks."""
        wanted = {*self._table.kept_columns}
        if chosen.positions == "cache":
            wanted.add("turn")
        scorer = chosen.scorer()
        if chosen.unit == "block" and scorer.places:
            wanted.add("first_position")
        if chosen.unit == "block" and scorer.observe != "none":
            wanted |= {"score"} if scorer.counts else {"score", "weight"}
        if chosen.shrinks:
            wanted.add("mass")
        self._table.kept_columns = tuple(each for each in ENTRY_COLUMNS if each in wanted)

    def resume(self, seq: Sequence) -> None:
        """Let a row replay what its sequence had forgotten when it was preempted.

        A fork or a cached prefix may have brought it there: then it knows at once what it knew.
        """
        self._table.replay_until[seq.row] = seq.saved.computed if seq.saved else 0
        restore_scores(self._table, np.array([seq.row], np.int32))

    def _policy_id(self, policy: Policy) -> int:
        """Return the place of a policy among those in use; nobody's place is given away again."""
        if policy in self._policies:
            return self._policies.index(policy)
        used = set(self._table.policy_id[self._table.seq_id >= 0].tolist())
        place = next(i for i in range(len(self._policies) + 1) if i not in used)
        self._policies[place : place + 1] = [policy]
        return place

    # While a step is planned

    def limit(self, rows: Int32, need: Int32) -> Int32:
        """Return ``need`` cut so that no row computes across a round of its policy: [B] each.

        Where windows slide, rows that compute again hold no more than they did.
        """
        if self.slides:
            need = no_wider(self._table, rows, need)
        if not self._policies:
            return need
        for chosen, at in self.by_policy(Batch(self._table, rows, need)):
            computed = self._table.num_computed[rows[at]]
            cadence = chosen.cadence(self._manager.block_size)
            ahead = cadence.next_round(computed, self._table.num_prompt[rows[at]]) - computed
            need = need.copy()
            need[at] = np.minimum(need[at], until_logged(self._table, rows[at], ahead))
        return need

    def observations(self, batch: Batch, width: int) -> list[Observation]:
        """Return what the executor is to observe for the policies of the rows.

        Args:
            width: Of the plan's block tables; those who rank tokens need only their own.
        """
        wanted, rows = [], batch.rows
        for chosen, at in self.by_policy(batch):
            live = at[self._table.num_computed[rows[at]] >= self._table.replay_until[rows[at]]]
            if len(live):
                entries = width
                if chosen.unit == "token":
                    entries = self.entries.width(chosen, rows[live])
                    self._table.reserve_slots(entries)
                view = self.entries.facts(chosen, rows[live], groups=1)
                wanted.append(
                    Observation(
                        unit=chosen.unit,
                        width=entries,
                        kind=chosen.scorer().observe,
                        gqa=chosen.gqa,
                        members=live.astype(np.int32),
                        first_query=observe_from(chosen, view, batch.counts[live]).astype(np.int32),
                    )
                )
        return wanted

    # After a step

    def observe(self, plan: StepPlan, result: StepResult, alive: Bool) -> dict[int, Heard]:
        """Let the scores of running sequences take in what a step observed.

        Call it before the step's tokens are counted as computed.

        Args:
            alive: [B] Which of the plan's sequences still run.

        Returns:
            Their masses, for `evict`, by number of their policy.
        """
        heard: dict[int, Heard] = {}
        for wanted, observed in zip(plan.observations, result.observed, strict=True):
            live = np.flatnonzero(alive[wanted.members]).astype(np.int32)
            rows, members = plan.rows[wanted.members[live]], wanted.members[live]
            if not len(rows):
                continue
            counts = plan.query_start[members + 1] - plan.query_start[members]
            number = int(self._table.policy_id[rows[0]])
            chosen = self._policies[number]
            if chosen.scorer().observe != "none":
                with self.blaming(rows):
                    self._score(chosen, rows, counts, observed.values[:, at_rows(live)])
            heard[number] = rows, observed.mass[:, at_rows(live)]
            if chosen.shrinks:  # may be asked for between two steps
                self._table.mass[:, at_rows(rows), : wanted.width] = heard[number][1]
        return heard

    @contextmanager
    def blaming(self, rows: Int32) -> Iterator[None]:
        """Note whose own score fails in here, instead of raising it to whoever takes the step."""
        try:
            yield
        except PolicyError as fault:
            self.faults.append((rows, fault))

    def _score(self, chosen: Policy, rows: Int32, counts: Int32, values: Float32) -> None:
        """Let the scores of rows of one policy take in [groups, B, width] observed values."""
        table, entries, at = self._table, self.entries.owner(chosen), at_rows(rows)
        width = values.shape[2]
        if chosen.scorer().counts:
            entries.score[:, at, :width] += values
            return
        view, flat = self.entries.view(chosen, rows, width=width), values.reshape(-1, width)
        score, weight = update(chosen, view, np.tile(counts, table.num_groups), flat)
        entries.score[:, at, :width] = score.reshape(values.shape)
        entries.weight[:, at, :width] = weight.reshape(values.shape)

    def evict(self, batch: Batch, heard: dict[int, Heard]) -> Int32:
        """Let windows slide, then hold the rounds that are due and take what they decide.

        What a window hides goes first, and for nothing: a round must not give up visible blocks
        in its place, nor depend on how many steps the sliding took.

        Call it after the step's tokens were counted as computed.

        Args:
            heard: What `observe` returned of the step.

        Returns:
            Rows that cannot go on, because the pool has no blocks to pack their tokens into. What
            they keep is decided: preempt them at once, and they come back to it.
        """
        rows = batch.rows
        stuck = [rows[:0]]
        if self.slides:
            self._slide(rows)
        for number, at in batch.policies:
            chosen = self._policies[number]
            cadence = chosen.cadence(self._manager.block_size)
            computed, prompt = self._table.num_computed[rows[at]], self._table.num_prompt[rows[at]]
            due = rows[at[cadence.is_round(computed, prompt)]]
            if len(due):
                with self.blaming(due):
                    stuck.append(self._round(chosen, due, heard.get(number)))
            if chosen.adaptive is not None:
                self._replay_shrinks(chosen, rows[at[~cadence.is_round(computed, prompt)]])
            restore_scores(self._table, rows[at])
        return np.concatenate(stuck) if len(stuck) > 1 else stuck[0]

    def _round(self, chosen: Policy, rows: Int32, heard: Heard | None) -> Int32:
        """Hold one round for rows of one policy, or hold it again if it was held before.

        Layers with a sliding window take no part: what it hides goes anyway, and a gap within it
        would let queries see further back than the model ever did.

        Returns:
            The rows that `BlockManager.compact` could not serve.
        """
        table = self._table
        replays = table.num_computed[rows] <= table.replay_until[rows]
        # What one table of a row gives up, they all do, if all that counts is where entries stand.
        groups = 1 if chosen.agrees and not self.slides else table.num_groups
        facts, width = self.entries.facts(chosen, rows, groups=groups), None
        if not replays.any():
            if not may_evict(chosen, facts):
                return rows[:0]
            width = reach(chosen, facts)
        view = self.entries.view(chosen, rows, width=width, facts=facts)
        gone = condemn(chosen, view).reshape(groups, len(rows), -1)
        if groups < table.num_groups:
            gone = np.repeat(gone, table.num_groups, axis=0)
        if self.slides:
            gone[self.windows > 0] = False
        for i in np.flatnonzero(replays).tolist():
            gone[:, i] = self._logged(chosen, rows[i : i + 1], gone.shape[2])
        return self.forget(chosen, view, rows, gone, heard)

    def _logged(self, chosen: Policy, row: Int32, width: int) -> Bool:
        """Return what a row, [1], forgot at this point before: [groups, width]."""
        in_use = self.entries.in_use(chosen, row)[:, 0]
        keep = np.ones((len(in_use), width), np.bool_)
        replay_round(self._table, int(row[0]), keep, in_use)
        gone: Bool = (np.arange(width) < in_use[:, None]) & ~keep
        return gone

    def forget(
        self, chosen: Policy, view: View, rows: Int32, gone: Bool, heard: Heard | None
    ) -> Int32:
        """Drop entries of rows of one policy for good, and log it.

        Args:
            view: Of those rows.
            gone: [groups, B, width] Which entries go, if any; none past that width does.
            heard: What is known of the mass of entries; None if they go a second time.

        Returns:
            The rows that `BlockManager.compact` could not serve.
        """
        table, holes = self._table, Holes.of(gone)
        if not len(holes.table):
            return rows[:0]
        self._certify(chosen, view, rows, holes, heard)
        asked, losing = rows, holes.lost.any(axis=0)
        if not losing.all():
            rows, holes = rows[losing], Holes.of(gone[:, losing])
        in_use = self.entries.in_use(chosen, rows)
        log_round(table, rows, holes, in_use)
        if chosen.unit == "token":
            keep = np.arange(self.entries.width(chosen, asked)) < in_use[:, :, None]
            keep[:, :, : gone.shape[2]] &= ~holes.mask
            lost, stuck = self._manager.compact(rows, keep)
        else:
            self._manager.drop(rows, holes)
            lost, stuck = holes.lost * table.block_size, rows[:0]
        table.num_evicted[rows] += lost.sum(axis=0)
        return stuck

    def _certify(
        self, chosen: Policy, view: View, rows: Int32, holes: Holes, heard: Heard | None
    ) -> None:
        """Add up what goes."""
        table, member = self._table, holes.member
        if chosen.scores_errors:  # first, for it may fail
            errors = rank(chosen, view)[holes.table, holes.entry]
            errors[errors == np.float32(UNOBSERVED)] = 0
            table.left_out[rows] += np.bincount(member, errors, len(rows))
        if heard is not None:
            place = np.full(table.num_rows, -1)
            place[heard[0]] = np.arange(len(heard[0]))
            at = place[rows]
            # Those that replay were not observed.
            known = slice(None) if at.min() >= 0 else at[member] >= 0
            mass = heard[1][holes.group[known], at[member[known]], holes.entry[known]]
            table.forfeited[rows] += np.bincount(member[known], mass, len(rows))

    def _slide(self, rows: Int32) -> None:
        """Drop the blocks that no later query of a sliding-window layer can see: no loss."""
        table, size = self._table, self._table.block_size
        resident = table.num_resident[:, rows]
        blind = np.maximum(resident - self.windows[:, None] + 1, 0) // size
        blind[self.windows == 0] = 0
        sliding = np.flatnonzero(blind.any(axis=0))
        if len(sliding):
            width = int(table.num_blocks[:, rows[sliding]].max())
            gone = np.arange(width) < blind[:, sliding, None]
            self._manager.drop(rows[sliding], Holes.of(gone))

    def by_policy(self, batch: Batch) -> list[tuple[Policy, Int32]]:
        """Return each policy among the rows and the indices of its rows."""
        return [(self._policies[i], at) for i, at in batch.policies]

    # Preemption: a sequence that has evicted forgets the same things again

    def _replay_shrinks(self, chosen: Policy, rows: Int32) -> None:
        """Let rows that replay forget what they were made to forget between rounds."""
        for row in rows[self._table.num_computed[rows] <= self._table.replay_until[rows]]:
            one = np.array([row], np.int32)
            gone = self._logged(chosen, one, self.entries.width(chosen, one))[:, None]
            with self.blaming(one):
                self.forget(chosen, self.entries.view(chosen, one), one, gone, None)

    def save(self, seq: Sequence) -> None:
        """Remember a row's scores before its sequence is preempted, unless it was replaying."""
        row, table = seq.row, self._table
        if table.policy_id[row] >= 0 and table.num_computed[row] >= table.replay_until[row]:
            width = int(self.entries.in_use(seq.policy, np.array([row], np.int32)).max())
            seq.saved = save_scores(table, row, seq.policy.unit, width)

    def certificate(self, seq: Sequence) -> Certificate:
        """Return what a sequence has forgotten, means over groups."""
        replaying = seq.row < 0 or self._table.replay_until[seq.row] > 0
        evicted, forfeited, left_out = 0, 0.0, 0.0
        if replaying and seq.saved is not None:
            _, _, evicted, forfeited, left_out = seq.saved
        elif seq.row >= 0:
            evicted = int(self._table.num_evicted[seq.row])
            forfeited = float(self._table.forfeited[seq.row])
            left_out = float(self._table.left_out[seq.row])
        groups = self._layout.num_groups
        error = left_out / groups if seq.policy.scores_errors else None
        return Certificate(evicted / groups, forfeited / groups, error)
