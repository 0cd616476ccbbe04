"""The shape of a model, as the scheduler and the KV store need to know it. Torch-free."""

import msgspec

__all__ = ["ModelGeometry"]


class ModelGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model's attention looks like: counts, widths and positions. Plain data.

    Attributes:
        num_layers: Attention layers, each called once per forward.
        num_query_heads: Query heads per layer; a multiple of `num_kv_heads`.
        num_kv_heads: Key and value heads per layer, the same in every layer.
        head_dim: Elements per head of query, key and value alike.
        max_model_len: Positions the model was trained on. Learned positions end there for good;
            rotary ones only lose quality beyond it.
        vocab_size: Columns of the logits; the tokenizer may use fewer.
        eos_token_ids: Token ids that end a sequence, ascending; empty if the model names none.
        rope: Positions enter through rotations of query and key alone, at known and constant
            frequencies, so a key may be read at another distance by rotating the query.
        sliding_window: Per layer, how many tokens a query sees, itself included; 0 means all.
        rope_frequencies: Per layer, the angle in radians that one position turns each rotated pair
            of elements by; empty for a layer that does not rotate, and everywhere if not `rope`.
        rope_interleaved: A rotated pair is elements (2i, 2i + 1), not (i, i + pairs).
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    rope: bool
    sliding_window: tuple[int, ...]
    rope_frequencies: tuple[tuple[float, ...], ...]
    rope_interleaved: bool = False

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of key and value that one token holds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
