"""Which layers and heads share a block table, and where each layer lies inside a block."""

from math import gcd

from msgspec import Struct

from pagedkv.config import CacheConfig, ModelConfig

__all__ = ["GroupLayout", "group_layout"]


class GroupLayout(Struct, frozen=True, kw_only=True):
    """The groups of a model: a group is what shares one block table and one eviction decision.

    Attributes:
        num_groups: Block tables per sequence.
        slot_layers: Layers that one block holds.
        heads_per_group: KV heads that one block holds.
        group_of: [num_layers] The group of each layer, or of its first head.
        slot_of: [num_layers] Which of a block's layers it is.
        windows: [num_groups] Tokens a query sees back in the group; 0 sees all.
    """

    num_groups: int
    slot_layers: int
    heads_per_group: int
    group_of: tuple[int, ...]
    slot_of: tuple[int, ...]
    windows: tuple[int, ...]


def group_layout(model: ModelConfig, cache: CacheConfig) -> GroupLayout:
    """Lay out the groups that ``cache.granularity`` asks for.

    ``sequence`` gives one group, or several of equal size where layers differ in their window:
    a window is part of what a group decides, and equal sizes let all groups share one pool.
    """
    windows = model.sliding_window or (0,) * model.num_layers
    heads = model.num_kv_heads
    if cache.granularity == "head":
        return GroupLayout(
            num_groups=model.num_layers * heads,
            slot_layers=1,
            heads_per_group=1,
            group_of=tuple(range(0, model.num_layers * heads, heads)),
            slot_of=(0,) * model.num_layers,
            windows=tuple(window for window in windows for _ in range(heads)),
        )
    counts = [windows.count(window) for window in sorted(set(windows))]
    size = 1 if cache.granularity == "layer" else gcd(*counts)
    members = [
        [layer for layer in range(model.num_layers) if windows[layer] == window]
        for window in sorted(set(windows))
    ]
    groups = sorted(layers[i : i + size] for layers in members for i in range(0, len(layers), size))
    place = {
        layer: (group, slot)
        for group, layers in enumerate(groups)
        for slot, layer in enumerate(layers)
    }
    return GroupLayout(
        num_groups=len(groups),
        slot_layers=size,
        heads_per_group=heads,
        group_of=tuple(place[layer][0] for layer in range(model.num_layers)),
        slot_of=tuple(place[layer][1] for layer in range(model.num_layers)),
        windows=tuple(windows[layers[0]] for layers in groups),
    )
