"""How long a step takes on hardware that is not here: a closed form with five fitted numbers."""

from math import sqrt
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from pagedkv.config import CacheConfig, Checked
from pagedkv.core.arrays import Float64
from pagedkv.core.foreseen import Pace
from pagedkv.core.leap import Leap
from pagedkv.core.plan import StepPlan
from pagedkv.errors import ConfigError

__all__ = ["Accelerator", "CostModel", "ModelShape", "StepWork", "leap_work", "step_work"]

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=4)]


class Accelerator(Checked, frozen=True, kw_only=True):
    """What one device can do, as its data sheet says.

    Attributes:
        flops: Dense operations per second at the model's precision.
        bandwidth: Bytes per second from its own memory.
        memory: Bytes of its own memory.
        host_bandwidth: Bytes per second to host memory, each way.
        link_bandwidth: Bytes per second to its peers, one way.
    """

    section: ClassVar[str] = "accelerator"

    flops: Positive
    bandwidth: Positive
    memory: Positive
    host_bandwidth: Positive = 32e9
    link_bandwidth: Positive = 300e9


class ModelShape(Checked, frozen=True, kw_only=True):
    """The sizes of a decoder that its step time depends on.

    Attributes:
        parameters: All weights.
        matmul_parameters: Those that every token is multiplied with (no embedding table).
        num_layers: Layers with attention.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        bytes_per_element: Of weights and activations.
        kv_bytes_per_element: Of keys and values, scales included; None is the same.
    """

    section: ClassVar[str] = "shape"

    parameters: Positive
    matmul_parameters: Positive
    num_layers: Annotated[int, Meta(ge=1)]
    hidden_size: Annotated[int, Meta(ge=1)]
    num_heads: Annotated[int, Meta(ge=1)]
    num_kv_heads: Annotated[int, Meta(ge=1)]
    head_dim: Annotated[int, Meta(ge=1)]
    bytes_per_element: Positive = 2
    kv_bytes_per_element: Positive | None = None

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of keys and values that one token adds to the cache."""
        size = self.kv_bytes_per_element or self.bytes_per_element
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * size


class StepWork(Struct, frozen=True, kw_only=True, eq=False):
    """What a step computes and moves; arrays for many steps at once, element by element.

    Attributes:
        num_tokens: Tokens run through the model.
        context_tokens: Resident tokens whose keys and values are read, summed over sequences.
        attention_pairs: Query-key pairs, summed over sequences: chunk * (history + chunk / 2).
        copied_tokens: Tokens in blocks copied inside the device.
        swapped_tokens: Tokens in blocks moved to or from host memory.
        tier_seconds: Time that other tiers took, as they report it.
    """

    num_tokens: Any
    context_tokens: Any
    attention_pairs: Any
    copied_tokens: Any = 0
    swapped_tokens: Any = 0
    tier_seconds: Any = 0.0


class CostModel(Checked, frozen=True, kw_only=True):
    """Seconds per step: weights and matrix products overlap softly, the rest adds up.

    ::

        sqrt(weight_time^2 + matmul_time^2) + kv_time + attention_time
            + allreduce + copies + swaps + overhead

    with n tokens in the batch, per device under tensor parallelism. A p=2 norm stands in for the
    usual max() because the knee between bandwidth and compute is soft; max() errs by 25-40 %
    around it.

    Attributes:
        accelerator: One device.
        shape: The model.
        tensor_parallel: Devices that share every layer.
        weight_efficiency: Share of the bandwidth reached when reading weights.
        matmul_efficiency: Share of the flops reached in matrix products.
        kv_efficiency: Share of the bandwidth reached when reading keys and values.
        attention_efficiency: Share of the flops reached in attention.
        overhead: Seconds per step that do not depend on the work.
        allreduce_latency: Seconds per all-reduce besides its bytes, if there are several devices.
    """

    section: ClassVar[str] = "cost"

    accelerator: Accelerator
    shape: ModelShape
    tensor_parallel: Annotated[int, Meta(ge=1)] = 1
    weight_efficiency: Share = 0.75
    matmul_efficiency: Share = 0.75
    kv_efficiency: Share = 0.8
    attention_efficiency: Share = 0.6
    overhead: Annotated[float, Meta(ge=0)] = 0.0
    allreduce_latency: Annotated[float, Meta(ge=0)] = 0.0

    def terms(self, work: StepWork) -> dict[str, Any]:
        """Return the parts of a step's time by name, in seconds; the norm is not taken yet."""
        device, shape, tp = self.accelerator, self.shape, self.tensor_parallel
        kv = shape.kv_bytes_per_token / tp
        pair = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim / tp
        return {
            "weights": shape.matmul_parameters * shape.bytes_per_element / tp / device.bandwidth,
            "matmul": work.num_tokens * (2.0 * shape.matmul_parameters / tp / device.flops),
            "kv": work.context_tokens * (kv / device.bandwidth),
            "attention": work.attention_pairs * (pair / device.flops),
            "fixed": self._reduce(work.num_tokens)
            + work.copied_tokens * (2 * kv / device.bandwidth)
            + work.swapped_tokens * (kv / device.host_bandwidth)
            + work.tier_seconds,
        }

    def seconds(self, work: StepWork) -> Any:
        """Return how long each step takes; a step without tokens costs what it moves."""
        part = self.terms(work)
        weights = part["weights"] / self.weight_efficiency
        matmul = part["matmul"] / self.matmul_efficiency
        return (
            np.sqrt(weights * weights + matmul * matmul)
            + part["kv"] / self.kv_efficiency
            + part["attention"] / self.attention_efficiency
            + part["fixed"]
            + self.overhead
        )

    def pace(self) -> Pace:
        """Return a function that says what `seconds` does of one step that moves nothing, to the
        bit and without its arrays: a tenth of the time.
        """
        nothing = self.terms(StepWork(num_tokens=0, context_tokens=0, attention_pairs=0))
        one = self.terms(StepWork(num_tokens=1, context_tokens=1, attention_pairs=1))
        weights = nothing["weights"] / self.weight_efficiency
        weights, matmul, kv, pair = weights * weights, one["matmul"], one["kv"], one["attention"]
        of_flops, of_bandwidth = self.matmul_efficiency, self.kv_efficiency
        of_attention, overhead = self.attention_efficiency, self.overhead
        reduce = self._reduce

        def seconds(num_tokens: int, context: float, pairs: float) -> float:
            products = num_tokens * matmul / of_flops
            took: float = (
                sqrt(weights + products * products)
                + context * kv / of_bandwidth
                + pairs * pair / of_attention
                + reduce(num_tokens)
                + overhead
            )
            return took

        return seconds

    def _reduce(self, num_tokens: Any) -> Any:
        """Return what all-reduces take in a step."""
        device, shape, tp = self.accelerator, self.shape, self.tensor_parallel
        if tp == 1:
            return 0.0
        moved = num_tokens * shape.hidden_size * shape.bytes_per_element
        seconds = moved * (2 * shape.num_layers * 2 * (tp - 1) / tp / device.link_bandwidth)
        return seconds + 2 * shape.num_layers * self.allreduce_latency

    def storing(self, cache: CacheConfig) -> "CostModel":
        """Return the model with keys and values stored as a cache is configured to."""
        if cache.kv_cache_dtype == "auto":
            return self
        # Below 16 bits each vector has 32 more: its scale, or scale and shift.
        size = {"int8": 1.0, "int4": 0.5}.get(cache.kv_cache_dtype, 2.0)
        size += 4 / self.shape.head_dim if size < 2 else 0
        shape = msgspec.structs.replace(self.shape, kv_bytes_per_element=size)
        return msgspec.structs.replace(self, shape=shape)

    def num_blocks(
        self, block_size: int, *, utilization: float = 0.9, fraction: float | None = None
    ) -> int:
        """Return how many KV blocks fit beside the weights.

        Args:
            utilization: Share of the memory that weights and blocks may take together.
            fraction: Instead, the share of what the weights leave that blocks may take.

        Raises:
            ConfigError: The weights alone do not fit.
        """
        shape, tp = self.shape, self.tensor_parallel
        weights = shape.parameters * shape.bytes_per_element / tp
        room = utilization * self.accelerator.memory - weights
        if fraction is not None:
            room = fraction * (self.accelerator.memory - weights)
        blocks = int(room // (shape.kv_bytes_per_token / tp * block_size))
        if blocks < 1:
            raise ConfigError(
                f"the weights leave no room for a block in {self.accelerator.memory:.3g} bytes",
                where="cost",
                remedy="raise tensor_parallel or take another accelerator",
            )
        return blocks


def step_work(plan: StepPlan, block_size: int) -> StepWork:
    """Return what a plan computes and moves, mean over its groups."""
    groups, rows = plan.num_resident.shape
    context = int(plan.num_resident.sum())
    pairs = context - groups * rows / 2
    if plan.num_tokens != rows:
        counts = np.diff(plan.query_start).astype(np.int64)
        pairs = int((plan.num_resident @ counts).sum()) - groups * int(counts @ counts) / 2
    return StepWork(
        num_tokens=plan.num_tokens,
        context_tokens=context / groups,
        attention_pairs=pairs / groups,
        copied_tokens=(len(plan.copies) * block_size + len(plan.moves)) / groups,
        swapped_tokens=(len(plan.swap_in) + len(plan.swap_out)) * block_size / groups,
    )


def leap_work(leap: Leap, block_size: int) -> StepWork:
    """Return the work of a leap's steps, [steps] each; to the bit what `step_work` says of their
    plans.
    """
    # Sums of integers and halves of them, which float64 holds exactly in any order.
    batch, resident = leap.decision.batch, leap.resident
    groups, rows = len(resident), len(leap.then)
    _, _, moves, swaps, copies = leap.decision
    context = int(resident.sum())
    pairs = context - groups * rows / 2
    if not batch.decodes:
        counts = batch.counts.astype(np.int64)
        pairs = int((resident @ counts).sum()) - groups * int(counts @ counts) / 2
    step: Float64 = np.arange(leap.steps, dtype=np.float64)
    chunk = leap.more - rows + 1  # what the last row computes later; 1 if it draws as others do
    base = context + (chunk - 1) * int(resident[:, -1].sum()) if chunk > 1 else context
    contexts = step * (groups * leap.more) + context
    later_pairs = (step - 0.5) * (groups * (rows - 1 + chunk * chunk)) + base
    work = StepWork(
        num_tokens=np.full(leap.steps, leap.more),
        context_tokens=contexts / groups,
        attention_pairs=later_pairs / groups,
        copied_tokens=_at_first((len(copies) * block_size + len(moves)) / groups, step),
        swapped_tokens=_at_first((len(swaps[0]) + len(swaps[1])) * block_size / groups, step),
    )
    work.num_tokens[0], work.attention_pairs[0] = batch.num_tokens, pairs / groups
    return work


def _at_first(tokens: float, step: Float64) -> Any:
    """Return what only the first step moves, as 0 if that is nothing."""
    return tokens * (step == 0) if tokens else 0.0
