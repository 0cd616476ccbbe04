"""Where keys and values live: one allocation of fixed-size blocks for all layers."""

import os

import torch
from torch import Tensor

from pagedkv.core.groups import GroupLayout
from pagedkv.device import memory
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.quantize import quantize, row_words
from pagedkv.errors import ConfigError

__all__ = ["KVStore", "bytes_per_block", "check_memory", "one_group", "storage_dtype"]


def bytes_per_block(
    geometry: ModelGeometry, layout: GroupLayout, block_size: int, dtype: torch.dtype
) -> int:
    """Return the bytes of one block: its group's layers and heads, keys and values together."""
    vectors = 2 * layout.slot_layers * layout.heads_per_group * block_size
    kind, words = _row(geometry.head_dim, dtype)
    return vectors * words * kind.itemsize


def storage_dtype(kv_cache_dtype: str, head_dim: int, dtype: torch.dtype) -> torch.dtype:
    """Return what keys and values are stored as, for a model that computes in `dtype`.

    Raises:
        ConfigError: The head size cannot be packed into whole words of 8-bit numbers.
    """
    if kv_cache_dtype == "int8" and head_dim % 4:
        raise ConfigError(
            f"kv_cache_dtype is int8 and the model's head size is {head_dim}, no multiple of 4",
            where="cache.kv_cache_dtype",
            remedy="use float16 or bfloat16",
        )
    return dtype if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype)


def _row(head_dim: int, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """How a vector lies in memory: the type and number of its elements."""
    if dtype == torch.int8:
        return torch.int32, row_words(head_dim)
    return dtype, head_dim


def one_group(geometry: ModelGeometry) -> GroupLayout:
    """Return the layout in which all layers and heads share one block table."""
    return GroupLayout(
        num_groups=1,
        slot_layers=geometry.num_layers,
        heads_per_group=geometry.num_kv_heads,
        group_of=(0,) * geometry.num_layers,
        slot_of=tuple(range(geometry.num_layers)),
        windows=(0,),
    )


def check_memory(num_bytes: int, where: str = "cache.num_blocks") -> None:
    """Refuse a pool that the machine could never hold.

    Raises:
        ConfigError: The pool is larger than the machine's memory.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > total:
        raise ConfigError(
            f"the pool takes {num_bytes / 2**30:.1f} GiB and the machine has "
            f"{total / 2**30:.1f} GiB",
            where=where,
            remedy="lower num_blocks or kv_cache_memory_bytes",
        )


class KVStore:
    """Keys and values by layer and slot; a slot is ``block_id * block_size + offset``.

    All groups take their blocks from the one pool, so a block id means the same slots for each.

    Attributes:
        keys: [slot_layers, num_blocks, block_size, heads_per_group, head_dim]; of int8, rows of
            int32 words as `quantize` packs them.
        values: The same shape.

    Args:
        layout: The scheduler's groups; one for everything if omitted.
        dtype: A float type, or int8.
        num_cpu_blocks: Blocks of host memory beside the pool; pinned where the pool is CUDA's.
        poison: Fill new blocks with NaN, so that reading a slot nobody wrote shows in the output.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        num_blocks: int,
        block_size: int,
        *,
        layout: GroupLayout | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        num_cpu_blocks: int = 0,
        poison: bool = False,
    ) -> None:
        layout = layout or one_group(geometry)
        check_memory(
            (num_blocks + num_cpu_blocks) * bytes_per_block(geometry, layout, block_size, dtype)
        )
        kind, words = _row(geometry.head_dim, dtype)
        shape = (
            layout.slot_layers,
            num_blocks,
            block_size,
            layout.heads_per_group,
            words,
        )
        self._quantized = dtype == torch.int8
        host, pinned = (shape[0], num_cpu_blocks, *shape[2:]), device.startswith("cuda")
        self.keys, self.values = (
            torch.empty(shape, dtype=kind, device=device) if pinned else memory.empty(shape, kind)
            for _ in range(2)
        )
        self._host_keys = torch.empty(host, dtype=kind, pin_memory=pinned)
        self._host_values = torch.empty(host, dtype=kind, pin_memory=pinned)
        self._key_slots = self.keys.view(shape[0], num_blocks * block_size, -1)
        self._value_slots = self.values.view(shape[0], num_blocks * block_size, -1)
        if poison:
            self.fill_nan(slice(None))

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        return self.keys.shape[2]

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot: a token's keys and values in the layers and heads of a group."""
        return self.num_bytes // self._key_slots.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def write(self, slot_layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store the vectors of T slots.

        Args:
            slot_layer: Which of a block's layers.
            slots: int64 [T], each at most once.
            key: [T, heads_per_group, head_dim]; any strides.
            value: The same shape.
        """
        for pool, fresh in ((self._key_slots, key), (self._value_slots, value)):
            rows = quantize(fresh) if self._quantized else fresh.to(pool.dtype)
            pool[slot_layer].index_copy_(0, slots, rows.reshape(len(slots), -1))

    def fill_nan(self, slots: Tensor | slice) -> None:
        """Fill single slots with NaN in every layer; int64 [N]. Packed rows then read as NaN."""
        for pool in (self._key_slots, self._value_slots):
            (pool.view(torch.float32) if self._quantized else pool)[:, slots] = torch.nan

    def move_slots(self, sources: Tensor, targets: Tensor) -> None:
        """Copy single slots in every layer, reading all sources before a target is written.

        Args:
            sources: int64 [M]
            targets: int64 [M], each at most once; a slot may be on both sides.

        Cost: room for M slots of one layer; `bytes_per_block` / block size for each slot.
        """
        for pool in (self._key_slots, self._value_slots):
            for layer in pool:
                layer.index_copy_(0, targets, layer.index_select(0, sources))

    def swap_out(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks of the pool to host memory in every layer; int64 [C] each."""
        for pool, host in ((self.keys, self._host_keys), (self.values, self._host_values)):
            host[:, targets] = pool[:, sources.to(pool.device)].to(host.device)

    def swap_in(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks of host memory back to the pool in every layer; int64 [C] each."""
        for pool, host in ((self.keys, self._host_keys), (self.values, self._host_values)):
            pool[:, targets.to(pool.device)] = host[:, sources].to(pool.device)

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks in every layer; int64 [C] each, no block on both sides."""
        self.keys[:, targets] = self.keys[:, sources]
        self.values[:, targets] = self.values[:, sources]
