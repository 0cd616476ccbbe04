"""What happens to cached blocks, in the shapes that vLLM's routers already read.

Class and field names, tags and order are vLLM 0.32's, encoded with msgspec: a batch is an array
``[ts, [events]]``, an event a map tagged ``type``.
"""

from typing import Any

from msgspec import Struct

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "KVEvent", "KVEventBatch"]


class BlockStored(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Sealed blocks became findable.

    Attributes:
        block_hashes: Low 64 bits of each block's hash.
        parent_block_hash: The hash before the first one; None at the start of a prompt.
        token_ids: The tokens of all the blocks.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    extra_keys: list[list[Any] | None] | None = None


class BlockRemoved(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Cached blocks were reclaimed and can no longer be found."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(Struct, frozen=True, kw_only=True, tag=True):
    """The prefix cache was reset."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(Struct, frozen=True, array_like=True, omit_defaults=True):
    """The events of one step, stamped with seconds since the epoch of the caller's clock."""

    ts: float
    events: list[KVEvent]


def short_hash(digest: bytes) -> int:
    """Return the low 64 bits of a block hash, as events carry it."""
    return int.from_bytes(digest[-8:], "big")
