"""Eviction beside everything else that a pool of blocks does: nobody else notices it."""

import numpy as np
import pytest
import torch

from pagedkv import LLM, Request, SamplingParams
from pagedkv.device.store import KVStore
from pagedkv.eviction import policy
from tests.device.eviction_oracle import Server, build_model, random_prompt
from tests.device.reference import reference_logits, reference_model

TOLERANCE = 1e-4
STREAMING = policy("sinks=4 + budget=16 + chunk=8")
H2O = policy("recent=0.5 + score=sum + budget=20 + gqa=sum + chunk=8")
TOVA = policy("score=last + budget=16 + chunk=8")
LIFT = policy("recent=4 + score=lift + budget=16 + chunk=8 + positions=original")
H2O_TOKEN = policy("recent=0.5 + score=sum + budget=19 + gqa=sum + chunk=8 + unit=token")
LOBO_TOKEN = policy("sinks=3 + recent=4 + score=lobo + budget=15 + chunk=8 + unit=token")


def logits_of(server, name, index=0):
    return torch.stack(server.logits[name, index])


def assert_same_as_alone(server, name, granularity="sequence", **fields):
    """Same survivors, tokens and certificate as in a pool of one's own; logits to rounding."""
    request = server.requests[name]
    single = Server(server.loaded, granularity, enable_prefix_caching=False, **fields)
    single.scheduler.add(request)
    for seq_id in range(request.sampling.n):
        single.names[seq_id] = name, seq_id
    single.run()
    for index in range(request.sampling.n):
        ours, truth = server.finished[name, index], single.finished[name, index]
        assert ours.token_ids == truth.token_ids
        assert ours.num_evicted_tokens == truth.num_evicted_tokens
        assert ours.forfeited_mass == pytest.approx(truth.forfeited_mass, abs=1e-5)
        assert (ours.leave_one_out_error is None) == (truth.leave_one_out_error is None)
        if truth.leave_one_out_error is not None:
            # Sums over queries that came in other chunks, times what rounding makes of m / (1 - m).
            assert ours.leave_one_out_error == pytest.approx(truth.leave_one_out_error, rel=0.01)
        kept, expected = server.survivors[name, index], single.survivors[name, index]
        assert all(kept[n] == expected[n] for n in kept.keys() & expected.keys())
        difference = logits_of(server, name, index) - logits_of(single, name, index)
        assert difference.abs().max() < 1e-5


def share_a_prefix(evictor, granularity="sequence"):
    """One request fills the cache; two more start from its blocks at the same time."""
    server = Server(build_model("llama"), granularity)
    prefix = random_prompt(24, seed=1)
    server.add("first", [*prefix, 1], max_tokens=1)
    server.run()
    server.add("stays", prefix + random_prompt(9, seed=2), "full", max_tokens=24)
    server.add("evicts", prefix + random_prompt(13, seed=3), evictor, max_tokens=24)
    return server


@pytest.mark.parametrize("granularity", ["sequence", "head"])
@pytest.mark.parametrize("positions", ["cache", "original"])
def test_others_on_a_shared_prefix_do_not_notice_an_eviction(positions, granularity):
    # Position alone ranks, so the policy may start from a cached prefix.
    evictor = policy("budget=24 + chunk=8", positions=positions)
    # One that never fires cuts the same steps, so that even matrix products round alike.
    plain = share_a_prefix(policy(evictor, budget=256), granularity).run()
    server = share_a_prefix(evictor, granularity)
    server.step()
    table, pool = server.scheduler.table, server.scheduler.manager.pool
    shared = table.block_table[:, 0, :6].ravel().copy()
    # The evictor computed 8 of its own tokens and gave up 2 of the 6 blocks of the prefix.
    assert np.bincount(pool.ref_count[shared]).tolist() == [
        0,
        len(shared) // 3,
        len(shared) * 2 // 3,
    ]
    keys = server.executor.store.keys[:, shared].clone()
    values = server.executor.store.values[:, shared].clone()
    for _ in range(20):
        server.step()
    assert (pool.ref_count[shared] == 1).all(), "the evictor holds on to what it forgot"
    assert torch.equal(server.executor.store.keys[:, shared], keys)
    assert torch.equal(server.executor.store.values[:, shared], values)
    server.run()
    assert server.finished["evicts", 0].num_cached_tokens == 24
    assert server.finished["evicts", 0].num_evicted_tokens > 0
    assert server.finished["stays", 0].token_ids == plain.finished["stays", 0].token_ids
    assert torch.equal(logits_of(server, "stays"), logits_of(plain, "stays"))
    assert_same_as_alone(server, "evicts", granularity)


@pytest.mark.parametrize("granularity", ["sequence", "head"])
def test_others_on_a_shared_prefix_do_not_notice_that_tokens_move(granularity):
    evictor = policy("sinks=2 + budget=24 + chunk=8 + unit=token")
    plain = share_a_prefix(policy(evictor, budget=256), granularity).run()
    server = share_a_prefix(evictor, granularity)
    server.step()
    shared = server.scheduler.table.block_table[:, 0, :6].ravel().copy()
    keys = server.executor.store.keys[:, shared].clone()
    values = server.executor.store.values[:, shared].clone()
    for _ in range(20):
        server.step()
    assert server.scheduler.stats().tokens_moved > 0
    assert torch.equal(server.executor.store.keys[:, shared], keys)
    assert torch.equal(server.executor.store.values[:, shared], values)
    server.run()
    assert server.finished["evicts", 0].num_cached_tokens == 24
    assert server.finished["evicts", 0].num_evicted_tokens > 0
    assert server.finished["stays", 0].token_ids == plain.finished["stays", 0].token_ids
    assert torch.equal(logits_of(server, "stays"), logits_of(plain, "stays"))
    assert_same_as_alone(server, "evicts", granularity)


def test_who_listens_by_token_changes_nobodys_numbers():
    """Bit for bit: the attention that the model goes on with is not the one that is listened to."""
    servers = []
    for score in ("age", "sum", "lobo"):
        server = Server(build_model("llama"))
        server.add("stays", random_prompt(30, seed=1), "full", max_tokens=12)
        listens = policy(f"score={score} + budget=256 + chunk=8 + unit=token")
        server.add("listens", random_prompt(40, seed=2), listens, max_tokens=12)
        servers.append(server.run())
    for name in ("stays", "listens"):
        for server in servers[1:]:
            assert torch.equal(logits_of(server, name), logits_of(servers[0], name))


@pytest.mark.parametrize(
    ("chosen", "n"), [(STREAMING, 2), (H2O, 3), (LIFT, 3), (H2O_TOKEN, 3), (LOBO_TOKEN, 2)]
)
def test_forks_equal_the_oracle_each_on_its_own_way(chosen, n):
    server = Server(build_model("llama"))
    prompt = random_prompt(45, seed=7)
    server.add("r", prompt, chosen, n=n, temperature=1.0, seed=11, max_tokens=18)
    server.run()
    assert len({tuple(server.finished["r", i].token_ids) for i in range(n)}) == n
    for i in range(n):
        end, oracle = server.finished["r", i], server.oracle("r")
        truth = [oracle.feed(prompt, 5)] + [oracle.feed([t]) for t in end.token_ids[:-1]]
        assert (logits_of(server, "r", i) - torch.stack(truth)).abs().max() < TOLERANCE
        kept = server.survivors["r", i]
        assert all(kept[k] == oracle.survivors[k] for k in kept.keys() & oracle.survivors.keys())
        assert end.num_evicted_tokens == oracle.num_evicted > 0
        assert end.forfeited_mass == pytest.approx(oracle.forfeited, abs=1e-4)


def test_an_abort_in_the_middle_frees_everything_and_disturbs_nobody():
    server = Server(build_model("llama"), "layer")
    for i, chosen in enumerate((STREAMING, H2O, TOVA, H2O_TOKEN, LOBO_TOKEN)):
        server.add(f"r{i}", random_prompt(44 + i, seed=i), chosen, n=1 + i % 2, max_tokens=24)
    for _ in range(14):
        server.step()
    before = server.scheduler.manager.pool.num_held
    for name in ("r1", "r3"):
        for end in server.scheduler.abort(name):
            assert end.num_evicted_tokens > 0
            assert end.forfeited_mass > 0
    assert server.scheduler.manager.pool.num_held < before
    server.scheduler.audit()
    server.run()
    for name in ("r0", "r2", "r4"):
        assert_same_as_alone(server, name, "layer")
    assert server.scheduler.stats().blocks_held == 0


@pytest.mark.parametrize("granularity", ["sequence", "head"])
@pytest.mark.parametrize(
    "chosen",
    [STREAMING, H2O, LIFT, H2O_TOKEN, LOBO_TOKEN],
    ids=["streaming", "h2o", "lift", "h2o-token", "lobo-token"],
)
def test_a_preempted_sequence_is_replayed_to_the_same_state(chosen, granularity):
    groups = {"sequence": 1, "head": 4}[granularity]
    server = Server(
        build_model("llama"), granularity, num_blocks=20 * groups, max_num_batched_tokens=17
    )
    server.add("old", random_prompt(8, seed=1), "full", max_tokens=44)
    server.add("older", random_prompt(8, seed=2), "full", max_tokens=30)
    server.add("evicts", random_prompt(34, seed=3), chosen, max_tokens=30)
    server.run()
    assert server.finished["evicts", 0].num_preemptions > 0
    assert server.finished["evicts", 0].num_evicted_tokens > 0
    for name in server.requests:
        assert_same_as_alone(server, name, granularity)


@pytest.mark.parametrize(
    "chosen",
    [STREAMING, TOVA, LIFT, H2O_TOKEN],
    ids=["streaming", "tova", "lift", "h2o-token"],
)
def test_chunks_of_any_size_keep_the_same(chosen):
    for most in (3, 8, 64):
        server = Server(build_model("llama"), max_num_batched_tokens=most)
        for i in range(2):
            server.add(f"r{i}", random_prompt(50 + i, seed=i), chosen, max_tokens=8)
        server.run()
        for name in server.requests:
            assert_same_as_alone(server, name)


def test_what_was_computed_after_an_eviction_is_never_found_again():
    loaded = build_model("llama")
    server = Server(loaded)
    prompt = random_prompt(60, seed=4)
    server.add("evicts", prompt, STREAMING, max_tokens=8)
    server.run()
    server.add("follows", [*prompt, 5, 6], "full", max_tokens=8)
    server.run()
    # The first round that finds more than 16 tokens comes after 24; what came later saw gaps.
    end = server.finished["follows", 0]
    assert end.num_cached_tokens == 24
    truth = reference_logits(reference_model(loaded), [*prompt, 5, 6, *end.token_ids[:-1]])[61:]
    assert (logits_of(server, "follows") - truth).abs().max() < TOLERANCE


@pytest.mark.parametrize("granularity", ["sequence", "layer"])
def test_a_long_prompt_needs_no_more_than_budget_and_chunk(granularity):
    groups = {"sequence": 1, "layer": 2}[granularity]
    chosen = policy("sinks=4 + recent=0.5 + score=last + budget=64 + chunk=32")
    # Admission counts a block each that sinks, window and tail may round up to.
    server = Server(
        build_model("llama"),
        granularity,
        num_blocks=(16 + 8 + 3) * groups,
        max_num_batched_tokens=512,
        max_model_len=1024,
    )
    server.add("r", random_prompt(600, seed=6), chosen, max_tokens=6)
    server.run()
    assert server.finished["r", 0].finish_reason == "length"
    assert server.peak == (16 + 8) * groups
    oracle = server.oracle("r")
    tokens, logits = oracle.generate(random_prompt(600, seed=6), 6)
    assert server.finished["r", 0].token_ids == tokens
    assert (logits_of(server, "r") - logits).abs().max() < TOLERANCE
    assert server.finished["r", 0].num_evicted_tokens == oracle.num_evicted


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["block", "token"])
def test_a_prompt_of_100_000_tokens_runs_in_budget_and_chunk(unit):
    chosen = policy(f"sinks=4 + recent=0.5 + score=sum + budget=512 + chunk=256 + unit={unit}")
    llm = LLM("tiny-random", max_model_len=100_100, max_num_batched_tokens=512, num_blocks=52)
    prompt = np.random.default_rng(0).integers(3, 250, 100_000).tolist()
    llm.scheduler.add(
        Request(
            request_id="long",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
            eviction=chosen,
        )
    )
    peak, finished = 0, []
    while llm.scheduler.has_unfinished():
        _, _, output = llm.engine.step()
        peak = max(peak, llm.scheduler.manager.pool.num_held)
        finished += output.finished
    assert [len(end.token_ids) for end in finished] == [4]
    assert finished[0].num_evicted_tokens >= 100_000 - 512 - 256
    assert peak <= (512 + 256) // 16 + 1


def test_a_stream_goes_on_past_the_models_length_in_constant_memory():
    loaded = build_model("llama", num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
    assert loaded.geometry.max_model_len == 160
    chosen = policy("sinks=4 + budget=64 + chunk=32")
    server = Server(loaded, block_size=16, num_blocks=12)
    server.audits = 50
    server.add("r", random_prompt(40), chosen, max_tokens=2000)
    held = []
    while server.scheduler.has_unfinished():
        server.step()
        held.append(server.scheduler.manager.pool.num_held)
    assert len(server.finished["r", 0].token_ids) == 2000
    # Four blocks of budget and the tail; no more at the two-thousandth token than at the hundredth.
    assert set(held[100:-1]) == {4, 5}
    assert max(int(plan.positions.max()) for plan in server.plans) < 2 * (64 + 16)
    late = logits_of(server, "r")[-200:]
    assert torch.isfinite(late).all()
    assert len(set(server.finished["r", 0].token_ids[-200:])) > 1


def test_a_policy_that_never_fired_certifies_it():
    server, plain = (Server(build_model("llama")) for _ in range(2))
    wide = policy("sinks=4 + recent=0.5 + score=sum + budget=128 + chunk=8")
    for each, chosen in ((server, wide), (plain, "full")):
        each.add("r", random_prompt(50), chosen)
        each.run()
    end = server.finished["r", 0]
    assert (end.num_evicted_tokens, end.forfeited_mass) == (0, 0)
    assert end.leave_one_out_error is None
    assert end.token_ids == plain.finished["r", 0].token_ids
    assert (logits_of(server, "r") - logits_of(plain, "r")).abs().max() < 1e-5


def test_an_llm_takes_policy_and_granularity_by_name():
    fields = {"block_size": 4, "num_blocks": 512, "granularity": "layer"}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [random_prompt(40, seed=1), random_prompt(55, seed=2)]
    loose = LLM("tiny-random-gpt_neox", **fields).generate(prompts, params)
    tight = LLM(
        "tiny-random-gpt_neox", eviction="streaming + budget=16 + chunk=8", **fields
    ).generate(prompts, params)
    for prompt, full, evicted in zip(prompts, loose, tight, strict=True):
        assert full.token_ids != evicted.token_ids
        assert (full.num_evicted_tokens, full.forfeited_mass) == (0, 0)
        # What is left after the last round is the budget and the tail.
        assert evicted.num_evicted_tokens == (len(prompt) + 11) // 4 * 4 - 16
        assert evicted.forfeited_mass > 0


def test_an_llm_certifies_the_error_of_what_it_left_out():
    llm = LLM("tiny-random", block_size=4, num_blocks=256)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = {
        text: llm.generate([random_prompt(40, seed=1)], params, eviction=text)[0]
        for text in (
            "lobo + budget=16 + chunk=8",
            "lobo + budget=16 + chunk=8 + unit=token",
            "lobo + budget=128",
            "h2o + budget=16 + chunk=8",
        )
    }
    by_block, by_token, silent, other = outputs.values()
    assert by_block.leave_one_out_error > 0
    assert by_token.leave_one_out_error > 0
    assert (silent.num_evicted_tokens, silent.leave_one_out_error) == (0, 0.0)
    assert other.leave_one_out_error is None
    assert llm.scheduler.stats().tokens_moved > 0


def test_moves_read_everything_before_they_write():
    """Slots that shift over each other, in every layer, keys and values apart."""
    store = KVStore(build_model("llama").geometry, 4, 4)
    for pool in (store.keys, store.values):
        pool.copy_(torch.randn(pool.shape))
    sources, targets = torch.tensor([5, 6, 7, 2]), torch.tensor([4, 5, 6, 7])
    before = [pool.clone().flatten(1, 2) for pool in (store.keys, store.values)]
    store.move_slots(sources, targets)
    for pool, old in zip((store.keys, store.values), before, strict=True):
        new = pool.flatten(1, 2)
        assert torch.equal(new[:, targets], old[:, sources])
        rest = [slot for slot in range(16) if slot not in targets.tolist()]
        assert torch.equal(new[:, rest], old[:, rest])
    assert store.bytes_per_slot * 16 == store.num_bytes
