"""What a step costs: floating-point operations and bytes, counted while the model really runs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from msgspec import Struct
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pagedkv.config import CacheConfig, EngineConfig, SchedulerConfig
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.core.request import Request, SamplingParams
from pagedkv.device.assembly import assemble
from pagedkv.device.bridge import ATTENTION_NAME, AttentionStep
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.loaded import LoadedModel

__all__ = ["Meter", "Work", "run_without_cache"]


class Work(Struct, kw_only=True):
    """The cost of one step, or of several added up.

    The first four count floating-point operations of matrix products, a multiply-add as two;
    norms, activations, softmax and rotations are left out, as is customary. The rest are bytes.

    Attributes:
        tokens: Tokens that went through the layers.
        projections: Making queries, keys and values, and the attention's output projection.
        attention: Scores of queries against keys, and sums of values, over the pairs that a
            causal model needs.
        mlp: Everything else inside the layers.
        head: Everything outside the layers: the projection to the vocabulary.
        weights_read: Each weight once; of an embedding only the rows that were looked up.
        kv_read: Each visible key and value once per sequence and layer, those just written too.
        kv_written: Keys and values stored.
        handed_on: Hidden states that each layer gives to the next.
    """

    tokens: int = 0
    projections: int = 0
    attention: int = 0
    mlp: int = 0
    head: int = 0
    weights_read: int = 0
    kv_read: int = 0
    kv_written: int = 0
    handed_on: int = 0

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.projections + self.attention + self.mlp + self.head

    @property
    def bytes_moved(self) -> int:
        """All bytes."""
        return self.weights_read + self.kv_read + self.kv_written + self.handed_on

    def __add__(self, other: "Work") -> "Work":
        fields = self.__struct_fields__
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in fields})


class Meter:
    """An executor that has another one do the work, and counts what its model does meanwhile.

    Put it in the other's place: ``engine.executor = Meter(engine.executor)``. Products are counted
    where they happen, by hooks on the model's linear layers and on the calls of its attention;
    those that an architecture writes without a module, such as fused experts, are not seen.

    Attributes:
        steps: The work of each plan that was executed, in order.
    """

    def __init__(self, executor: TorchExecutor) -> None:
        self._executor = executor
        self._parts = _parts(executor.model.model)
        self._work = Work()
        self.steps: list[Work] = []

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on the other executor and append its work to `steps`."""
        self._work = Work(tokens=plan.num_tokens)
        with self._hooked(_Context(plan, self._executor)):
            result = self._executor.execute(plan)
        self.steps.append(self._work)
        return result

    @contextmanager
    def _hooked(self, context: "_Context") -> Iterator[None]:
        """Count while the context lasts; the model has no hooks of ours before and after."""
        model = self._executor.model.model

        def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            del module
            step = _CountedStep(kwargs[ATTENTION_NAME], context, self._work)
            return args, kwargs | {ATTENTION_NAME: step}

        handles = [model.register_forward_pre_hook(swap, with_kwargs=True)]
        for module, part in self._parts:
            count = self._count_layer if part == "layer" else self._counter(part)
            handles.append(module.register_forward_hook(count))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        hidden = output[0] if isinstance(output, tuple) else output
        self._work.handed_on += hidden.nbytes

    def _counter(self, part: str) -> Any:
        """Return a hook that counts a module with weights of its own."""

        def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            work = self._work
            if isinstance(module, nn.Embedding):
                work.weights_read += output.nbytes
                return
            if output.numel():
                work.weights_read += sum(p.nbytes for p in module.parameters(recurse=False))
            if isinstance(module, nn.Linear | Conv1D):
                inner = args[0].shape[-1]
                flops = 2 * output.numel() * inner
                setattr(work, part, getattr(work, part) + flops)

        return count


class _Context:
    """How many keys a plan's queries see, by layer."""

    def __init__(self, plan: StepPlan, executor: TorchExecutor) -> None:
        geometry, self._layout = executor.model.geometry, executor.layout
        self._plan = plan
        self._windows = geometry.sliding_window
        self.tables = geometry.num_kv_heads // self._layout.heads_per_group
        self._seen: dict[tuple[int, int], tuple[int, int]] = {}

    def seen(self, layer: int) -> tuple[int, int]:
        """Return pairs of a query and a key that it sees, and keys that some query sees.

        Both are summed over the tables that the layer has for its heads.
        """
        group, window = self._layout.group_of[layer], self._windows[layer]
        if (group, window) not in self._seen:
            counts = [self._count(group + table, window) for table in range(self.tables)]
            pairs, keys = zip(*counts, strict=True)
            self._seen[group, window] = sum(pairs), sum(keys)
        return self._seen[group, window]

    def _count(self, group: int, window: int) -> tuple[int, int]:
        plan = self._plan
        queries = np.diff(plan.query_start).astype(np.int64)
        resident = plan.num_resident[group].astype(np.int64)
        offset = np.arange(plan.num_tokens) - np.repeat(plan.query_start[:-1], queries)
        visible = np.repeat(resident - queries, queries) + offset + 1
        reach = window or int(visible.max(initial=0))
        hidden = np.maximum(resident - queries + 1 - reach, 0)
        return int(np.minimum(visible, reach).sum()), int((resident - hidden).sum())


class _CountedStep:
    """A step's attention, counted call by call."""

    def __init__(self, step: AttentionStep, context: _Context, work: Work) -> None:
        self._step = step
        self._context = context
        self._work = work

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Count, then attend; shapes as in `bridge.AttentionStep`."""
        work, tables = self._work, self._context.tables
        pairs, keys = self._context.seen(layer_idx)
        tokens, heads, head_dim = query.shape
        work.attention += 2 * pairs * heads // tables * (head_dim + value.shape[-1])
        written = key.nbytes + value.nbytes
        work.kv_written += written
        work.kv_read += keys * (written // tokens // tables)
        return self._step.attend(layer_idx, query, key, value, scaling)


def _parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return each decoder layer, and each module with weights and the part it belongs to."""
    attentions = [name for name, module in model.named_modules() if _is_attention(name, module)]
    layers = [name.rpartition(".")[0] for name in attentions]
    parts: list[tuple[nn.Module, str]] = []
    for name, module in model.named_modules():
        if name in layers:
            parts.append((module, "layer"))
        elif any(True for _ in module.parameters(recurse=False)):
            inside = f"{name}."
            if any(inside.startswith(f"{one}.") for one in attentions):
                parts.append((module, "projections"))
            elif any(inside.startswith(f"{one}.") for one in layers):
                parts.append((module, "mlp"))
            else:
                parts.append((module, "head"))
    return parts


def _is_attention(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return hasattr(module, "layer_idx") and ("attn" in last or "attention" in last)


def run_without_cache(
    loaded: LoadedModel, token_ids: list[int], block_size: int = 16
) -> tuple[StepResult, Work]:
    """Compute the next greedy token of a text from nothing, as if no step had gone before.

    The engine does it, on blocks of its own that are dropped afterwards: this is what every step
    costs where keys and values are not kept.

    Args:
        token_ids: The whole text so far, at least one token.

    Returns:
        The token drawn, with its log-probability, and the work.
    """
    num_blocks = math.ceil((len(token_ids) + 1) / block_size)
    config = EngineConfig(
        cache=CacheConfig(
            block_size=block_size,
            num_blocks=num_blocks * len(set(loaded.geometry.sliding_window)),
            enable_prefix_caching=False,
        ),
        scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=len(token_ids)),
    )
    engine = assemble(loaded, config, max_model_len=len(token_ids) + 1)
    assert isinstance(engine.executor, TorchExecutor)
    engine.executor = meter = Meter(engine.executor)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    request = Request(request_id="0", prompt_token_ids=token_ids, sampling=params)
    engine.scheduler.add(request)
    _, result, _ = engine.step()
    return result, meter.steps[0]
