"""The public face: prompts in any form, text, stops, log-probabilities, streams, refusals."""

import pytest
import torch

from pagedkv import (
    LLM,
    ConfigError,
    InvalidRequest,
    NeverFits,
    PolicyError,
    SamplingParams,
    policy,
)
from pagedkv.device.models import load_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def shared():
    return LLM("tiny-random", block_size=8, num_blocks=64)


@pytest.fixture
def llm(shared):
    yield shared
    shared.scheduler.audit()
    assert not shared.scheduler.has_unfinished()
    assert shared.scheduler.manager.pool.num_held == 0


def test_text_ids_and_mappings_are_the_same_prompt(llm):
    ids = llm.model.tokenizer("hello")["input_ids"]
    forms = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY)
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    assert outputs[0].prompt == "hello"
    assert outputs[1].prompt is None
    assert llm.generate(ids, GREEDY)[0].token_ids == outputs[0].token_ids


def test_text_is_what_the_tokenizer_makes_of_the_tokens(llm):
    (output,) = llm.generate("hello", GREEDY)
    shown = [t for t in output.token_ids if t not in llm.model.geometry.eos_token_ids]
    assert output.text == llm.model.tokenizer.decode(shown, skip_special_tokens=True)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 12)


def test_a_stop_string_ends_the_text_before_it(llm):
    """Random bytes, drawn hot; the stop is a character in the middle that did not come before."""
    drawn = {"temperature": 5.0, "seed": 1, "max_tokens": 40, "ignore_eos": True}
    *_, free = llm.stream("hello", SamplingParams(**drawn))
    text = free.text
    plain = [c for i, c in enumerate(text) if i > 2 and c.isascii() and c not in text[:i]]
    stop = plain[len(plain) // 2]
    (output,) = llm.generate("hello", SamplingParams(**drawn, stop=stop))
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert len(output.token_ids) < 40


def test_a_stop_token_ends_the_sequence_and_is_kept(llm):
    (free,) = llm.generate("hello", GREEDY)
    token = next(t for i, t in enumerate(free.token_ids) if i > 2 and t not in free.token_ids[:i])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(token,))
    (output,) = llm.generate("hello", params)
    assert output.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", token)


def test_log_probabilities_name_the_drawn_token_and_the_likeliest(llm):
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3)
    (output,) = llm.generate("hello", params)
    assert len(output.logprobs) == 5
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entry)) == token
        assert entry[token].rank == 1
        assert entry[token].logprob == max(each.logprob for each in entry.values())
        assert len(entry) == 3
    total = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_streaming_grows_to_what_generate_gives(llm):
    prompts = ["hello", "once upon a time"]
    whole = llm.generate(prompts, GREEDY)
    seen = {}
    for partial in llm.stream(prompts, GREEDY):
        before = seen.get(partial.request_id)
        if before is not None:
            assert partial.token_ids[: len(before.token_ids)] == before.token_ids
            assert partial.text.startswith(before.text)
        seen[partial.request_id] = partial
    assert [p.token_ids for p in seen.values()] == [w.token_ids for w in whole]
    assert all(p.finished for p in seen.values())


@pytest.mark.parametrize("more", [{}, {"stop": ("e",), "logprobs": 1}])
def test_a_stream_yields_the_best_of_several_once_all_are_there(llm, more):
    asked = SamplingParams(n=1, best_of=3, temperature=1.0, seed=1, max_tokens=12, **more)
    streamed = list(llm.stream(["hello", "there"], asked))
    assert [len(output.outputs) for output in streamed] == [1, 1]
    whole = llm.generate(["hello", "there"], asked)
    found = {output.prompt: output.token_ids for output in streamed}
    assert found == {output.prompt: output.token_ids for output in whole}


def test_a_stream_that_is_closed_early_leaves_nothing_behind(llm):
    stream = llm.stream(["hello", "there"], GREEDY)
    next(stream)
    assert llm.scheduler.has_unfinished()
    stream.close()


def test_two_streams_at_once_each_get_their_own(llm):
    (alone,) = llm.generate("hello", GREEDY)
    one, two = llm.stream("hello", GREEDY), llm.stream("there", GREEDY)
    first = next(one)
    last_two = list(two)[-1]
    last_one = list(one)[-1]
    assert first.request_id == last_one.request_id != last_two.request_id
    assert last_one.finished
    assert last_two.finished
    assert last_one.token_ids == alone.token_ids


def test_a_conversation_goes_through_the_chat_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == llm.chat_prompt(messages)
    assert "hi" in output.prompt


@pytest.mark.parametrize(
    ("prompt", "error", "word"),
    [
        ("", InvalidRequest, "empty"),
        ([], InvalidRequest, "empty"),
        ([5, 10**6], InvalidRequest, "vocabulary"),
        ([1] * 10_000, InvalidRequest, "takes"),
        ([1] * 600, NeverFits, "num_blocks"),
    ],
)
def test_one_bad_prompt_refuses_the_call_and_runs_nothing(llm, prompt, error, word):
    steps = llm.scheduler.stats().num_steps
    with pytest.raises(error, match=word):
        llm.generate(["hello", prompt], GREEDY)
    assert llm.scheduler.stats().num_steps == steps


def test_as_many_parameters_as_prompts(llm):
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 1 prompts"):
        llm.generate(["hello"], [GREEDY, GREEDY])


def test_nan_logits_of_one_request_end_it_alone(llm, monkeypatch):
    whole = llm.generate(["hello", "there"], GREEDY)
    executor = llm.engine.executor
    forward = executor.forward

    def poisoned(plan):
        logits, observed = forward(plan)
        logits[plan.sampling.position == 3] = float("nan")
        first = int(plan.sample_rows[0])
        logits[plan.sample_rows != first] = logits[plan.sample_rows != first].nan_to_num(0.0)
        return logits, observed

    monkeypatch.setattr(executor, "forward", poisoned)
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)]
    broken, fine = llm.generate(["hello", "there"], params)
    assert broken.finish_reason == "error"
    assert "not finite" in broken.outputs[0].error
    assert fine.token_ids == whole[1].token_ids[:3]


@pytest.mark.parametrize(
    ("fields", "error", "word"),
    [
        ({"block_size": 0}, ConfigError, "block_size"),
        ({"num_blocks": 0}, ConfigError, "num_blocks"),
        ({"blok_size": 8}, ConfigError, "block_size"),
        ({"num_blocks": 10**9}, ConfigError, "GiB"),
        ({"num_blocks": 5, "kv_cache_memory_bytes": 10**6}, ConfigError, "both"),
        ({"kv_cache_memory_bytes": 10}, ConfigError, "no block"),
        ({"eviction": "streamin"}, PolicyError, "streaming"),
        ({"dtype": "int3"}, ConfigError, "int3"),
    ],
)
def test_a_wrong_field_is_named(fields, error, word):
    with pytest.raises(error, match=word):
        LLM("tiny-random", **fields)


def test_learned_positions_end_where_they_were_trained():
    with pytest.raises(ConfigError, match="learned positions"):
        LLM("tiny-random-gpt2", max_model_len=10**6)
    LLM("tiny-random", max_model_len=10**6, num_blocks=16)


def test_the_pool_is_sized_from_bytes():
    llm = LLM("tiny-random", block_size=16, kv_cache_memory_bytes=10**6)
    geometry = llm.model.geometry
    per_block = geometry.kv_elements_per_token * 16 * 4
    assert llm.scheduler.manager.pool.num_blocks == 10**6 // per_block
    assert llm.store.num_bytes == 10**6 // per_block * per_block


def test_an_evicting_request_says_what_it_forgot(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    evicting = LLM("tiny-random", block_size=8, num_blocks=64, eviction="window + budget=16")
    (output,) = evicting.generate([[7] * 30], params)
    assert output.num_evicted_tokens > 30
    assert output.forfeited_mass > 0
    (full,) = llm.generate([[7] * 30], params)
    assert (full.num_evicted_tokens, full.forfeited_mass) == (0, 0)


def test_a_policy_may_be_given_to_the_engine_as_an_object():
    streaming = policy("streaming", budget=32)
    given = LLM("tiny-random", block_size=8, num_blocks=64, eviction=streaming)
    assert policy(given.config.cache.eviction) == streaming
    named = LLM("tiny-random", block_size=8, num_blocks=64, eviction="streaming + budget=32")
    one, other = (llm.generate([[7] * 30], GREEDY)[0] for llm in (given, named))
    assert one.num_evicted_tokens > 0
    assert one.token_ids == other.token_ids


@pytest.fixture
def defaults():
    """What an embedder may have set, put back afterwards."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("eviction", ["full", "sinks=4 + budget=12"])
@pytest.mark.parametrize("pack_weights", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_defaults_are_not_the_engines(eviction, pack_weights, dtype):
    """Native code writes fp32 to host memory all the same: before, while and after it loads."""

    def load():
        loaded = load_model("tiny-random", pack_weights=pack_weights, progress=False)
        return LLM(loaded, block_size=4, num_blocks=256, eviction=eviction)

    def tokens(llm):
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        return [out.token_ids for out in llm.generate([list(range(100)), [1, 2, 3]], sampling)]

    llm = load()
    expected = tokens(llm)
    torch.set_default_dtype(dtype)
    assert tokens(load()) == tokens(llm) == expected
    llm.scheduler.reset_prefix_cache()
    torch.set_default_device("meta")
    assert tokens(llm) == expected


@pytest.mark.parametrize("prompt_len", [5, 200])
def test_autocast_is_not_the_engines(prompt_len):
    prompt = [i % 250 for i in range(prompt_len)]  # the longer one is multiplied by torch
    plain = LLM("tiny-random", num_blocks=32).generate([prompt], GREEDY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = LLM("tiny-random", num_blocks=32).generate([prompt], GREEDY)
    assert cast[0].finish_reason == "length"
    assert cast[0].token_ids == plain[0].token_ids
