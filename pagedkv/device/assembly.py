"""An engine around a loaded model, for those who want its parts rather than an `LLM`."""

import msgspec

from pagedkv.config import EngineConfig, ModelConfig
from pagedkv.core.engine import Engine
from pagedkv.core.scheduler import Scheduler
from pagedkv.device.dispatch import choose_operator
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.models import LoadedModel
from pagedkv.device.store import KVStore

__all__ = ["assemble", "model_facts"]


def model_facts(geometry: ModelGeometry, max_model_len: int | None = None) -> ModelConfig:
    """Return what block management needs to know of a model.

    Args:
        max_model_len: The longest sequence; what the model was trained on if omitted.
    """
    return ModelConfig(
        max_model_len=max_model_len or geometry.max_model_len,
        vocab_size=geometry.vocab_size,
        eos_token_ids=geometry.eos_token_ids,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        sliding_window=geometry.sliding_window,
        rope=geometry.rope,
    )


def assemble(
    loaded: LoadedModel, config: EngineConfig, *, max_model_len: int | None = None
) -> Engine:
    """Put scheduler, store, executor and engine together.

    Args:
        config: Pool and scheduler; its model facts are replaced by the model's own.
        max_model_len: As in `model_facts`.

    Raises:
        ConfigError: The pool is larger than the device's memory.
        UnsupportedBackend: No operator serves this model there.
    """
    facts = model_facts(loaded.geometry, max_model_len)
    scheduler = Scheduler(msgspec.structs.replace(config, model=facts))
    store = KVStore(
        loaded.geometry,
        scheduler.manager.pool.num_blocks,
        scheduler.manager.block_size,
        layout=scheduler.layout,
        dtype=loaded.dtype,
        device=loaded.device,
        num_cpu_blocks=config.cache.num_cpu_blocks,
    )
    operator = choose_operator(
        loaded.device,
        loaded.dtype,
        block_size=scheduler.manager.block_size,
        head_dim=loaded.geometry.head_dim,
    )
    executor = TorchExecutor(loaded, store, layout=scheduler.layout, operator=operator)
    return Engine(scheduler, executor)
