"""A fault within a step ends whom it concerns, and nobody beside it."""

import sys
from types import ModuleType

import msgspec
import pytest

from pagedkv import CacheConfig, EngineConfig, Request, SamplingParams
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
