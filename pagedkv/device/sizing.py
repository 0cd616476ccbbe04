"""How large the pool gets: a model's facts and the memory at hand, filled into a config."""

import msgspec
import torch

from pagedkv.config import CacheConfig, EngineConfig, ModelConfig
from pagedkv.core.groups import group_layout
from pagedkv.device import memory
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.store import bytes_per_block, check_memory
from pagedkv.errors import ConfigError

__all__ = ["DEFAULT_KV_BYTES", "fitted", "model_facts"]

DEFAULT_KV_BYTES = 2**30


def model_facts(geometry: ModelGeometry, max_model_len: int) -> ModelConfig:
    """Return what block management needs to know of a model.

    Args:
        max_model_len: The longest sequence.
    """
    return ModelConfig(
        max_model_len=max_model_len,
        vocab_size=geometry.vocab_size,
        eos_token_ids=geometry.eos_token_ids,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        sliding_window=geometry.sliding_window,
        rope=geometry.rope,
    )


def fitted(
    config: EngineConfig, model: LoadedModel, length: int, stored: torch.dtype
) -> EngineConfig:
    """Return the config with the model's facts and the pool's size filled in.

    Args:
        config: Asks for blocks, for bytes, for a fraction of the memory that is free, or nothing.
        model: Loaded, so that what is free now is what is left beside it.
        length: The longest sequence.
        stored: What `storage_dtype` gave.

    Raises:
        ConfigError: The pool holds no block or is larger than the device's memory, or the model
            has no positions for such a length.
    """
    geometry = model.geometry
    if length > geometry.max_model_len and not geometry.rope:
        raise ConfigError(
            f"{length} tokens and the model has {geometry.max_model_len} learned positions",
            where="model.max_model_len",
            remedy=f"give at most {geometry.max_model_len}",
        )
    facts = model_facts(geometry, length)
    layout = group_layout(facts, config.cache)
    per_block = bytes_per_block(geometry, layout, config.cache.block_size, stored)
    most = config.scheduler.max_num_seqs * -(-length // config.cache.block_size) * layout.num_groups
    num_blocks, where = _pool_size(config.cache, per_block, most, model.device)
    # Before any of it is made, and before anybody keeps books of it.
    check_memory(num_blocks * per_block, model.device, where)
    check_memory(config.cache.num_cpu_blocks * per_block, "cpu", "cache.num_cpu_blocks")
    cache = msgspec.structs.replace(
        config.cache,
        num_blocks=num_blocks,
        kv_cache_memory_bytes=None,
        kv_cache_memory_fraction=None,
    )
    return msgspec.structs.replace(config, model=facts, cache=cache)


def _pool_size(
    cache: CacheConfig, per_block: int, most: int, device: torch.device
) -> tuple[int, str]:
    """Return how many blocks the pool gets, `most` at the utmost if nothing says, and what says."""
    if cache.num_blocks is not None:
        return cache.num_blocks, "cache.num_blocks"
    given, where = cache.kv_cache_memory_bytes, "cache.kv_cache_memory_bytes"
    if cache.kv_cache_memory_fraction is not None:
        where = "cache.kv_cache_memory_fraction"
        given = int(cache.kv_cache_memory_fraction * memory.free(device))
    num_blocks = min(most, DEFAULT_KV_BYTES // per_block) if given is None else given // per_block
    if not num_blocks:
        raise ConfigError(
            f"{DEFAULT_KV_BYTES if given is None else given} bytes hold no block of "
            f"{per_block} bytes",
            where=where,
            remedy="raise it or lower cache.block_size",
        )
    return num_blocks, where
