"""Who was pushed back comes back, though on its way it held more than when it went."""

import msgspec
import pytest

from pagedkv import CacheConfig, EngineConfig, ModelConfig, Request, SamplingParams, SchedulerConfig

from .answers import Service
from .fakes import make_config, make_request

SIZE = 16
BOUNDED = {
    "window": {"sliding_window": (32, 32)},
    "windows and none": {"sliding_window": (32, 0)},
    "policy": {},
}


def request(name, num_prompt, max_tokens, **more):
    """A prompt of its own, to be answered in so many tokens."""
    prompt = [ord(name[0]) * 100 + len(name) + i for i in range(num_prompt)]
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=len(name))
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params, **more)


def config(bounded, granularity, *, num_blocks, caching=False):
    facts = BOUNDED[bounded]
    groups = {"sequence": 1, "layer": 2}[granularity]
    return EngineConfig(
        model=ModelConfig(
            num_layers=2, num_kv_heads=2, max_model_len=2000, vocab_size=50_000, **facts
        ),
        cache=CacheConfig(
            block_size=SIZE,
            num_blocks=num_blocks * groups,
            granularity=granularity,
            eviction="sinks=4 + budget=32" if bounded == "policy" else "full",
            enable_prefix_caching=caching,
        ),
        scheduler=SchedulerConfig(scheduling_policy="priority", max_num_seqs=8),
    )


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_prompt", [10, 150])
@pytest.mark.parametrize(
    ("bounded", "granularity"),
    [
        ("window", "sequence"),
        ("window", "layer"),
        ("windows and none", "layer"),
        ("policy", "sequence"),
        ("policy", "layer"),
    ],
)
def test_a_bounded_sequence_comes_back_into_a_tight_pool(bounded, granularity, num_prompt, caching):
    """What slid or was forgotten is there again for a while, when its tokens are computed again."""
    # With a layer that forgets nothing the pool has to hold all of it.
    num_blocks = 20 if bounded == "windows and none" else 12
    service = Service(config(bounded, granularity, num_blocks=num_blocks, caching=caching))
    service.add(request("low", num_prompt, 130, priority=5))
    for _ in range(120):
        service.step()
    service.add(*(request("urgent" + "!" * i, 90, 30) for i in range(3))).run()
    ends = service.finished.values()
    assert [end.finish_reason for end in ends] == ["length"] * 4
    assert service.finished["low", 0].num_preemptions > 0


WHOLE_POOL = {  # the fewest blocks that each policy gets along with
    "adaptive": ("sinks=4 + recent=4 + score=lift + adaptive=16..40", 5),
    "by the chunk": ("sinks=4 + recent=8 + budget=12 + chunk=8", 4),
    "by score": ("sinks=4 + recent=4 + score=lift + budget=16", 5),
    "by the part": ("budget=24 + lowest=0.3", 7),
}


@pytest.mark.parametrize("pushed_back_by", ["a discarded plan", "an urgent request"])
@pytest.mark.parametrize("name", WHOLE_POOL)
def test_one_that_needs_the_whole_pool_comes_back_whenever_it_was_pushed_back(name, pushed_back_by):
    eviction, num_blocks = WHOLE_POOL[name]
    configured = make_config(4, num_blocks, scheduling_policy="priority")
    low = msgspec.structs.replace(
        make_request("low", [7] * 8, max_tokens=80), eviction=eviction, priority=5
    )
    alone = Service(configured).add(low).run().finished["low", 0]
    assert alone.finish_reason == "length"
    preemptions = 0
    for steps in range(1, 80, 3):
        service = Service(configured).add(low)
        for _ in range(steps):
            service.step()
        if pushed_back_by == "a discarded plan":
            service.scheduler.discard(service.scheduler.schedule())
        else:
            service.add(make_request("urgent", [3] * 8, max_tokens=4))
        end = service.run().finished["low", 0]
        assert (end.finish_reason, end.token_ids) == ("length", alone.token_ids)
        preemptions += end.num_preemptions
    assert preemptions > 20


def test_a_window_is_computed_again_in_steps_no_wider_than_it_was_held():
    service = Service(config("window", "sequence", num_blocks=12))
    service.add(request("low", 10, 200, priority=5))
    for _ in range(180):
        service.step()
    service.add(request("urgent", 150, 20))
    widest = 0
    while service.scheduler.has_unfinished():
        plan = service.step()
        if 0 in plan.seq_ids:
            tokens = int(plan.num_resident[0, plan.seq_ids.tolist().index(0)])
            widest = max(widest, -(-tokens // SIZE))
    assert service.finished["low", 0].num_preemptions == 1
    assert widest == 4  # the window's three, and one more


def test_beams_that_come_back_keep_others_out_while_they_may_still_part():
    """They may hold fewer blocks than their prompt fills: that is no room for anybody else."""
    service = Service(
        EngineConfig(
            model=ModelConfig(num_layers=2, max_model_len=400, vocab_size=50_000),
            cache=CacheConfig(
                block_size=2, num_blocks=64, granularity="layer", enable_prefix_caching=False
            ),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=200),
        )
    )
    params = SamplingParams(beam_width=3, n=1, max_tokens=40, ignore_eos=True)
    forgets = "recent=4 + score=last + budget=8 + chunk=4"
    beams = Request(
        request_id="beams", prompt_token_ids=[*range(50)], sampling=params, eviction=forgets
    )
    service.add(beams)
    for _ in range(15):
        service.step()
    scheduler = service.scheduler
    scheduler.discard(scheduler.schedule())
    service.add(request("other", 58, 4), request("third", 58, 4))
    while scheduler.has_unfinished():
        assert scheduler.admission.reserved().now >= 0
        service.step()
    assert {end.finish_reason for end in service.finished.values()} == {"length"}
