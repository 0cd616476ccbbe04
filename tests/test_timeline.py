"""The recorder against a slow second opinion that looks at the pool while a step runs."""

import itertools
import math

import msgspec
import numpy as np
import pytest

from pagedkv import Engine, Scheduler, StepResult
from pagedkv.timeline import CACHED, FREE, SHARED, TimelineRecorder
from tests.core.fakes import VOCAB, grouped, make_config, make_request


class Witness:
    """An executor that notes, block by block, who holds what while the plan is out."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.owners = []
        self.preempted = []

    def execute(self, plan):
        manager = self.scheduler.manager
        table, row_owner = manager.table, []
        for block in range(manager.pool.num_blocks):
            holders = [
                int(table.seq_id[row])
                for row in table.running.tolist()
                if block in table.blocks_of(row).tolist()
            ]
            assert len(holders) == manager.pool.ref_count[block]
            if len(holders) == 1:
                row_owner.append(holders[0])
            elif holders:
                row_owner.append(SHARED)
            else:
                row_owner.append(CACHED if manager.index.findable(block) else FREE)
        self.owners.append(row_owner)
        tokens = (plan.positions[plan.sample_index] * 7 + plan.sample_rows * 3) % VOCAB
        return StepResult(token_ids=tokens.astype(np.int32))


def record(config, arrivals, *, num_groups=1, clock=None):
    """Serve (step, request) pairs; return the timeline, the witness and the scheduler."""
    scheduler = Scheduler(grouped(config, num_groups))
    witness = Witness(scheduler)
    recorder = TimelineRecorder(scheduler, clock)
    engine = Engine(scheduler, witness, (recorder,))
    todo = sorted(arrivals, key=lambda pair: pair[0])
    step = 0
    while todo or scheduler.has_unfinished():
        while todo and todo[0][0] <= step:
            scheduler.add(todo.pop(0)[1])
        engine.step()
        step += 1
    return recorder.timeline(), witness, scheduler


def crowd(seed, users=14, **sampling):
    """Requests that begin alike, differ in length and come one after another."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, 9).tolist()
    return [
        (
            2 * i,
            make_request(
                f"user {i}",
                shared + rng.integers(0, VOCAB, int(rng.integers(1, 14))).tolist(),
                max_tokens=int(rng.integers(1, 24)),
                n=2 if i % 5 == 3 else 1,
                **sampling,
            ),
        )
        for i in range(users)
    ]


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_owners_are_what_the_pool_holds_while_the_step_runs(seed, num_groups):
    config = make_config(num_blocks=22 * num_groups, max_num_batched_tokens=12)
    timeline, witness, scheduler = record(config, crowd(seed), num_groups=num_groups)
    assert scheduler.stats().num_preemptions
    busy = timeline.num_tokens > 0
    np.testing.assert_array_equal(timeline.owner[busy], np.array(witness.owners))
    assert {FREE, CACHED, SHARED} < set(np.unique(timeline.owner).tolist())


def test_owners_are_right_while_blocks_are_evicted():
    config = make_config(num_blocks=30, max_num_batched_tokens=12)
    cache = msgspec.structs.replace(config.cache, eviction="sinks=4 + recent=8")
    config = msgspec.structs.replace(config, cache=cache)
    requests = [(i, make_request(f"user {i}", 9 + i, max_tokens=30)) for i in range(6)]
    timeline, witness, scheduler = record(config, requests)
    assert scheduler.stats().num_preemptions
    busy = timeline.num_tokens > 0
    np.testing.assert_array_equal(timeline.owner[busy], np.array(witness.owners))


def test_counts_follow_from_the_owners():
    timeline, _, scheduler = record(make_config(num_blocks=22), crowd(1))
    owner = timeline.owner
    assert owner.shape == (len(timeline.num_running), 22)
    free = (owner == FREE).sum(axis=1)
    np.testing.assert_array_equal(timeline.num_held + timeline.num_cached + free, 22)
    assert (timeline.num_entries >= timeline.num_held + timeline.num_shared).all()
    stats = scheduler.stats()
    computed = stats.prompt_tokens - stats.prompt_tokens_cached
    assert timeline.num_tokens.sum() >= computed
    assert timeline.num_waiting.max() > 0


def test_spans_tell_every_admission_and_every_preemption():
    requests = [(step, request) for step, request in crowd(2) if request.sampling.n == 1]
    timeline, _, scheduler = record(make_config(num_blocks=16), requests)
    stats = scheduler.stats()
    preempted = [span for span in timeline.spans if span.preempted]
    assert len(preempted) == stats.num_preemptions > 0
    assert len(timeline.spans) == stats.num_finished + stats.num_preemptions
    for seq_id, name in timeline.request_of.items():
        spans = [span for span in timeline.spans if span.seq_id == seq_id]
        assert name == f"user {requests[seq_id][0] // 2}"
        assert [span.preempted for span in spans] == [True] * (len(spans) - 1) + [False]
        for before, after in itertools.pairwise(spans):
            assert before.end < after.begin
        for span in spans:
            assert span.begin <= span.first_token <= span.end
            during = timeline.owner[span.begin : span.end]
            assert ((during == seq_id) | (during == SHARED)).any(axis=1).all()


def test_a_prompt_in_chunks_gives_its_first_token_with_the_last_chunk():
    config = make_config(num_blocks=32, max_num_batched_tokens=8)
    timeline, _, _ = record(config, [(0, make_request("long", 30, max_tokens=5))])
    (span,) = timeline.spans
    assert (span.begin, span.first_token, span.end, span.preempted) == (0, 3, 8, False)
    assert timeline.num_tokens.tolist() == [8, 8, 8, 6, 1, 1, 1, 1]


def test_forks_share_until_they_write():
    config = make_config(num_blocks=32)
    timeline, _, _ = record(config, [(0, make_request("pair", 6, n=2, max_tokens=6))])
    assert set(timeline.request_of.values()) == {"pair"}
    assert timeline.num_shared.tolist()[:2] == [0, 1]
    assert timeline.num_copies.tolist()[:3] == [0, 1, 0]
    assert timeline.num_entries[1] == timeline.num_held[1] + 1


def test_a_timeline_can_be_taken_while_requests_run():
    scheduler = Scheduler(make_config())
    recorder = TimelineRecorder(scheduler)
    with pytest.raises(ValueError, match="no step"):
        recorder.timeline()
    engine = Engine(scheduler, Witness(scheduler), (recorder,))
    scheduler.add(make_request("only", 5, max_tokens=9))
    for _ in range(3):
        engine.step()
    early = recorder.timeline()
    assert [(span.begin, span.end) for span in early.spans] == [(0, 3)]
    scheduler.abort("only")
    scheduler.add(make_request("next", 5, max_tokens=1))
    engine.step()
    late = recorder.timeline()
    assert [(span.begin, span.end) for span in late.spans] == [(0, 3), (3, 4)]
    assert early.owner.shape[0] == 3, "a timeline is not changed by what comes after it"
    assert math.isnan(late.seconds[0])


def test_the_clock_is_read_once_per_step():
    ticks = iter([0.5, 1.0, 4.0])
    config = make_config()
    request = make_request("only", 5, max_tokens=3)
    timeline, _, _ = record(config, [(0, request)], clock=lambda: next(ticks))
    assert timeline.seconds.tolist() == [0.5, 1.0, 4.0]
