"""A fault within a step ends whom it concerns, and nobody beside it."""

import sys
from types import ModuleType

import msgspec
import numpy as np
import pytest

from pagedkv import CacheConfig, EngineConfig, Request, SamplingParams
from pagedkv.core.shrink import shrink
from pagedkv.eviction import SCORES

from .answers import Service, answer


def request(name, **more):
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=len(name))
    prompt = list(range(len(name), 20 + len(name)))
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params, **more)


def service():
    return Service(EngineConfig(cache=CacheConfig(block_size=4, num_blocks=100)))


def served(name):
    """What a request is answered alone."""
    return service().add(request(name)).run().finished[name, 0].token_ids


@pytest.fixture
def stranger(monkeypatch):
    module = ModuleType("stranger")
    monkeypatch.setitem(sys.modules, "stranger", module)
    return module


@pytest.mark.parametrize(("name", "base"), [("rank", "sum"), ("update", "mean")])
def test_a_score_that_fails_ends_its_own_request(stranger, name, base):
    def fail(*_):
        raise RuntimeError("no")

    stranger.score = lambda: msgspec.structs.replace(SCORES[base], **{name: fail})
    found = service().add(
        request("a"),
        request("bb", eviction="score=stranger:score + budget=8 + chunk=8"),
        request("ccc", eviction="h2o + budget=8 + chunk=8"),
    )
    found.run()
    bad = found.finished["bb", 0]
    assert bad.finish_reason == "error"
    assert f"{name} of score 'stranger:score' failed" in bad.error
    assert found.finished["a", 0].token_ids == served("a")
    assert found.finished["ccc", 0].finish_reason == "length"
    assert found.finished["ccc", 0].num_evicted_tokens > 0


class Lobo:
    """A leave-one-out score of somebody's own; it fails when asked while ``fails`` of a view."""

    def __init__(self):
        self.fails = lambda view: False
        self.num_failed = 0

    def __call__(self):
        return msgspec.structs.replace(SCORES["lobo"], rank=self.rank)

    def rank(self, view, *facts):
        if self.fails(view):
            self.num_failed += 1
            raise RuntimeError("no")
        return SCORES["lobo"].rank(view, *facts)


def elastic(name, score, **more):
    return request(name, eviction=f"{score} + recent=4 + adaptive=8..24 + chunk=8", **more)


def check_only_one_failed(found, bad):
    assert found.finished[bad, 0].finish_reason == "error"
    assert "rank of score 'stranger:score' failed" in found.finished[bad, 0].error
    others = [end for (name, _), end in found.finished.items() if name != bad]
    assert len(others) == 2
    assert all(end.token_ids == served(end.request_id) for end in others)


def test_a_score_that_fails_while_blocks_lack_ends_its_own_request(stranger):
    stranger.score = score = Lobo()
    config = EngineConfig(cache=CacheConfig(block_size=4, num_blocks=16))
    found = Service(config).add(
        request("a"), elastic("bb", "score=stranger:score"), elastic("ccc", "score=lift")
    )
    scheduler = found.scheduler
    while scheduler.has_unfinished():
        score.fails = lambda _: True
        plan = scheduler.schedule()
        score.fails = lambda _: False
        for end in scheduler.commit(plan, answer(plan)).finished:
            found.finished[end.request_id, end.index] = end
        scheduler.audit()
    assert score.num_failed == 1
    check_only_one_failed(found, "bb")


def test_a_score_that_fails_while_a_shrink_is_done_again_ends_its_own_request(stranger):
    stranger.score = score = Lobo()
    found = service().add(
        request("a"), elastic("bb", "score=stranger:score"), elastic("ccc", "score=lift")
    )
    scheduler = found.scheduler
    (bad,) = scheduler._roster.requests["bb"]
    while bad.row < 0 or scheduler.table.num_computed[bad.row] < 26:  # between two rounds
        found.step()
    rows = np.array([bad.row], np.int32)
    assert shrink(scheduler.retention, 1, rows) == 1
    found.step()
    scheduler._roster.preempt(bad)
    score.fails = lambda view: (view.num_computed % 4 != 0).any()
    found.run()
    assert score.num_failed == 1
    check_only_one_failed(found, "bb")


@pytest.mark.parametrize("where", ["observe", "evict", "_finish_ended"])
def test_an_interrupt_while_a_result_is_taken_in_loses_nothing(monkeypatch, where):
    found = service().add(request("a"), request("bb"))
    for _ in range(5):
        found.step()
    scheduler = found.scheduler
    plan = scheduler.schedule()
    owner = scheduler if where == "_finish_ended" else scheduler.retention

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheduler.commit(plan, answer(plan))
    scheduler.audit()
    assert found.stats.num_waiting == 2
    found.run()
    assert found.finished["a", 0].token_ids == served("a")
    assert found.finished["bb", 0].token_ids == served("bb")
