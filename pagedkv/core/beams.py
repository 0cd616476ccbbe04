"""Beam search: the sequences of one request are extended together, the likeliest first.

Every beam names its likeliest next tokens; of all continuations of all beams the best go on, and
those among them that end are kept aside. The rules, and the scores to rounding, are those of
transformers' `GenerationMixin._beam_search`. A continuation takes over the row of the beam that it
continues, or shares that beam's blocks in the row of one that nobody continues.

A beam whose siblings are behind, because a step's tokens did not suffice for all, waits with its
candidates until theirs have come.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pagedkv.core.arrays import Bool, Float64, Int32, Int64
from pagedkv.core.manager import BlockManager
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.core.request import Certificate, Sequence

__all__ = ["NO_BEAM", "Beams", "Hypothesis", "Search"]

NO_BEAM = -1e9
"""The score of a beam that is a copy of another, as all are before the first step."""


class Hypothesis(NamedTuple):
    """A sequence that a search has found.

    Attributes:
        score: The sum of its log-probabilities, divided by its length to the power of the penalty.
        cumulative: That sum.
        token_ids: The generated tokens, a stop token included.
        stop_id: The stop token that ended it; None if its length did.
        forgotten: What its beam had forgotten.
    """

    score: float
    cumulative: float
    token_ids: list[int]
    stop_id: int | None
    forgotten: Certificate


class Search:
    """One request's beams and what they have found.

    Attributes:
        beams: [k] The sequences; which of them is best changes from step to step.
        found: The best so far, at most k, the best first.
    """

    def __init__(self, beams: list[Sequence]) -> None:
        self.beams = beams
        self.found: list[Hypothesis] = []

    @property
    def worst(self) -> float:
        """What a sequence has to be better than to be worth finding."""
        return self.found[-1].score if len(self.found) == len(self.beams) else -np.inf

    def keep(self, hypothesis: Hypothesis) -> None:
        """Keep what was found, if it is among the best."""
        self.found.append(hypothesis)
        self.found.sort(key=lambda each: -each.score)
        del self.found[len(self.beams) :]


class Choice(NamedTuple):
    """The best continuations of N searches, the best first: [N, C] each.

    Attributes:
        parent: Which of the beams is continued.
        token: With which token.
        score: The sum of the log-probabilities with it.
    """

    parent: Int64
    token: Int32
    score: Float64

    @classmethod
    def of(cls, cumulative: Float64, token_ids: Int32, logprobs: Float64) -> "Choice":
        """Choose from [N, k] beams with [N, k, C] candidates each; of equals the first."""
        count, _, most = logprobs.shape
        score = (cumulative[:, :, None] + logprobs).reshape(count, -1)
        best = np.argsort(-score, axis=1, kind="stable")[:, :most]
        token = np.take_along_axis(token_ids.reshape(count, -1), best, axis=1)
        return cls(best // most, token, np.take_along_axis(score, best, axis=1))

    def take(self, at: Int64) -> "Choice":
        """Return the continuations at these places of each search: [N, k] each."""
        parent, token, score = self
        return Choice(
            np.take_along_axis(parent, at, axis=1),
            np.take_along_axis(token, at, axis=1),
            np.take_along_axis(score, at, axis=1),
        )

    def where(self, chosen: Bool) -> "Choice":
        """Return the continuations of the chosen searches: [N]."""
        return Choice(self.parent[chosen], self.token[chosen], self.score[chosen])


class Cohort:
    """Running searches with equally many beams and candidates, side by side.

    Attributes:
        rows: [N, k] The beams' table rows.
        most: C, how many candidates a beam names.
        stop_ids: [N, width] Tokens that end a sequence.
        num_prompt, limit: [N] Tokens given, and those at which a sequence ends.
        penalty: [N] The power of the length that a sum is divided by.
        stops_full: [N] Whether enough is found once as many are as there are beams.
        looks_ahead: [N] Whether a beam is judged by how long it may become.
        worst: [N] What a beam has to be better than, as `Search.worst`.
    """

    def __init__(self, searches: list[Search], manager: BlockManager) -> None:
        table = manager.table
        self.searches = searches
        self.rows: Int32 = np.array(
            [[seq.row for seq in each.beams] for each in searches], np.int32
        )
        first = self.rows[:, 0]
        self.most = int(table.sampling["num_logprobs"][first[0]])
        self.stop_ids = table.sampling.stop_ids[first]
        self.num_prompt, self.limit = table.num_prompt[first], table.limit[first]
        asked = [each.beams[0].request.sampling for each in searches]
        self.penalty: Float64 = np.array([each.length_penalty for each in asked], np.float64)
        self.stops_full: Bool = np.array([each.early_stopping is True for each in asked])
        self.looks_ahead: Bool = np.array([each.early_stopping == "never" for each in asked])
        self.looks_ahead &= self.penalty > 0
        self.worst: Float64 = np.array([each.worst for each in searches], np.float64)


class Beams:
    """The searches of one scheduler; acts on the rows of those that are ready.

    Args:
        certify: Says what a running sequence has forgotten.

    Attributes:
        covers: [rows] Whether a row holds a beam.
    """

    def __init__(self, manager: BlockManager, certify: Callable[[Sequence], Certificate]) -> None:
        self._manager = manager
        self._table = manager.table
        self._certify = certify
        rows = self._table.num_rows
        self.covers: Bool = np.zeros(rows, np.bool_)
        self._arrived: Bool = np.zeros(rows, np.bool_)  # whose candidates wait for its siblings'
        self._token_ids: Int32 = np.zeros((rows, 0), np.int32)
        self._logprobs: Float64 = np.zeros((rows, 0), np.float64)
        self._searches: dict[int, Search] = {}  # by the leader's id, waiting ones too
        self._running: dict[int, Search] = {}
        self._cohorts: list[Cohort] = []

    def __bool__(self) -> bool:
        return bool(self._running)

    # Who searches

    def enter(self, leader: Sequence) -> None:
        """A search begins, or goes on with the beams it had: they have their rows."""
        search = self._searches.setdefault(leader.seq_id, Search(leader.beams))
        self._running[leader.seq_id] = search
        rows = [seq.row for seq in leader.beams]
        self.covers[rows], self._arrived[rows] = True, False
        self._regroup()

    def leave(self, leader: Sequence, *, ends: bool) -> None:
        """Its beams lose their rows, which they still have; what was found is kept for later.

        Args:
            ends: It does not come back.
        """
        if self._running.pop(leader.seq_id, None) is not None:
            self.covers[[seq.row for seq in leader.beams]] = False
            self._regroup()
        if ends:
            self._searches.pop(leader.seq_id, None)

    def _regroup(self) -> None:
        shapes: dict[tuple[int, int], list[Search]] = {}
        for search in self._running.values():
            most = int(self._table.sampling["num_logprobs"][search.beams[0].row])
            shapes.setdefault((len(search.beams), most), []).append(search)
        self._cohorts = [Cohort(searches, self._manager) for searches in shapes.values()]

    # A step's candidates

    def faulty(self, plan: StepPlan, result: StepResult, vocab_size: int) -> Bool:
        """Return which samples are of beams and name candidates that are no tokens: [S]."""
        mine: Bool = self.covers[plan.sample_rows]
        if mine.any():
            ids, logprobs = result.top_ids, result.top_logprobs
            assert ids is not None
            assert logprobs is not None
            used = np.arange(ids.shape[1]) < plan.sampling.num_logprobs[:, None]
            bad = (ids < 0) | (ids >= vocab_size) | np.isnan(logprobs)
            mine = mine & (bad & used).any(axis=1)
        return mine

    def take(self, plan: StepPlan, result: StepResult, sample: Int64) -> Int64:
        """Keep what the beams among a plan's samples name; return the other samples."""
        mine = self.covers[plan.sample_rows[sample]]
        if not mine.any():
            return sample
        rows, asked = plan.sample_rows[sample[mine]], sample[mine]
        assert result.top_ids is not None
        assert result.top_logprobs is not None
        width = result.top_ids.shape[1]
        short = width - self._token_ids.shape[1]
        if short > 0:
            self._token_ids = np.pad(self._token_ids, ((0, 0), (0, short)))
            self._logprobs = np.pad(self._logprobs, ((0, 0), (0, short)))
        self._token_ids[rows, :width] = result.top_ids[asked]
        self._logprobs[rows, :width] = result.top_logprobs[asked]
        self._arrived[rows] = True
        return sample[~mine]

    def advance(self) -> tuple[Int32, list[Search]]:
        """Extend the searches whose beams have all named their candidates.

        Returns:
            The rows that gained a token, and the searches that are over.
        """
        extended: list[Int32] = []
        over: list[Search] = []
        for cohort in self._cohorts:
            ready = np.flatnonzero(self._arrived[cohort.rows].all(axis=1))
            if len(ready):
                ends, choice = self._choose(cohort, ready)
                over += [cohort.searches[i] for i in ready[ends].tolist()]
                going = cohort.rows[ready[~ends]]
                self._extend(going, choice.where(~ends))
                extended.append(going.ravel())
        return np.concatenate([np.empty(0, np.int32), *extended]), over

    def _choose(self, cohort: Cohort, at: Int64) -> tuple[Bool, Choice]:
        """Judge all continuations of the searches ``at``, and keep those that end and are good.

        Returns:
            [N] Which searches are over, and the [N, k] continuations with which they would go on.
        """
        table, rows, most = self._table, cohort.rows[at], cohort.most
        named = self._token_ids[rows][:, :, :most], self._logprobs[rows][:, :, :most]
        choice = Choice.of(table.cumulative[rows], *named)
        known = table.num_known[rows[:, 0]] + 1
        length, penalty = (known - cohort.num_prompt[at]).astype(np.float64), cohort.penalty[at]
        stops = (choice.token[:, :, None] == cohort.stop_ids[at][:, None, :]).any(axis=2)
        last = known >= cohort.limit[at]
        ends = stops | last[:, None]
        self._find(cohort, at, choice, stops, ends, length**penalty)
        ahead = np.where(cohort.looks_ahead[at], cohort.limit[at] - cohort.num_prompt[at], length)
        going = choice.take(np.argsort(ends, axis=1, kind="stable")[:, : rows.shape[1]])
        full = np.isfinite(cohort.worst[at])
        hopeless = going.score[:, 0] / ahead**penalty <= cohort.worst[at]
        over = ends.all(axis=1) | (full & (hopeless | cohort.stops_full[at]))
        return over, going

    def _find(
        self,
        cohort: Cohort,
        at: Int64,
        choice: Choice,
        stops: Bool,
        ends: Bool,
        divisor: Float64,
    ) -> None:
        """Keep the sequences that end among the best of their search: [N, C] each, [N]."""
        width = cohort.rows.shape[1]
        for i, place in zip(*ends[:, :width].nonzero(), strict=True):
            search, score = cohort.searches[int(at[i])], float(choice.score[i, place])
            row = int(cohort.rows[at[i], choice.parent[i, place]])
            seq = self._table.sequences[row]
            assert seq is not None
            known, token = int(self._table.num_known[row]), int(choice.token[i, place])
            before = self._table.token_ids[row, seq.num_prompt : known].tolist()
            search.keep(
                Hypothesis(
                    score=score / float(divisor[i]),
                    cumulative=score,
                    token_ids=[*before, token],
                    stop_id=token if stops[i, place] else None,
                    forgotten=self._certify(seq),
                )
            )
            cohort.worst[at[i]] = search.worst

    def _extend(self, rows: Int32, choice: Choice) -> None:
        """Put continuations in the place of beams: [N, k] each."""
        if not len(rows):
            return
        parent, width = choice.parent, rows.shape[1]
        same = parent[:, :, None] == parent[:, None, :]
        first = ~(same & np.tri(width, k=-1, dtype=np.bool_)).any(axis=2)
        continued = (parent[:, None, :] == np.arange(width)[:, None]).any(axis=2)
        target = parent.copy()
        target[~first] = np.nonzero(~continued)[1]  # search by search, in both
        into, source = (np.take_along_axis(rows, each, axis=1) for each in (target, parent))
        if not first.all():
            self._manager.take_over(into[~first], source[~first])
        self._table.cumulative[into] = choice.score
        self._table.append_tokens(into.ravel(), choice.token.ravel())
        self._arrived[rows] = False

    def audit(self) -> None:
        """Check every invariant; AssertionError names the one that does not hold."""
        table = self._table
        rows = [seq.row for search in self._running.values() for seq in search.beams]
        assert sorted(rows) == np.flatnonzero(self.covers).tolist(), "a beam and its row disagree"
        for search in self._running.values():
            at = [seq.row for seq in search.beams if table.runs[seq.row]]
            known = table.num_known[at]
            assert (known == known[0]).all(), "beams of one search know unequally much"
            scores = [each.score for each in search.found]
            assert scores == sorted(scores, reverse=True), "what was found is out of order"
