"""What sequences keep, and what they then say, depends on nothing but themselves."""

import pickle
import random
import zlib
from contextlib import suppress

import msgspec
import numpy as np
import pytest

from pagedkv import (
    CacheConfig,
    EngineConfig,
    InvalidTransition,
    ModelConfig,
    PolicyError,
    Request,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    StepResult,
)
from pagedkv.core.plan import Observed
from pagedkv.errors import NeverFits
from pagedkv.eviction import policy
from tests.eviction import naive
from tests.eviction.twin import Twin

VOCAB = 61
SIZE = 4
SHAPES = {"sequence": (1, 1), "layer": (2, 1), "head": (2, 2)}
POLICIES = {
    name: policy(f"{text} + chunk=8")
    for name, text in {
        "streaming": "sinks=4 + budget=16",
        "h2o": "recent=0.5 + score=sum + budget=20 + gqa=sum",
        "tova": "score=last + budget=12",
        "window": "recent=4 + score=window(8) + budget=16",
        "lift": "sinks=2 + recent=4 + score=lift + budget=20 + positions=original",
        "ema": "recent=4 + score=ema(0.8) + budget=16",
        "knorm": "recent=4 + score=key_norm + budget=16",
        "random": "sinks=4 + recent=4 + score=random(3) + budget=16 + positions=original",
        "threshold": "recent=4 + score=last + budget=24 + threshold=0.9",
        "lowest": "recent=4 + score=max + lowest=0.4 + floor=12",
        "ratio": "sinks=4 + recent=4 + score=mean + ratio=0.5",
        "full": "full",
    }.items()
}
TOKEN = {
    f"token {name}": policy(f"{text} + unit=token + chunk=8")
    for name, text in {
        "streaming": "sinks=3 + budget=17",
        "h2o": "recent=0.5 + score=sum + budget=19 + gqa=sum",
        "tova": "score=last + budget=12",
        "window": "recent=4 + score=window(8) + budget=15",
        "lift": "sinks=2 + recent=3 + score=lift + budget=18",
        "ema": "recent=5 + score=ema(0.8) + budget=14",
        "knorm": "recent=4 + score=key_norm + budget=16",
        "random": "sinks=1 + recent=4 + score=random(3) + budget=16",
        "threshold": "recent=4 + score=last + budget=24 + threshold=0.9",
        "lowest": "recent=4 + score=max + lowest=0.4 + floor=11",
        "ratio": "sinks=2 + recent=4 + score=mean + ratio=0.5",
        "lobo": "recent=4 + score=lobo + budget=15",
    }.items()
}
POLICIES |= TOKEN
BOUNDED = [name for name, each in POLICIES.items() if each.tokens]
# Every policy at the cheapest granularity, and one of each kind at the others.
CASES = [(name, "sequence") for name in POLICIES]
CASES += [(name, shape) for name in ("streaming", "h2o", "ema") for shape in ("layer", "head")]
CASES += [("token h2o", "layer"), ("token ema", "head")]
SPREAD = {
    "token pyramid": policy(
        "recent=4 + score=last + budget=21 + spread=pyramid + chunk=8 + unit=token"
    ),
    "token ada": policy("recent=4 + score=mean + budget=15 + spread=ada + chunk=8 + unit=token"),
    "pyramid": policy("recent=4 + score=last + budget=24 + spread=pyramid + chunk=8"),
    "ada": policy("recent=4 + score=mean + budget=16 + spread=ada + chunk=8"),
}


def make_config(num_blocks=4096, granularity="sequence", *, caching=False, model=None, **limits):
    layers, heads = SHAPES[granularity] if granularity != "sequence" else (2, 2)
    facts = {"num_layers": layers, "num_kv_heads": heads, "vocab_size": VOCAB, "rope": True} | (
        model or {}
    )
    return EngineConfig(
        model=ModelConfig(**facts),
        cache=CacheConfig(
            block_size=SIZE,
            num_blocks=num_blocks,
            granularity=granularity,
            enable_prefix_caching=caching,
        ),
        scheduler=SchedulerConfig(**({"max_num_seqs": 8, "max_num_batched_tokens": 512} | limits)),
    )


def make_request(name, length, eviction, *, shared=0, **sampling):
    """A request called by a number; its prompt begins like others' and goes on in its own way."""
    rng = random.Random(name)
    prompt = [i % VOCAB for i in range(shared)]
    prompt += [rng.randrange(VOCAB) for _ in range(length - shared)]
    params = {"max_tokens": 16, "seed": name} | sampling
    return Request(
        request_id=str(name),
        prompt_token_ids=prompt,
        eviction=eviction,
        sampling=SamplingParams(**params),
    )


class Witness:
    """A device without numbers: what it stores of a token depends on all that the token saw.

    So a wrong survivor, a block from another past or a wrong distance changes every later token.
    It answers observations with the made-up masses that `naive.Table` makes up as well.
    """

    def __init__(self, scheduler):
        self.table, self.retention = scheduler.table, scheduler.retention
        self.table.kept_columns = ("first_position",)  # is asked for here whatever policies read
        self.windows = scheduler.layout.windows
        shape = scheduler.table.num_groups, scheduler.manager.pool.num_blocks * SIZE
        self.content = np.zeros(shape, np.int64)
        self.truth = np.full(shape, -1, np.int64)
        self.rotation = np.full(shape, -1, np.int64)
        self.names = {}
        self.host = {}

    def execute(self, plan):
        sources, targets = plan.moves.T
        assert len(np.unique(targets)) == len(targets), "a slot is the target of two moves"
        columns = self.content, self.truth, self.rotation
        for column in columns:
            column[:, targets] = column[:, sources]
        for source, target in plan.swap_out.tolist():
            self.host[target] = [c[:, source * SIZE :][:, :SIZE].copy() for c in columns]
        for source, target in plan.swap_in.tolist():
            for column, kept in zip(columns, self.host.pop(source), strict=True):
                column[:, target * SIZE :][:, :SIZE] = kept
        for source, target in plan.copies.tolist():
            for column in (self.content, self.truth, self.rotation):
                column[:, target * SIZE :][:, :SIZE] = column[:, source * SIZE :][:, :SIZE]
        last = [self._compute(plan, b) for b in range(len(plan.rows))]
        member = np.searchsorted(plan.query_start, plan.sample_index, side="right") - 1
        seeds = zip(plan.sampling.seed.tolist(), plan.sampling.position.tolist(), strict=True)
        drawn = [
            zlib.crc32(repr((last[b], *seed)).encode()) % VOCAB
            for b, seed in zip(member.tolist(), seeds, strict=True)
        ]
        observed = [self._observe(plan, wanted) for wanted in plan.observations]
        return StepResult(token_ids=np.array(drawn, np.int32), observed=observed)

    def _compute(self, plan, b):
        """Write a sequence's tokens in every group; return what its last one came to."""
        begin, end = plan.query_start[b], plan.query_start[b + 1]
        row, start = int(plan.rows[b]), int(self.table.num_computed[plan.rows[b]])
        came_to = []
        for g, window in enumerate(self.windows):
            slots, truth = self._resident(plan, g, b)
            before = len(slots) - (end - begin)
            assert (self.truth[g, slots[:before]] == truth[:before]).all(), "another token's slot"
            self.truth[g, slots[before:]] = np.arange(start, start + end - begin)
            self.rotation[g, slots[before:]] = plan.positions[begin:end]
            assert (self.truth[g, slots] == truth).all()
            for i in range(end - begin):
                seen = slots[: before + i]
                seen = seen[max(0, len(seen) + 1 - window) :] if window else seen
                past = self.content[g, seen].tobytes() + bytes([g])
                token = int(plan.token_ids[begin + i])
                self.content[g, slots[before + i]] = zlib.crc32(past, token)
            self._check_distances(plan, g, b, row, slots)
            came_to.append(int(self.content[g, slots[-1]]))
        return came_to

    def _resident(self, plan, g, b):
        """Slots of the tokens that a sequence sees in a group, and where they stand in it."""
        index = np.arange(plan.num_resident[g, b])
        entry, within = np.divmod(index, SIZE)
        slots = plan.block_table[g, b, entry].astype(np.int64) * SIZE + within
        row = int(plan.rows[b])
        if not self.table.by_token[row]:
            return slots, self.table.first_position[g, row, entry] + within
        count = int(plan.query_start[b + 1] - plan.query_start[b])
        known = self.table.tokens.first_position[g, row, : len(index) - count]
        return slots, np.append(known, int(self.table.num_computed[row]) + np.arange(count))

    def _check_distances(self, plan, g, b, row, slots):
        """Rotation and turn together must give the distance that the positions ask for."""
        query = int(plan.positions[plan.query_start[b + 1] - 1])
        heads = slots[::SIZE]
        turns = np.zeros(len(heads)) if plan.turns is None else plan.turns[g, b, : len(heads)]
        distance = query + turns - self.rotation[g, heads]
        where = np.arange(len(slots)) if self.retention.table.rotates[row] else self.truth[g, slots]
        assert (distance == where[-1] - where[::SIZE]).all(), "a block is read at a wrong distance"

    def _observe(self, plan, wanted):
        groups = len(plan.block_table)
        values = np.zeros((groups, len(wanted.members), wanted.width), np.float32)
        mass = np.zeros_like(values)
        for m, b in enumerate(wanted.members.tolist()):
            count = int(plan.query_start[b + 1] - plan.query_start[b])
            first = 0 if find_score_of(wanted.kind) else int(wanted.first_query[m])
            for g in range(groups):
                told = self._tell(plan, g, b, wanted, wanted.kind, range(first, count))
                values[g, m, : len(told)] = told
                latest = self._tell(plan, g, b, wanted, "mass_last", [count - 1])
                mass[g, m, : len(latest)] = latest
        return Observed(values=values, mass=mass)

    def _tell(self, plan, g, b, wanted, kind, queries):
        row, size = int(plan.rows[b]), 1 if wanted.unit == "token" else SIZE
        start, name = int(self.table.num_computed[row]), self.names[int(plan.seq_ids[b])]
        before = int(plan.num_resident[g, b] - (plan.query_start[b + 1] - plan.query_start[b]))
        firsts = self.table.first_position[g, row].tolist()
        if size == 1:
            firsts = self._resident(plan, g, b)[1].tolist()
        teller = Twin(POLICIES["full"], size, [1])
        out = [0.0] * (int(plan.num_resident[g, b]) // size)
        for q in queries:
            visible = before + q + 1
            for entry in range(visible // size):
                key = (firsts[entry],) if find_score_of(kind) else (start + q, firsts[entry])
                value = naive.mix(0, g, name, *key)
                out[entry] = teller.combine(kind, out[entry], value, visible)
        return out


def find_score_of(kind):
    return kind in ("key_norm", "value_key_norm", "key_diff")


class Run:
    """A scheduler driven to the end, and what each sequence kept and said."""

    def __init__(self, config, requests, *, arrivals=None, aborts=None):
        self.scheduler = Scheduler(config)
        self.device = Witness(self.scheduler)
        self.keys, self.survivors, self.finished = {}, {}, {}
        self.refused, self.plans, self.peak, step = [], [], 0, 0
        waiting = dict(enumerate(requests))
        while waiting or self.scheduler.has_unfinished():
            for i in [i for i in waiting if step >= (arrivals or {}).get(i, 0)]:
                self.add(waiting.pop(i))
            for i in [i for i, at in (aborts or {}).items() if at == step]:
                with suppress(InvalidTransition):
                    self.end(self.scheduler.abort(requests[i].request_id))
            self.step()
            step += 1
            assert step < 5000, "no progress"

    def add(self, request):
        try:
            ids = self.scheduler.add(request)
        except NeverFits:
            self.refused.append(request.request_id)
            return
        for index, seq_id in enumerate(ids):
            self.device.names[seq_id] = int(request.request_id)
            self.keys[seq_id] = request.request_id, index

    def step(self):
        plan = self.scheduler.schedule()
        self.peak = max(self.peak, self.scheduler.manager.pool.num_held)
        output = self.scheduler.commit(plan, self.device.execute(plan))
        self.scheduler.audit()
        self.plans.append(plan)
        table = self.scheduler.table
        for row in table.running.tolist():
            firsts = kept_by(table, row)
            key = self.keys[int(table.seq_id[row])]
            found = self.survivors.setdefault(key, {})
            computed = int(table.num_computed[row])
            assert found.setdefault(computed, firsts) == firsts, "a replay kept something else"
        self.end(output.finished)

    def end(self, finished):
        for end in finished:
            self.finished[end.request_id, end.index] = end

    def answers(self):
        return {key: certificate(end) for key, end in self.finished.items()}


def kept_by(table, row):
    """First positions of what each of a row's tables has left, blocks or tokens."""
    by_token = table.by_token[row]
    entries = table.tokens if by_token else table
    counts = (table.num_resident if by_token else table.num_blocks)[:, row]
    return [entries.first_position[g, row, :n].tolist() for g, n in enumerate(counts)]


def certificate(end):
    lost = end.leave_one_out_error
    forgotten = round(end.forfeited_mass, 5), None if lost is None else round(lost, 5)
    return end.token_ids, end.finish_reason, end.num_evicted_tokens, forgotten


def alone(request, granularity="sequence", **config):
    return Run(make_config(granularity=granularity, **config), [request])


def assert_same(run, request, granularity="sequence", **config):
    """Whatever else ran beside a request, it kept and said what it does alone."""
    single = alone(request, granularity, **config)
    for index in range(request.sampling.n):
        key = request.request_id, index
        end, truth = run.finished[key], single.finished[key]
        if end.finish_reason == "abort":
            assert end.token_ids == truth.token_ids[: len(end.token_ids)]
        elif end.finish_reason != "error":
            assert certificate(end) == certificate(truth)
        ours, theirs = run.survivors.get(key, {}), single.survivors[key]
        for computed in ours.keys() & theirs.keys():
            assert ours[computed] == theirs[computed], (key, computed)


def expected_survivors(request, chosen, granularity, upto):
    layers, heads = SHAPES[granularity]
    name, length = int(request.request_id), len(request.prompt_token_ids)
    size = 1 if chosen.unit == "token" else SIZE
    tables = [
        [
            naive.Table(chosen, size, length, i * heads + j, name, 0, stride=SIZE)
            for j in range(heads)
        ]
        for i in range(layers)
    ]
    found = {}
    while tables[0][0].computed < upto:
        for heads_of_layer in tables:
            for table in heads_of_layer:
                table.add_token()
        naive.evict_row(tables)
        flat = [table for heads_of_layer in tables for table in heads_of_layer]
        found[tables[0][0].computed] = [[block.first for block in t.blocks] for t in flat]
    return found


@pytest.mark.parametrize("granularity", SHAPES)
def test_survivors_are_those_of_the_plain_policies(granularity):
    chosen = POLICIES | (SPREAD if granularity == "head" else {})
    requests = [
        make_request(i, 30 + 3 * i, each, max_tokens=20) for i, each in enumerate(chosen.values())
    ]
    run = Run(make_config(granularity=granularity, max_num_seqs=16), requests)
    for request, each in zip(requests, chosen.values(), strict=True):
        ours = run.survivors[request.request_id, 0]
        expected = expected_survivors(request, each, granularity, max(ours))
        assert ours == {computed: expected[computed] for computed in ours}
        end = run.finished[request.request_id, 0]
        assert (end.num_evicted_tokens > 0) == each.evicts
        if not each.evicts:
            assert end.forfeited_mass == 0


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_chunks_do_not_matter(name, granularity):
    request = make_request(1, 45, POLICIES[name])
    whole = alone(request, granularity)
    for limits in ({"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 5}):
        cut = Run(make_config(granularity=granularity, **limits), [request])
        assert len(cut.plans) > len(whole.plans)
        assert cut.answers() == whole.answers()
        for computed, kept in whole.survivors["1", 0].items():
            assert cut.survivors["1", 0][computed] == kept


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_in_a_tiny_pool_changes_no_answer(seed, granularity):
    """Preempted, forked, aborted, cut into chunks, sharing prefixes: each as if it were alone."""
    rng = random.Random(f"{seed} {granularity}")
    groups = SHAPES[granularity][0] * SHAPES[granularity][1]
    names = list(POLICIES) + (list(SPREAD) if granularity == "head" else [])
    requests = [
        make_request(
            i,
            rng.randrange(18, 32),
            (POLICIES | SPREAD)["full" if i % 4 == 0 else rng.choice(names)],
            shared=rng.choice([0, 8, 16, 18]),
            n=rng.choice([1, 1, 2, 3]),
            max_tokens=rng.randrange(16, 36),
        )
        for i in range(9)
    ]
    config = make_config(
        18 * groups,
        granularity,
        caching=True,
        max_num_batched_tokens=rng.choice([7, 24, 64]),
        long_prefill_token_threshold=rng.choice([0, 5]),
    )
    arrivals = {i: rng.randrange(12) for i in range(9)}
    aborts = {i: rng.randrange(5, 40) for i in rng.sample(range(9), 2)}
    run = Run(config, requests, arrivals=arrivals, aborts=aborts)
    assert run.scheduler.stats().num_preemptions > 0
    assert run.scheduler.stats().blocks_held == 0
    served = [request for request in requests if request.request_id not in run.refused]
    assert len(served) > 6
    assert len({end.finish_reason for end in run.finished.values()}) > 1
    for request in served:
        assert_same(run, request, granularity)


def crowded(chosen, num_blocks, granularity="sequence", **config):
    """A sequence that evicts, pushed out by two older ones that grow, and let in again."""
    requests = [
        make_request(1, 8, "full", max_tokens=44),
        make_request(2, 8, "full", max_tokens=30),
        make_request(3, 34, chosen, max_tokens=40),
    ]
    limits = {"max_num_batched_tokens": 17} | config.pop("limits", {})
    return requests, Run(make_config(num_blocks, granularity, **limits, **config), requests)


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_a_preempted_sequence_forgets_the_same_again(name, granularity):
    groups = SHAPES[granularity][0] * SHAPES[granularity][1]
    requests, run = crowded(POLICIES[name], 20 * groups, granularity)
    assert run.finished["3", 0].num_preemptions > 0
    for request in requests:
        assert run.finished[request.request_id, 0].finish_reason == "length"
        assert_same(run, request, granularity)


@pytest.mark.parametrize("name", [*POLICIES, "pyramid"])
def test_cached_prefixes_do_not_change_what_is_kept(name):
    """They skip computation, and with it every round before their end."""
    chosen = (POLICIES | SPREAD)[name]
    granularity = "layer" if name == "pyramid" else "sequence"
    requests = [make_request(i, 40, chosen, shared=36) for i in range(2)]
    first = make_request(9, 40, "full", shared=36)
    run = Run(
        make_config(granularity=granularity, caching=True),
        [first, *requests],
        arrivals={1: 30, 2: 60},
    )
    for request in requests:
        assert_same(run, request, granularity)


@pytest.mark.parametrize("name", ["streaming", "tova", "random", "token tova", "token random"])
def test_a_cached_prefix_as_long_as_what_was_computed_before_a_preemption_loses_nothing(name):
    """Another computes the same prompt in its place meanwhile; it has nothing left to replay."""
    request = make_request(1, 34, POLICIES[name], shared=34)
    urgent = make_request(2, 34, "full", shared=34, max_tokens=1)
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 9, "scheduling_policy": "priority"}
    run = Run(
        make_config(caching=True, **limits),
        [request, msgspec.structs.replace(urgent, priority=-1)],
        arrivals={1: 1},
    )
    assert run.finished["1", 0].num_preemptions == 1
    assert run.scheduler.totals.resumed_tokens_cached >= 8
    assert_same(run, request)


@pytest.mark.parametrize("windows", [(8, 8), (8, 0), (8, 20)])
def test_sliding_windows_free_blocks_whatever_the_chunks(windows):
    model = {"sliding_window": windows}
    for name in ("full", "streaming", "tova", "lowest"):
        request = make_request(3, 40, POLICIES[name], max_tokens=12)
        whole = alone(request, "layer", model=model)
        for limits in ({"max_num_batched_tokens": 3}, {"max_num_batched_tokens": 1}):
            cut = Run(make_config(granularity="layer", model=model, **limits), [request])
            assert cut.answers() == whole.answers()
            for computed, kept in whole.survivors["3", 0].items():
                assert cut.survivors["3", 0][computed] == kept
        for tables in whole.survivors["3", 0].values():
            for window, firsts in zip(windows, tables, strict=True):
                assert len(firsts) <= window // SIZE + 1 or not window
                gapless = list(range(firsts[0], firsts[-1] + 1, SIZE))
                assert firsts == gapless or not window


@pytest.mark.parametrize("windows", [(8, 0), (20, 0)])
@pytest.mark.parametrize("name", ["streaming", "tova", "lowest"])
def test_preempted_windows_are_replayed(name, windows):
    model = {"sliding_window": windows}
    requests, run = crowded(POLICIES[name], 26, "layer", model=model)
    assert run.finished["3", 0].num_preemptions > 0
    for request in requests:
        assert_same(run, request, "layer", model=model)


def test_blocks_after_an_eviction_are_never_published():
    """Those before it are: a sequence that begins alike takes exactly them."""
    evictor = make_request(1, 60, POLICIES["streaming"], shared=60)
    follower = make_request(2, 64, "full", shared=60)
    run = Run(make_config(caching=True), [evictor, follower], arrivals={1: 40})
    # Rounds come every 8 tokens; the first that finds more than 16 comes at 24.
    assert run.finished["2", 0].num_cached_tokens == 24
    assert_same(run, follower)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("granularity", SHAPES)
def test_a_long_prompt_never_holds_more_than_budget_and_chunk(name, granularity):
    chosen = POLICIES[name]
    groups = SHAPES[granularity][0] * SHAPES[granularity][1]
    budget = chosen.tokens if chosen.unit == "block" else chosen.tokens + SIZE - 1
    most = (-(-chosen.tokens // SIZE) + chosen.chunk // SIZE + 3) * groups
    request = make_request(1, 300, chosen, max_tokens=8)
    run = Run(make_config(most, granularity), [request])
    assert run.finished["1", 0].finish_reason == "length"
    assert run.peak <= (-(-budget // SIZE) + chosen.chunk // SIZE) * groups
    assert run.finished["1", 0].num_evicted_tokens >= 300 - chosen.tokens - chosen.chunk


@pytest.mark.parametrize("name", ["streaming", "h2o", "window"])
def test_a_pool_of_everybodys_share_runs_everybody_at_once(name):
    chosen = POLICIES[name]
    share = -(-chosen.tokens // SIZE) + chosen.chunk // SIZE
    requests = [make_request(i, 41 + 3 * i, chosen, max_tokens=50) for i in range(4)]
    run = Run(make_config(4 * share), requests)
    assert [len(end.token_ids) for end in run.finished.values()] == [50] * 4
    assert run.scheduler.stats().num_preemptions == 0
    assert max(len(plan.rows) for plan in run.plans) == 4
    assert run.peak == 4 * share


def test_positions_of_a_stream_stay_within_twice_its_cache():
    config = make_config(16, model={"max_model_len": 64})
    request = make_request(1, 20, POLICIES["streaming"], max_tokens=700)
    run = Run(config, [request])
    assert len(run.finished["1", 0].token_ids) == 700
    assert max(int(plan.positions.max()) for plan in run.plans) < 2 * (16 + 8) + SIZE


def test_a_stream_turns_its_sinks_and_at_most_two_generations_of_blocks():
    request = make_request(1, 20, POLICIES["streaming"], max_tokens=300)
    run = Run(make_config(64, model={"max_model_len": 64}), [request])
    turned = [plan for plan in run.plans if plan.turns is not None]
    assert len(turned) > 200
    for plan in turned:
        used = -(-int(plan.num_resident[0, 0]) // SIZE)
        changes = np.count_nonzero(np.diff(plan.turns[0, 0, :used]))
        assert changes <= 2


def test_streams_without_a_bound_end_at_the_models_length():
    config = make_config(model={"max_model_len": 64})
    for name in ("full", "lift", "ratio"):  # original positions, or a cache that grows
        run = Run(config, [make_request(1, 20, POLICIES[name], max_tokens=700)])
        assert len(run.finished["1", 0].token_ids) == 44


def test_forks_go_on_with_their_leaders_scores():
    request = make_request(1, 37, POLICIES["h2o"], n=3, max_tokens=20)
    run = alone(request)
    tokens = {tuple(end.token_ids) for end in run.finished.values()}
    assert len(tokens) == 3, "the forks drew alike"
    single = alone(make_request(1, 37, POLICIES["h2o"], max_tokens=20))
    for index in range(3):
        # The witness's masses are the request's, so all its sequences keep the same blocks.
        assert run.survivors["1", index].items() <= single.survivors["1", 0].items()
    assert run.finished["1", 0].token_ids == single.finished["1", 0].token_ids


def snapshot(scheduler):
    return pickle.dumps(scheduler)


BAD = {
    "unparsable": ("recent=4 + score=", "score"),
    "unknown preset": ("streming", "streaming"),
    "budget under one block": ("budget=3", "under one block"),
    "adaptive floor under one block": ("adaptive=3..64", "under one block"),
    "over budget": ("sinks=12 + recent=12 + budget=16", "over the budget"),
    "everything goes": ("score=mean + threshold=1.5", "threshold"),
    "nothing to spread over": ("budget=16 + spread=ada", "spread"),
    "score not found": ("score=nowhere:nothing + budget=16", "nowhere"),
    "cache positions without rotation": ("streaming + positions=cache", "rotary"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_policies_are_refused_and_nothing_changes(name):
    expression, word = BAD[name]
    scheduler = Scheduler(make_config(model={"rope": False}))
    scheduler.add(make_request(1, 9, "full"))
    scheduler.commit(scheduler.schedule(), StepResult(token_ids=np.zeros(1, np.int32)))
    before = snapshot(scheduler)
    with pytest.raises(PolicyError, match=word) as caught:
        scheduler.add(make_request(2, 9, expression))
    assert caught.value.remedy
    assert snapshot(scheduler) == before
    cache = msgspec.structs.replace(scheduler.config.cache, eviction=expression)
    with pytest.raises(PolicyError, match=word):
        Scheduler(msgspec.structs.replace(scheduler.config, cache=cache))


def test_results_must_answer_every_observation():
    run = Run(make_config(), [])
    run.add(make_request(1, 30, POLICIES["h2o"]))
    plan = run.scheduler.schedule()
    right = run.device.execute(plan)
    assert len(right.observed) == 1
    seen = right.observed[0]
    narrow = Observed(values=seen.values[:, :, 1:], mass=seen.mass)
    lacking = Observed(values=seen.values, mass=seen.mass[:, :0])
    before = snapshot(run.scheduler.table)
    for observed in ([], [seen, seen], [narrow], [lacking]):
        with pytest.raises(InvalidTransition, match="observations"):
            run.scheduler.commit(plan, msgspec.structs.replace(right, observed=observed))
        assert snapshot(run.scheduler.table) == before
    run.end(run.scheduler.commit(plan, right).finished)
    while run.scheduler.has_unfinished():
        run.step()
    assert_same(run, make_request(1, 30, POLICIES["h2o"]))


def test_nothing_is_observed_for_those_who_never_evict():
    run = alone(make_request(1, 40, "full"))
    assert not any(plan.observations for plan in run.plans)
    assert all(plan.turns is None for plan in run.plans)


def test_the_witness_notices_a_wrong_distance():
    """Or its check of distances could hold by chance."""
    run = Run(make_config(), [])
    run.add(make_request(1, 40, POLICIES["streaming"]))
    for _ in range(5):
        run.step()
    table = run.scheduler.table
    assert table.next_position[table.running[0]] < table.num_computed[table.running[0]]
    table.turn[:, table.running, :2] += 1
    with pytest.raises(AssertionError, match="wrong distance"):
        run.step()
