"""A real run and its simulation make the same plans, field by field, step by step."""

import time

import msgspec
import numpy as np
import pytest

from pagedkv import Request, SamplingParams
from pagedkv.sim.cluster import Cluster
from pagedkv.sim.content import Content
from pagedkv.sim.presets import cost_preset
from pagedkv.sim.recording import Recording
from pagedkv.sim.simulator import Replica
from pagedkv.sim.workload import SimRequest, Workload

LLM = pytest.importorskip("pagedkv.device.llm").LLM
NONE = np.zeros(0, np.int64)


class RealRun:
    """An engine on a real model, its clock the sum of the times its steps took."""

    def __init__(self, num_blocks, prompts, arrivals, outputs):
        self.llm = LLM(
            "tiny-random", block_size=4, num_blocks=num_blocks, max_num_seqs=4,
            max_num_batched_tokens=24,
        )  # fmt: skip
        self.plans, self.seconds, self.tokens, self.clock = [], [], {}, 0.0
        self.arrivals, self.ends = {}, {}
        waiting = list(zip(prompts, arrivals, outputs, strict=True))
        step = 0
        while waiting or self.llm.scheduler.has_unfinished():
            while waiting and (waiting[0][1] <= step or not self.llm.scheduler.has_unfinished()):
                prompt, _, output = waiting.pop(0)
                self.add(len(self.arrivals), prompt, output)
            self.step()
            step += 1

    def add(self, number, prompt, output):
        sampling = SamplingParams(max_tokens=output, seed=number, ignore_eos=True)
        self.llm.scheduler.add(
            Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling)
        )
        self.arrivals[number] = self.clock

    def step(self):
        begin = time.perf_counter()
        plan, _, output = self.llm.engine.step()
        self.seconds.append(time.perf_counter() - begin)
        self.clock += self.seconds[-1]
        self.plans.append(plan)
        for end in output.finished:
            self.tokens[int(end.request_id)] = np.array(end.token_ids, np.int32)
            self.ends[int(end.request_id)] = self.clock


def same(one, two):
    if isinstance(one, msgspec.Struct):
        fields = one.__struct_fields__
        return all(same(getattr(one, name), getattr(two, name)) for name in fields)
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two)
    return one == two


@pytest.fixture(scope="module", params=[200, 22], ids=["roomy", "short of blocks"])
def real(request):
    rng = np.random.default_rng(5)
    shared = rng.integers(0, 50, 12)
    prompts = [
        np.concatenate([shared, rng.integers(0, 50, rng.integers(1, 20))]).astype(np.int32)
        for _ in range(9)
    ]
    arrivals = [0, 0, 0, 3, 4, 9, 9, 20, 21]
    return RealRun(request.param, prompts, arrivals, [14, 3, 25, 8, 8, 30, 1, 12, 9]), prompts


def simulated(real, prompts, *, leap, watch=None):
    requests = [
        SimRequest(
            arrival=real.arrivals[number],
            prompt=Content(NONE, NONE, None, prompt),
            output_len=len(real.tokens[number]),
            output_stream=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    config, cost = real.llm.config, cost_preset("a100-llama3-8b")
    recording = Recording(cost, config.cache.block_size, real.seconds, real.tokens)
    replica = Replica(config, cost, leap=leap, executor=recording)
    if watch is not None:
        replica.engine.observers.append(watch)
    Cluster([replica]).run(Workload("real", lambda: requests))
    return replica


def test_plans_are_identical_step_by_step(real):
    run, prompts = real
    plans = []
    replica = simulated(run, prompts, leap=False, watch=lambda plan, *_: plans.append(plan))
    assert len(plans) == len(run.plans) > 30
    for wanted, found in zip(run.plans, plans, strict=True):
        assert same(wanted, found), f"step {wanted.step}"
    assert replica.clock == run.clock
    if run.llm.scheduler.manager.pool.num_blocks < 100:
        assert replica.scheduler.totals.num_preemptions > 0
    assert replica.scheduler.stats() == run.llm.scheduler.stats()


def test_with_leaps_the_end_is_the_same(real):
    run, prompts = real
    replica = simulated(run, prompts, leap=True)
    assert replica.clock == run.clock
    assert replica.scheduler.stats() == run.llm.scheduler.stats()
    latest = max(run.ends[n] - run.arrivals[n] for n in run.ends)
    assert replica.recorder.latency["e2el"].greatest == pytest.approx(latest)
