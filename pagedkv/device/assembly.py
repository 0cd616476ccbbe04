"""An engine around a loaded model, for those who want its parts rather than an `LLM`."""

from pagedkv.config import EngineConfig
from pagedkv.core.engine import Engine
from pagedkv.core.scheduler import Scheduler
from pagedkv.device.dispatch import choose_operator
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.poison import Poison
from pagedkv.device.sizing import fitted
from pagedkv.device.store import KVStore, storage_dtype
from pagedkv.environment import audit_enabled

__all__ = ["assemble"]


def assemble(
    loaded: LoadedModel, config: EngineConfig, *, max_model_len: int | None = None
) -> Engine:
    """Put scheduler, store, executor and engine together.

    Args:
        config: Pool and scheduler; its model facts are replaced by the model's own.
        max_model_len: The longest sequence; what the model was trained on if omitted.

    Raises:
        ConfigError: The pool is larger than the device's memory, or the model has no positions
            for such a length.
        UnsupportedBackend: No operator serves this model there.
    """
    geometry, computed, cache = loaded.geometry, loaded.dtype, config.cache
    stored = storage_dtype(cache.kv_cache_dtype, geometry.head_dim, computed)
    operator = choose_operator(
        loaded.device,
        computed,
        stored=stored,
        block_size=cache.block_size,
        head_dim=geometry.head_dim,
    )
    config = fitted(config, loaded, max_model_len or geometry.max_model_len, stored)
    scheduler, audits = Scheduler(config), audit_enabled()
    store = KVStore(
        geometry,
        scheduler.manager.pool.num_blocks,
        cache.block_size,
        layout=scheduler.layout,
        dtype=stored,
        device=loaded.device,
        num_cpu_blocks=cache.num_cpu_blocks,
        poison=audits,
    )
    executor = TorchExecutor(
        loaded,
        store,
        layout=scheduler.layout,
        operator=operator,
        poison=Poison(store, scheduler.manager.pool.is_blank) if audits else None,
    )
    return Engine(scheduler, executor)
