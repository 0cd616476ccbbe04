"""Eviction inside the attention path equals the dense oracle: survivors, logits, certificate.

All policies run in one batch, in both kinds of positions, so that every case also shows that a
request's answer does not depend on its neighbours.
"""

import functools

import pytest
import torch

from pagedkv import PolicyError
from pagedkv.device.bridge import forward
from pagedkv.eviction import format_policy, policy, presets
from tests.device.eviction_oracle import Server, build_model, random_prompt
from tests.device.reference import DenseStep, reference_logits, reference_model

TOLERANCE = 1e-4
SMALL = {"snap": {"score": "window(8)"}, "scissorhands": {"score": "low(16)"}}
POSITIONS = ("cache", "original")
BEYOND_PRESETS = {
    "lift": "sinks=2 + recent=0.25 + score=lift + budget=22 + chunk=12",
    "lift-max": "recent=5 + score=lift_max + budget=20 + gqa=max + chunk=8",
    "ema": "sinks=4 + recent=0.25 + score=ema(0.9) + budget=24 + gqa=sum + chunk=16",
    "mean-threshold": "sinks=4 + recent=4 + score=mean + threshold=0.9 + floor=12 + chunk=8",
    "lobo-max": "recent=4 + score=lobo + budget=20 + gqa=max + chunk=8",
    "knorm-max": "recent=4 + score=key_norm + budget=20 + gqa=max + chunk=8",
    "keydiff-sum": "sinks=1 + score=key_diff + budget=20 + gqa=sum + chunk=8",
    "ratio": "sinks=4 + recent=4 + score=sum + ratio=0.5 + chunk=8",
    "lowest": "recent=8 + score=lift + lowest=0.3 + chunk=16",
    "odd-window": "recent=4 + score=window(5) + budget=22 + chunk=10",
    "low-sum": "recent=4 + score=low(16) + budget=22 + gqa=sum + chunk=8",
}


def cases(names, **extra):
    """Policies by name: the presets with small budgets, and more expressions."""
    found = {}
    for i, name in enumerate(names):
        small = {"budget": 16 + 4 * (i % 4), "chunk": 8 + 4 * (i % 3)} | SMALL.get(name, {})
        found[name] = policy(name) if name == "full" else policy(name, **small)
    return found | {name: policy(text) for name, text in extra.items()}


@functools.cache
def served(model_type, granularity, names, positions=POSITIONS, most=96, vocab=64, **extra):
    """Serve every case in one batch, prompts of many lengths, and remember what happened."""
    loaded = build_model(model_type, vocab_size=vocab)
    server = Server(loaded, granularity, max_num_batched_tokens=most)
    for i, (name, chosen) in enumerate(cases(names, **extra).items()):
        for j, kind in enumerate(positions):
            prompt = random_prompt(36 + (11 * i + 5 * j) % 29, seed=100 * j + i, vocab=vocab)
            server.add(f"{name} {kind}", prompt, policy(chosen, positions=kind))
    return server.run()


def check(server, name, most=7):
    """Hold one request against its oracle, which computes at most so many tokens at once."""
    request, end = server.requests[name], server.finished[name, 0]
    oracle = server.oracle(name)
    tokens, logits = oracle.generate(
        list(request.prompt_token_ids), request.sampling.max_tokens, most
    )
    ours = server.survivors[name, 0]
    rounds = [n for n in oracle.survivors if oracle.tables[0][0].is_round(n)]
    last = len(request.prompt_token_ids) + len(tokens) - 1  # it has ended when it gets there
    assert [n for n in rounds if n not in ours and n != last] == [], "a step crossed a round"
    for computed in sorted(ours.keys() & oracle.survivors.keys()):
        assert ours[computed] == oracle.survivors[computed], f"survivors after {computed} tokens"
    assert end.token_ids == tokens
    difference = (torch.stack(server.logits[name, 0]) - logits).abs().max()
    assert difference < TOLERANCE
    assert end.num_evicted_tokens == pytest.approx(oracle.num_evicted)
    assert end.forfeited_mass == pytest.approx(oracle.forfeited, abs=1e-4)
    if oracle.policy.score == "lobo":
        # m / (1 - m) makes much of rounding where a block has nearly all the mass.
        assert end.leave_one_out_error == pytest.approx(oracle.left_out, rel=0.01)
    else:
        assert end.leave_one_out_error is None
    return oracle


PRESETS = tuple(presets())


@pytest.mark.parametrize("granularity", ["sequence", "layer", "head"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_equals_the_oracle(name, granularity):
    server = served("llama", granularity, PRESETS)
    for kind in POSITIONS:
        oracle = check(server, f"{name} {kind}")
        assert (oracle.num_evicted > 0) == (name != "full"), "the case shows nothing"


def by_token(names):
    """The presets by token, with budgets that are no whole number of blocks."""
    found = {}
    for i, name in enumerate(names):
        small = {"budget": 15 + 3 * (i % 4), "chunk": 8 + 4 * (i % 3)} | SMALL.get(name, {})
        found[f"token {name}"] = format_policy(policy(name, unit="token", **small))
    return found


TOKEN_PRESETS = by_token(name for name in PRESETS if name != "full")
TOKEN_PRESETS["token low-sum"] = format_policy(
    policy("recent=4 + score=low(8) + budget=21 + gqa=sum + chunk=8 + unit=token")
)


@pytest.mark.parametrize("granularity", ["sequence", "layer", "head"])
def test_every_preset_by_token_equals_the_oracle(granularity):
    """All in one batch with policies by block, and one that keeps everything."""
    mixed = {"h2o": "h2o + budget=20 + chunk=8", "full": "full"}
    # A word that comes twice has keys of equal norm in the first layer: rounding would choose.
    server = served("llama", granularity, (), ("auto",), 96, 4096, **TOKEN_PRESETS, **mixed)
    for name in TOKEN_PRESETS:
        assert check(server, f"{name} auto").num_evicted > 0
    for name in mixed:
        assert (check(server, f"{name} auto").num_evicted > 0) == (name == "h2o")
    assert server.scheduler.stats().tokens_moved > 0


@pytest.mark.parametrize("name", BEYOND_PRESETS)
def test_every_kind_of_score_and_budget_equals_the_oracle(name):
    server = served("llama", "sequence", (), most=40, **BEYOND_PRESETS)
    for kind in POSITIONS:
        assert check(server, f"{name} {kind}", most=7).num_evicted > 0


def test_equal_counts_rank_equal():
    """Counts weighed by sixths: rounding told them apart, and the oldest did not go first."""
    chosen = "sinks=5 + score=low(8) + budget=31 + gqa=mean + chunk=12 + unit=token"
    loaded = build_model("gpt_neox", vocab_size=4096)
    server = Server(loaded, "head", block_size=2, enable_prefix_caching=False)
    prompt = random_prompt(20, seed=99, vocab=4096) + random_prompt(22, seed=53504, vocab=4096)
    server.add("r", prompt, chosen, max_tokens=8)
    assert check(server.run(), "r").num_evicted > 0


@pytest.mark.parametrize(
    ("granularity", "name", "expression"),
    [
        ("layer", "pyramid", "sinks=2 + recent=4 + score=max + budget=24 + spread=pyramid"),
        ("head", "pyramid", "sinks=2 + recent=4 + score=last + budget=24 + spread=pyramid"),
        ("head", "ada", "sinks=2 + recent=4 + score=mean + budget=20 + spread=ada"),
    ],
)
def test_spread_budgets_equal_the_oracle(granularity, name, expression):
    server = served("llama", granularity, (), **{name: f"{expression} + chunk=8"})
    oracles = [check(server, f"{name} {kind}") for kind in POSITIONS]
    shares = [tables for oracle in oracles for tables in oracle.survivors.values()]
    assert any(len(set(map(len, tables))) > 1 for tables in shares), "all got the same"


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen3", "smollm3"])
@pytest.mark.parametrize("granularity", ["sequence", "head"])
def test_other_rotations_equal_the_oracle(model_type, granularity):
    """Partial rotary, normed queries and keys, and layers that do not rotate at all."""
    names = ("streaming", "h2o", "keydiff", "lobo")
    server = served(model_type, granularity, names)
    for name in names:
        for kind in POSITIONS:
            assert check(server, f"{name} {kind}").num_evicted > 0


def test_a_model_with_learned_positions_keeps_the_original_ones():
    names = ("streaming", "h2o", "tova", "keydiff")
    by_token = {"token": "h2o + budget=15 + chunk=8 + unit=token"}
    server = served("gpt2", "layer", names, ("original",), **by_token)
    for name in (*names, *by_token):
        assert check(server, f"{name} original").num_evicted > 0
    assert all(plan.turns is None for plan in server.plans)


def test_cache_positions_are_refused_where_nothing_rotates():
    server = Server(build_model("gpt2"))
    with pytest.raises(PolicyError, match="rotary"):
        server.add("r", random_prompt(9), policy("streaming", budget=16, positions="cache"))
    assert not server.scheduler.has_unfinished()


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_beside_windowed_layers_the_others_equal_the_oracle(granularity):
    """A budget below the window, too: layers with a window keep all that it shows."""
    names = {
        f"{name}{budget}": f"{name} + chunk=8 + budget={budget}"
        for name in ("streaming", "h2o", "keydiff", "h2o + unit=token")
        for budget in (12, 24)
    }
    server = served("gemma3_text", granularity, (), ("auto",), 40, **names)
    for name in names:
        assert check(server, f"{name} auto").num_evicted > 0


def test_where_all_layers_have_windows_nothing_is_lost():
    names = {"streaming": "streaming + chunk=8 + budget=12"}
    server = served("mistral", "sequence", (), ("auto",), 40, **names)
    assert check(server, "streaming auto").num_evicted == 0


@pytest.mark.parametrize("granularity", ["sequence", "layer", "head"])
def test_windows_free_their_blocks_and_lose_nothing(granularity):
    loaded = build_model("gemma3_text")
    prompt = random_prompt(70, seed=9)
    server = Server(loaded, granularity, max_num_batched_tokens=16)
    server.add("r", prompt, max_tokens=12)
    held = []
    while server.scheduler.has_unfinished():
        server.step()
        held.append(server.scheduler.manager.pool.num_held)
    end = server.finished["r", 0]
    truth = reference_logits(reference_model(loaded), prompt + end.token_ids[:-1])[69:]
    assert (torch.stack(server.logits["r", 0]) - truth).abs().max() < TOLERANCE
    assert (end.num_evicted_tokens, end.forfeited_mass) == (0, 0)
    windows = server.scheduler.layout.windows
    assert sorted(set(windows)) == [0, 16]
    # A window of 16 tokens and a tail span 5 blocks of 4; the full layers keep everything.
    for computed, tables in server.survivors["r", 0].items():
        for window, firsts in zip(windows, tables, strict=True):
            assert len(firsts) <= 5 or not window
            assert firsts[0] == 0 or window
            assert firsts[-1] + 4 >= computed
    full = sum(window == 0 for window in windows)
    assert held[-2] <= full * 21 + (len(windows) - full) * 5


def test_the_oracle_without_eviction_is_plain_attention():
    """The oracle's own check, against code that knows nothing of blocks."""
    loaded = build_model("llama")
    server = Server(loaded)
    server.requests["r"] = server.add("r", random_prompt(30), "full")
    step = DenseStep(loaded.geometry.sliding_window)
    ids = torch.tensor(random_prompt(30))
    truth = forward(loaded, ids, torch.arange(30), step.begin([(0, 30)]), torch.tensor([29]))
    for most in (1, 7, 30):
        assert (server.oracle("r").feed(random_prompt(30), most) - truth[0]).abs().max() < 1e-5


def test_the_oracle_tells_the_two_kinds_of_positions_apart():
    """Or the comparison would pass for an engine that ignores them."""
    server = served("llama", "sequence", PRESETS)
    request = server.requests["streaming cache"]
    oracle = server.oracle("streaming cache")
    oracle.policy = policy(oracle.policy, positions="original")
    _, logits = oracle.generate(list(request.prompt_token_ids), 1)
    assert (server.logits["streaming cache", 0][0] - logits[0]).abs().max() > 0.1
