"""Hardware and models by name; efficiencies are fitted, by `benchmarks/step_times.py`."""

from pagedkv.errors import ConfigError
from pagedkv.sim.cost import Accelerator, CostModel, ModelShape

__all__ = ["ACCELERATORS", "COSTS", "SHAPES", "cost_preset"]

ACCELERATORS = {
    "a100": Accelerator(
        flops=312e12, bandwidth=2.039e12, memory=80e9, host_bandwidth=32e9, link_bandwidth=300e9
    ),
    "h100": Accelerator(
        flops=989e12, bandwidth=3.35e12, memory=80e9, host_bandwidth=64e9, link_bandwidth=450e9
    ),
    "rtx4090": Accelerator(
        flops=165.2e12, bandwidth=1.008e12, memory=24e9, host_bandwidth=32e9, link_bandwidth=32e9
    ),
}
"""Data sheets: dense bf16, SXM parts for a100 and h100."""

SHAPES = {
    "llama3-8b": ModelShape(
        parameters=8.03e9,
        matmul_parameters=7.505e9,
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    ),
    "llama3-70b": ModelShape(
        parameters=70.55e9,
        matmul_parameters=69.5e9,
        num_layers=80,
        hidden_size=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
    ),
}

_FITTED = {
    # name: (devices, weights, matmul, keys and values, attention, overhead in seconds)
    "a100-llama3-8b": (1, 0.9994, 0.8655, 0.8407, 0.5634, 0.0044),
    "a100-llama3-70b": (4, 0.92, 0.78, 0.76, 0.63, 0.0109),
    "h100-llama3-8b": (1, 0.724, 0.765, 0.948, 0.662, 0.0006),
    "h100-llama3-70b": (4, 0.747, 0.651, 0.749, 0.752, 0.0018),
    "rtx4090-llama3-8b": (1, 1.0, 0.95, 0.53, 0.6, 0.0),
}


def _cost(name: str) -> CostModel:
    device, _, shape = name.partition("-")
    tensor_parallel, weight, matmul, kv, attention, overhead = _FITTED[name]
    return CostModel(
        accelerator=ACCELERATORS[device],
        shape=SHAPES[shape],
        tensor_parallel=tensor_parallel,
        weight_efficiency=weight,
        matmul_efficiency=matmul,
        kv_efficiency=kv,
        attention_efficiency=attention,
        overhead=overhead,
    )


COSTS = {name: _cost(name) for name in _FITTED}


def cost_preset(name: str) -> CostModel:
    """Return a cost model by name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in COSTS:
        raise ConfigError(
            f"there is no hardware {name!r}", where="hardware", remedy=f"give {', '.join(COSTS)}"
        )
    return COSTS[name]
