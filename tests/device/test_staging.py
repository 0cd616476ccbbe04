"""A step's arrays on their way to a device, told apart from what lies there already."""

from typing import Any

import numpy as np
import pytest
import torch

from pagedkv import LLM, SamplingParams
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.operators import CpuPagedOp, PagedOp
from pagedkv.device.staging import SharedMemory, Staging, fetch, transfer_to
from tests.device.interpreted import interpreted

PROMPTS = [list(range(3 + i, 20 + 7 * i)) for i in range(3)]


class Suspicious(Staging):
    """Lets nothing of the last step be mistaken for this one's."""

    def take(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        if not self._used:
            self._there.fill_(0x7F)
        return super().take(array)


def test_arrays_arrive_together_whatever_their_types_and_shapes() -> None:
    staging = Suspicious(torch.device("cpu"))
    arrays = [
        np.arange(7, dtype=np.int32),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.zeros((0, 4), np.int64),
        np.array([0.5], np.float32),
        np.array([True, False, True]),
    ]
    for step in range(3):
        tensors = [staging.take(array) for array in arrays]
        copies = [array.copy() for array in arrays]
        arrays[0] += 1  # it was copied when it was taken
        assert not torch.equal(tensors[1], torch.from_numpy(copies[1]))
        staging.send()
        for tensor, array in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, torch.from_numpy(array))
        assert staging.num_copies == step + 1


def test_it_grows_to_what_a_step_needs() -> None:
    staging = Suspicious(torch.device("cpu"), capacity=64)
    copies = []
    for _ in range(4):
        arrays = [np.full(100, i) for i in range(5)]
        tensors = [staging.take(array) for array in arrays]
        staging.send()
        assert [tensor.unique().tolist() for tensor in tensors] == [[i] for i in range(5)]
        copies.append(staging.num_copies)
    assert np.diff(copies).tolist()[-1] == 1


def test_the_cpu_shares_memory() -> None:
    transfer, array = transfer_to(torch.device("cpu")), np.arange(3)
    assert isinstance(transfer, SharedMemory)
    tensor = transfer.take(array)
    transfer.send()
    assert np.shares_memory(fetch(tensor), array)


def tokens(
    operator: type[PagedOp] = CpuPagedOp,
    transfer: Staging | None = None,
    *,
    prompts: list[list[int]] = PROMPTS,
    max_tokens: int = 24,
    **fields: Any,
) -> list[list[int]]:
    llm = LLM("tiny-random", **{"block_size": 16, "num_blocks": 2000} | fields)
    llm.engine.executor = TorchExecutor(
        llm.model, llm.store, layout=llm.scheduler.layout, operator=operator, transfer=transfer
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [list(output.token_ids) for output in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"granularity": "head", "eviction": "h2o + budget=32 + chunk=16"},
        {"eviction": "sinks=4 + recent=16 + budget=32 + chunk=16", "block_size": 4},
        {"eviction": "score=lobo + budget=16 + chunk=8 + unit=token", "block_size": 4},
        {"num_blocks": 22, "num_cpu_blocks": 40, "swap_cost": 0.0, "block_size": 4},
    ],
    ids=str,
)
def test_nothing_is_computed_before_it_was_sent(fields: dict[str, Any]) -> None:
    assert tokens(transfer=Suspicious(torch.device("cpu")), **fields) == tokens(**fields)


@pytest.mark.filterwarnings("ignore:warmup, rep, and use_cuda_graph")
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar")
def test_a_model_served_by_the_operator_for_cuda_says_the_same() -> None:
    """Few tokens: the interpreter takes its time."""
    fields = {"eviction": "h2o + budget=16 + chunk=16", "max_tokens": 2, "prompts": [[5] * 9, [7]]}
    staged = Suspicious(torch.device("cpu"))
    assert tokens(interpreted(16), staged, **fields) == tokens(**fields)
