"""What the public face refuses, in words; whatever was running goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagedkv import LLM, EngineConfig, SamplingParams, Scheduler
from pagedkv.config import CacheConfig
from pagedkv.device import memory
from pagedkv.device.models import load_model
from pagedkv.errors import (
    ConfigError,
    CorruptModel,
    InvalidRequest,
    InvalidTransition,
    ModelNotFound,
    PagedKVError,
    UnsupportedBackend,
)

CPU = torch.device("cpu")

FEW = SamplingParams(max_tokens=3, temperature=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-random", num_blocks=40, block_size=4)


@pytest.mark.parametrize(
    "prompts", [None, 5, b"abc", {1, 2}, [None], ["a", None], [{}], "\ud800", ["a", "\udcff"]]
)
def test_prompts(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(prompts, FEW)
    assert not llm.scheduler.has_unfinished()


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_a_prompt_that_can_be_read_once(llm: LLM, prompt_logprobs: int | None) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=prompt_logprobs)
    (output,) = llm.generate([{"prompt_token_ids": iter([1, 2, 3])}], params)
    assert output.prompt_token_ids == [1, 2, 3]
    assert (output.prompt_logprobs is None) == (prompt_logprobs is None)


@pytest.mark.parametrize("params", [{"n": 2}, [None], "x", [FEW, FEW]])
def test_sampling_params(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequest, match="sampling_params"):
        llm.generate("a", params)


@pytest.mark.parametrize("messages", [None, {"role": "user", "content": "x"}, ["x"], []])
def test_messages(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        llm.chat(messages)


def test_other_types(llm: LLM) -> None:
    with pytest.raises(InvalidTransition, match=r"\[1\]"):
        llm.abort([1])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"give a pagedkv\.Request"):
        llm.scheduler.add("x")  # type: ignore[arg-type]
    llm.scheduler.add(_request())
    plan = llm.scheduler.schedule()
    with pytest.raises(InvalidTransition, match="give a StepResult"):
        llm.scheduler.commit(plan, None)  # type: ignore[arg-type]
    llm.scheduler.discard(plan)
    llm.scheduler.abort("r")


def _request(**fields: Any) -> Any:
    from pagedkv import Request

    return Request(request_id="r", prompt_token_ids=[1, 2], **fields)


@pytest.mark.parametrize("arrival", [10**400, float("inf"), float("nan")])
def test_arrivals_beyond_all_numbers(arrival: float) -> None:
    with pytest.raises(InvalidRequest, match="arrival is"):
        _request(arrival=arrival)


@pytest.mark.parametrize("top_p", [1e-46, 1e-300])
def test_a_top_p_too_small_for_fp32_keeps_the_likeliest(llm: LLM, top_p: float) -> None:
    likeliest = llm.generate("a", FEW)[0].token_ids
    for extra in ({}, {"top_k": 5}):
        params = SamplingParams(max_tokens=3, top_p=top_p, **extra)
        outputs = llm.generate(["a", "b"], [params, FEW])
        assert outputs[0].token_ids == likeliest
        assert len(outputs[1].token_ids) == 3


def test_closing_a_stream_that_never_began_ends_its_requests(llm: LLM) -> None:
    endless = SamplingParams(max_tokens=100, ignore_eos=True)
    stream = llm.stream(["a", "b"], endless)
    assert llm.scheduler.has_unfinished()
    stream.close()  # type: ignore[attr-defined]
    assert not llm.scheduler.has_unfinished()
    abandoned = llm.stream("a", FEW)
    llm.generate("b", endless)  # carries the other one along to its end
    abandoned.close()  # type: ignore[attr-defined]
    assert not llm._done


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": None}, "model is None"),
        ({"config": {}}, "config is {}"),
        ({"vocab_size": 5}, "vocab_size: comes from the model"),
        ({"sliding_window": (5,)}, "sliding_window: comes from the model"),
        ({"max_num_seqs": 2**31 - 1}, "max_num_seqs"),
    ],
)
def test_constructor(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LLM(**{"model": "tiny-random", "num_blocks": 4} | given)


def test_a_pool_beyond_all_machines() -> None:
    with pytest.raises(ConfigError, match="num_blocks"):
        Scheduler(EngineConfig(cache=CacheConfig(num_blocks=2**31 - 1)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kv_cache_memory_bytes": 1 << 60}, r"kv_cache_memory_bytes: .*GiB and cpu has .*GiB"),
        ({"num_blocks": 1 << 25, "block_size": 256}, "num_blocks: .*GiB and cpu has"),
        ({"num_blocks": 4, "num_cpu_blocks": 1 << 30}, "num_cpu_blocks: .* lower num_cpu_blocks"),
        ({"kv_cache_memory_fraction": 1e-12}, "kv_cache_memory_fraction: 0 bytes hold no block"),
        ({"kv_cache_memory_bytes": 5}, "kv_cache_memory_bytes: 5 bytes hold no block"),
        ({"num_blocks": 4, "kv_cache_memory_fraction": 0.5}, "num_blocks and .* are both given"),
        ({"kv_cache_memory_fraction": 1.5}, "kv_cache_memory_fraction is 1.5"),
    ],
)
def test_a_pool_that_the_machine_cannot_hold(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LLM("tiny-random", **given)


def test_a_fraction_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory.free(CPU) <= memory.total(CPU)
    monkeypatch.setattr(memory, "free", lambda device: 3 << 20)
    sizes = [
        LLM("tiny-random", block_size=4, **given).store.num_bytes
        for given in ({"kv_cache_memory_fraction": 0.5}, {"kv_cache_memory_bytes": 3 << 19})
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("device", "error", "told"),
    [
        ("cuda:99", UnsupportedBackend, "CUDA devices, not 'cuda:99'"),
        ("gpu", ConfigError, "'gpu' is not a torch device"),
        ("meta", UnsupportedBackend, "no operator runs on device=meta"),
    ],
)
def test_devices(device: str, error: type[PagedKVError], told: str) -> None:
    with pytest.raises(error, match=told):
        LLM("tiny-random", device=device, num_blocks=4)


@pytest.mark.parametrize("name", ["", "x" * 5000])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(ModelNotFound):
        LLM(name)


def test_a_loaded_model_keeps_its_own_dtype() -> None:
    loaded = load_model("tiny-random", dtype="bfloat16", progress=False)
    served = LLM(loaded, num_blocks=20)
    assert served.store.keys.dtype == loaded.dtype
    assert len(served.generate("abc", FEW)[0].token_ids) == 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, **heads)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 50},
        {"hidden_size": 10**12},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "nope"}},
        {"pad_token_id": 1000},
        {"quantization_config": {"quant_method": "gptq"}},
        {"model_type": "opt"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights(directory: Path, change: dict[str, Any]) -> None:
    path = directory / "config.json"
    good = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(PagedKVError, match="config"):
            load_model(directory, progress=False)
    finally:
        path.write_text(good)
    assert load_model(directory, progress=False).geometry.num_layers == 1


def test_a_config_nested_too_deeply(directory: Path) -> None:
    path = directory / "config.json"
    good = path.read_text()
    try:
        path.write_text("[" * 200_000)
        with pytest.raises(CorruptModel, match="not a JSON object"):
            load_model(directory, progress=False)
    finally:
        path.write_text(good)
