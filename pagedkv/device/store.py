"""Where keys and values live: one allocation of fixed-size blocks for all layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pagedkv.core.groups import GroupLayout
from pagedkv.device import memory
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.hostblocks import HostBlocks
from pagedkv.device.quantize import quantize, quantize4, row_words
from pagedkv.errors import ConfigError

__all__ = ["INT4", "KVStore", "bytes_per_block", "check_memory", "one_group", "storage_dtype"]


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
        ConfigError: The head size cannot be packed into whole words.
    """
    whole = {"int8": 4, "int4": 8}.get(kv_cache_dtype, 1)
    if head_dim % whole:
        raise ConfigError(
            f"kv_cache_dtype is {kv_cache_dtype} and the model's head size is {head_dim}, "
            f"no multiple of {whole}",
            where="cache.kv_cache_dtype",
            remedy="use float16 or bfloat16",
        )
    return dtype if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype)


def _row(head_dim: int, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """How a vector lies in memory: the type and number of its elements."""
    if dtype in _PACK:
        return torch.int32, row_words(head_dim, _BITS[dtype])
    return dtype, head_dim


INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 -- torch's type stubs lack it
_BITS = {torch.int8: 8, INT4: 4}
_PACK = {torch.int8: quantize, INT4: quantize4}


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


def check_memory(
    num_bytes: int, device: torch.device | str = "cpu", where: str = "cache.num_blocks"
) -> None:
    """Refuse blocks that the device could never hold.

    Raises:
        ConfigError: They are larger than its memory.
    """
    total = memory.total(torch.device(device))
    if num_bytes > total:
        tenths = 10 * num_bytes >> 30  # whole numbers: what was asked may be beyond any float
        raise ConfigError(
            f"the blocks take {tenths // 10}.{tenths % 10} GiB and {device} has "
            f"{total / 2**30:.1f} GiB",
            where=where,
            remedy=f"lower {where.partition('.')[2]}",
        )


class KVStore:
    """Keys and values by layer and slot; a slot is ``block_id * block_size + offset``.

    All groups take their blocks from the one pool, so a block id means the same slots for each.

    Attributes:
        keys: [slot_layers, num_blocks, block_size, heads_per_group, head_dim]; of int8 and int4,
            rows of int32 words as `quantize` and `quantize4` pack them.
        values: The same shape.
        layers: Of each slot layer, its keys and its values.

    Args:
        layout: The scheduler's groups; one for everything if omitted.
        dtype: A float type, int8 or int4.
        device: Where the pool is.
        num_cpu_blocks: Blocks of host memory beside the pool.
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
        device: torch.device | str = "cpu",
        num_cpu_blocks: int = 0,
        poison: bool = False,
    ) -> None:
        layout = layout or one_group(geometry)
        device = torch.device(device)
        each = bytes_per_block(geometry, layout, block_size, dtype)
        here = device.type == "cpu"
        check_memory((num_blocks + num_cpu_blocks * here) * each, device)
        check_memory(num_cpu_blocks * each, "cpu", "cache.num_cpu_blocks")
        kind, words = _row(geometry.head_dim, dtype)
        shape = (
            layout.slot_layers,
            num_blocks,
            block_size,
            layout.heads_per_group,
            words,
        )
        self._pack = _PACK.get(dtype)
        self._put = _put_natively() if here and dtype == torch.float32 else None
        make = memory.empty if here else partial(_on_device, device)
        self.keys, self.values = (make(shape, kind) for _ in range(2))
        self._host = [(pool, HostBlocks(pool, num_cpu_blocks)) for pool in (self.keys, self.values)]
        self._key_slots = self.keys.view(shape[0], num_blocks * block_size, -1)
        self._value_slots = self.values.view(shape[0], num_blocks * block_size, -1)
        # Views of single layers, made once: a step would make them anew for every layer.
        self.layers = [*zip(self.keys, self.values, strict=True)]
        self._rows = [*zip(self._key_slots, self._value_slots, strict=True)]
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
        plain = key.dtype == torch.float32 and key.stride(2) == value.stride(2) == 1
        if self._put is not None and plain:
            self._put(key, value, *self._rows[slot_layer], slots)
            return
        for layer, fresh in zip(self._rows[slot_layer], (key, value), strict=True):
            rows = self._pack(fresh) if self._pack else fresh.to(layer.dtype)
            layer.index_copy_(0, slots, rows.flatten(1))

    def fill_nan(self, slots: Tensor | slice) -> None:
        """Fill single slots with NaN in every layer; int64 [N]. Packed rows then read as NaN."""
        for pool in (self._key_slots, self._value_slots):
            (pool.view(torch.float32) if self._pack else pool)[:, slots] = torch.nan

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
        """Copy blocks of the pool, int64 [C] on its device, to those of host memory, int64 [C]."""
        for pool, host in self._host:
            host.take(pool, sources, targets)

    def swap_in(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks of host memory, int64 [C], back to those of the pool, int64 [C] there."""
        for pool, host in self._host:
            host.give(pool, sources, targets)

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks in every layer; int64 [C] each, no block on both sides."""
        for pool in (self.keys, self.values):
            pool.index_copy_(1, targets, pool.index_select(1, sources))


def _put_natively() -> Callable[..., None] | None:
    """Return what stores fp32 vectors on the CPU in one call; None without numba."""
    try:
        from pagedkv.device.cpu.rowwise import put_rows
    except ImportError:
        return None
    return put_rows


def _on_device(device: torch.device, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=kind, device=device)
