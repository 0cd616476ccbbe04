"""Names for expressions: the policies of the literature, by block or by token.

Every published policy below drops single tokens. As written here it drops whole blocks: nothing is
copied, a kept token keeps its block, and sinks cost a whole one. With ``unit=token`` it drops
tokens and packs the rest into the fewest blocks: ``policy("h2o", unit="token")`` with one table
per head (``granularity="head"``) is the paper's H2O. Budgets are per table. Overrides replace a
part and leave the split of the rest: ``policy("h2o", budget=1024)``.
"""

__all__ = ["PRESETS"]

PRESETS: dict[str, str] = {
    # Everything stays: the baseline of every comparison.
    "full": "full",
    # The last L tokens (sliding-window attention). By block: exact, with up to a block more.
    "window": "budget=512",
    # Attention sinks and the last tokens, cache-relative positions (StreamingLLM, Xiao et al.
    # 2024). By block: the sinks' block stays whole.
    "streaming": "sinks=4 + budget=512",
    # Accumulated attention, half of the budget recent (H2O, Zhang et al. 2023). By block: the
    # block's accumulated mass; sums over query heads as the paper's per-head sums add up.
    "h2o": "recent=0.5 + score=sum + budget=512 + gqa=sum",
    # What the last query attends to; no protection (TOVA, Oren et al. 2024). By block: exact for
    # block mass; the mean over heads is the paper's, and the tail stays.
    "tova": "score=last + budget=512",
    # The last w queries judge, and at this budget stay themselves (SnapKV, Li et al. 2024). By
    # block: the block takes the place of pooling; goes on in decode, which the paper leaves out.
    "snap": "recent=0.125 + score=window(64) + budget=512",
    # Drop half when full: what most of the last 400 queries gave less than its share
    # (Scissorhands, Liu et al. 2023). By block: the share is the block's.
    "scissorhands": "recent=0.125 + score=low(400) + budget=512 + lowest=0.5",
    # |v| / |k| without any attention, a block at each seal (PagedEviction, Chitty-Venkata et al.
    # 2025). The paper prunes the prompt by token before it is paged; here by block, in chunks.
    "pagedeviction": "score=value_key_norm + budget=512",
    # Large keys go (Devoto et al. 2024). By block: the mean norm; decided at every seal.
    "knorm": "score=key_norm + budget=512",
    # Keys closest to the mean key go (KeyDiff, Park et al. 2025). By block: the mean cosine, to
    # the mean key as it was when the block sealed.
    "keydiff": "score=key_diff + budget=512",
    # What moves the output least when left out, exactly (ours).
    "lobo": "sinks=4 + recent=0.25 + score=lobo + budget=512",
    # The most, relative to an even share, that any query cared for the block, mean over heads
    # (ours). Age gives no advantage, as it does under sums. docs/quality.md has the measurements.
    "peak": "sinks=4 + recent=0.125 + score=lift_max + budget=512",
    # The floor that every table should show: a uniform sample of the history.
    "random": "sinks=4 + recent=0.5 + score=random + budget=512",
    # The seed article's system 1, "H2O": per head, a ring of the last L tokens; no sinks. Choose
    # granularity "head" for its letter; all heads then decide alike.
    "seed-h2o": "recent=1.0 + budget=512",
    # The seed article's system 2, "StreamingLLM": importance is the max, mean or decayed mean
    # (score=max, mean or ema) of attention received; at capacity the lowest 10 % go, or
    # (threshold=x) what lies below a part of the mean, which replaces its raw 0.01. Never all.
    "seed-streaming": "recent=0.125 + score=max + budget=512 + lowest=0.1",
}
