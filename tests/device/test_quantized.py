"""Keys and values in 8 bits: how exact they are, and that all else goes on above them."""

import pytest
import torch

from pagedkv import LLM, CacheConfig, EngineConfig, SamplingParams
from pagedkv.device.assembly import assemble
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.models import load_model
from pagedkv.device.quantize import dequantize, quantize, quantize4, row_words
from pagedkv.device.store import INT4, KVStore, bytes_per_block, one_group, storage_dtype
from pagedkv.errors import ConfigError, UnsupportedBackend

PROMPTS = [list(range(3 + i, 40 + 9 * i)) for i in range(4)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def serve(kv_cache_dtype: str, **fields: object) -> LLM:
    shape = {"block_size": 8, "num_blocks": 200} | fields
    return LLM("tiny-random", kv_cache_dtype=kv_cache_dtype, **shape)


@pytest.mark.parametrize("dim", [4, 20, 64])
def test_each_number_is_within_half_a_step(dim: int) -> None:
    exact = torch.randn(7, 3, dim) * torch.logspace(-6, 6, 7)[:, None, None]
    rows = quantize(exact)
    assert rows.shape == (7, 3, row_words(dim))
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize(rows, dim) - exact).abs() <= step * 0.501).all()


def test_zeros_stay_zeros_and_what_is_no_number_shows() -> None:
    assert (dequantize(quantize(torch.zeros(2, 8)), 8) == 0).all()
    for bad in (torch.nan, torch.inf):
        rows = quantize(torch.tensor([[1.0, bad, 2, 3], [1, 2, 3, 4]]))
        assert dequantize(rows, 4).isnan().any(-1).tolist() == [True, False]


def test_a_token_takes_a_quarter_of_the_memory() -> None:
    exact, packed = serve("auto"), serve("int8")
    dim = exact.model.geometry.head_dim
    assert exact.store.num_bytes / packed.store.num_bytes == 4 * dim / (dim + 4)
    given = {"num_blocks": None, "kv_cache_memory_bytes": 1 << 20}
    blocks = [serve(k, **given).config.cache.num_blocks for k in ("auto", "float16", "int8")]
    assert blocks[0] * 2 == blocks[1] < blocks[2]


@pytest.mark.parametrize(("kind", "bound"), [("float16", 0.02), ("bfloat16", 0.1), ("int8", 0.2)])
def test_scores_stay_close(kind: str, bound: float) -> None:
    exact, narrow = (serve(each).score(PROMPTS[3])[0] for each in ("auto", kind))
    apart = torch.tensor(exact.logprobs[1:]) - torch.tensor(narrow.logprobs[1:])
    assert 0 < apart.abs().max() < bound


def test_the_same_tokens_whoever_runs_beside_and_however_often_preempted() -> None:
    together = serve("int8").generate(PROMPTS, GREEDY)
    tight = serve("int8", num_blocks=20).generate(PROMPTS, GREEDY)
    assert sum(output.num_preemptions for output in tight) > 0
    for prompt, one, other in zip(PROMPTS, together, tight, strict=True):
        alone = serve("int8", max_num_batched_tokens=7).generate(prompt, GREEDY)[0]
        assert alone.token_ids == one.token_ids == other.token_ids


@pytest.mark.parametrize(
    "eviction",
    [
        "sinks=4 + budget=24 + chunk=8",
        "recent=0.5 + score=sum + budget=24 + chunk=8",
        "score=key_diff + budget=24 + chunk=8",
        "score=value_key_norm + budget=24 + chunk=8",
        "score=lobo + budget=24 + chunk=8",
        "score=lobo + budget=24 + chunk=8 + unit=token",
    ],
)
@pytest.mark.parametrize("granularity", ["sequence", "head"])
def test_policies_evict_above_it(eviction: str, granularity: str) -> None:
    """As much as of an exact cache; now and then rounding tips a close choice between blocks."""
    fields = {"eviction": eviction, "granularity": granularity, "num_blocks": 2000}
    exact, packed = (serve(kind, **fields).score(PROMPTS[3])[0] for kind in ("auto", "int8"))
    assert exact.num_evicted_tokens == packed.num_evicted_tokens > 0
    apart = torch.tensor(exact.logprobs[1:]) - torch.tensor(packed.logprobs[1:])
    assert apart.abs().median() < 0.1


@pytest.mark.parametrize("dim", [8, 24, 64])
def test_in_4_bits_each_number_is_within_half_a_step(dim: int) -> None:
    exact = torch.randn(7, 3, dim) * torch.logspace(-3, 3, 7)[:, None, None] + 1
    rows = quantize4(exact)
    assert rows.shape == (7, 3, row_words(dim, bits=4))
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    fp16 = (low.abs() + high - low) * 2**-10
    assert ((dequantize(rows, dim) - exact).abs() <= (high - low) / 30 + fp16).all()
    assert (dequantize(quantize4(torch.full((2, dim), 0.5)), dim) == 0.5).all()
    for bad in (torch.nan, torch.inf):
        broken = torch.zeros(dim)
        broken[1] = bad
        assert dequantize(quantize4(broken), dim).isnan().all()


def test_a_store_in_4_bits_gives_back_what_was_written() -> None:
    geometry: ModelGeometry = serve("auto").model.geometry
    store = KVStore(geometry, 5, 4, dtype=INT4, poison=True)
    shape = 3, geometry.num_kv_heads, geometry.head_dim
    key, value = torch.randn(shape), torch.randn(shape)
    slots = torch.tensor([2, 17, 5])
    store.write(0, slots, key, value)
    for pool, written in ((store.keys, key), (store.values, value)):
        kept = dequantize(pool[0].flatten(0, 1), geometry.head_dim)
        torch.testing.assert_close(kept[slots], dequantize(quantize4(written), geometry.head_dim))
        assert kept[0].isnan().all()
    sizes = [
        bytes_per_block(geometry, one_group(geometry), 4, kind) for kind in (torch.float32, INT4)
    ]
    dim = geometry.head_dim
    assert sizes[0] / sizes[1] == 4 * dim / (dim / 2 + 4)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="head size is 12"):
        storage_dtype("int4", 12, torch.float16)
    with pytest.raises(UnsupportedBackend, match=r"pagedkv_cpu was tried and refused: .*int4"):
        serve("int4")
    with pytest.raises(ConfigError, match="head size is 6"):
        storage_dtype("int8", 6, torch.float32)
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        serve("int3")


def test_an_engine_put_together_by_hand_stores_what_it_is_asked_to() -> None:
    loaded = load_model("tiny-random", progress=False)
    config = EngineConfig(cache=CacheConfig(kv_cache_dtype="int8", kv_cache_memory_bytes=10**6))
    executor = assemble(loaded, config).executor
    assert isinstance(executor, TorchExecutor)
    plain = assemble(loaded, EngineConfig(cache=CacheConfig(num_blocks=8))).executor
    assert isinstance(plain, TorchExecutor)
    assert executor.store.bytes_per_slot < plain.store.bytes_per_slot / 2
    assert executor.store.num_bytes <= 10**6
