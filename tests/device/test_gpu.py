"""On a GPU, where there is one: real kernels, pinned memory, streams. Nowhere else are these run.

`pytest -m gpu -n 0 tests/device`; needs a CUDA build of torch and an sm80 card or newer.
"""

from typing import Any

import pytest
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.device.dispatch import choose_operator
from pagedkv.device.gathered import GatheredOp
from pagedkv.device.models import load_model
from pagedkv.device.operators import ReferenceOp
from pagedkv.device.quantize import quantize, quantize4
from pagedkv.device.staging import Staging
from tests.device.test_cuda_operators import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [list(range(3 + i, 60 + 20 * i)) for i in range(4)]
MIXED = [(1, 20), (21, 40), (3, 17), (16, 16), (1, 700)]


def on_gpu(case: Case, op: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, lse and block lse, back on the host."""
    case.query, case.key, case.value = (x.cuda() for x in (case.query, case.key, case.value))
    out, bias = case.run(op, want_block_lse=True, send=sent, **options)
    case.query, case.key, case.value = (x.cpu() for x in (case.query, case.key, case.value))
    assert bias.lse is not None
    assert bias.block_lse is not None
    return out.cpu(), bias.lse.cpu(), bias.block_lse.cpu()


def sent(array: Any) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 64), (64, 128), (16, 80), (7, 64)])
def test_operators_agree_with_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    block_size, dim = shape
    case = Case(MIXED, block_size=block_size, dim=dim, dtype=dtype)
    op = choose_operator("cuda", dtype, block_size=block_size, head_dim=dim)
    got = on_gpu(case, op, **options)
    want, oracle = case.run(ReferenceOp, want_block_lse=True, **options)
    tolerance = 3e-3 if dtype == torch.float16 else 2e-2
    for one, other in zip(got, (want, oracle.lse, oracle.block_lse), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("pack", "kind"), [(quantize4, "int4"), (quantize, "int8")])
def test_packed_keys_and_values(pack: Any, kind: str) -> None:
    case = Case(MIXED, dim=64, dtype=torch.float16).packed(pack)
    op = choose_operator("cuda", torch.float16, stored=getattr(torch, kind))
    got = on_gpu(case, op)
    want, oracle = case.run(ReferenceOp, want_block_lse=True)
    for one, other in zip(got, (want, oracle.lse, oracle.block_lse), strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)


def test_reading_in_place_and_gathering_agree() -> None:
    case = Case(MIXED, dim=64, dtype=torch.float16)
    in_place = on_gpu(case, choose_operator("cuda", torch.float16))
    copied = on_gpu(case, GatheredOp)
    for one, other in zip(in_place, copied, strict=True):
        torch.testing.assert_close(one, other, atol=3e-3, rtol=3e-3)


def scores(device: str, **fields: Any) -> torch.Tensor:
    """Log-probabilities of given tokens: close on both devices, whereas greedy tokens may part."""
    loaded = load_model("tiny-random", dtype="float16", device=device, progress=False)
    llm = LLM(loaded, **{"block_size": 16, "num_blocks": 2000} | fields)
    return torch.cat([torch.tensor(each.logprobs[1:]) for each in llm.score(PROMPTS)])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"eviction": "sinks=4 + recent=32 + budget=48 + chunk=16"},
        {"granularity": "head", "eviction": "window + budget=48 + chunk=16"},
        {"kv_cache_dtype": "int8"},
        {"eviction": "score=mean + budget=48 + chunk=16 + unit=token"},
    ],
    ids=str,
)
def test_a_model_gives_the_scores_that_it_gives_on_the_cpu(fields: dict[str, Any]) -> None:
    torch.testing.assert_close(scores("cuda", **fields), scores("cpu", **fields), atol=0.03, rtol=0)


@pytest.mark.parametrize("eviction", ["full", "h2o + budget=48 + chunk=16"])
def test_preemption_by_swapping_leaves_answers_alone(eviction: str) -> None:
    fields = {"block_size": 16, "enable_prefix_caching": False, "eviction": eviction}
    loaded = load_model("tiny-random", dtype="float16", device="cuda", progress=False)
    roomy = LLM(loaded, num_blocks=400, **fields)
    tight = LLM(loaded, num_blocks=17, num_cpu_blocks=60, swap_cost=0.0, **fields)
    expected = [output.token_ids for output in roomy.generate(PROMPTS, GREEDY)]
    assert [output.token_ids for output in tight.generate(PROMPTS, GREEDY)] == expected
    assert eviction != "full" or tight.scheduler.stats().num_swapped_out > 0


def test_decode_waits_for_the_device_only_to_hear_its_tokens() -> None:
    """torch raises at every wait that is not asked for by a copy to the host."""
    loaded = load_model("tiny-random", dtype="float16", device="cuda", progress=False)
    llm = LLM(loaded, num_blocks=400)
    llm.generate(PROMPTS, GREEDY)  # compiles
    executor, steps = llm.engine.executor, 0
    forward = executor.forward

    def watched(plan: Any) -> Any:
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    executor.forward = watched
    transfer = executor._transfer
    assert isinstance(transfer, Staging)
    before = transfer.num_copies
    llm.generate(PROMPTS, GREEDY)
    assert transfer.num_copies - before == steps > 0


def test_a_pool_larger_than_the_card_is_refused() -> None:
    from pagedkv.errors import ConfigError

    loaded = load_model("tiny-random", dtype="float16", device="cuda", progress=False)
    with pytest.raises(ConfigError, match="cuda:0 has"):
        LLM(loaded, kv_cache_memory_bytes=1 << 50)
