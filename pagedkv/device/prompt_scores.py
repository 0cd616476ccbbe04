"""Teacher forcing: the log-probabilities of tokens that are given, not drawn."""

import numpy as np
import torch
from torch import Tensor

from pagedkv.core.plan import PromptLogprobs, PromptTargets
from pagedkv.device.sampling import token_logprobs

__all__ = ["score_prompt"]

# Rows whose distributions are worked out at once: what is needed beside the logits stays small.
_ROWS = 32


def score_prompt(logits: Tensor, targets: PromptTargets) -> PromptLogprobs:
    """Look up the log-probabilities of prompt tokens, and of the likeliest in their places.

    Natural logarithms of the model's own distribution, as in `sampling.sample`. NaN where logits
    hold NaN or +inf, or nothing but -inf.

    Args:
        logits: [P, V] At the tokens before the targets, in their order.
        targets: What is looked up.

    Cost:
        One pass over the logits and, for alternatives, a sort of few tokens; 12 bytes per logit
        of 32 rows at a time.
    """
    width = min(int(targets.num_logprobs.max()), logits.shape[1])
    logprobs = np.full(len(targets.index), np.nan, np.float32)
    top_ids = np.full((len(logprobs), width), -1, np.int32)
    top = np.full((len(logprobs), width), np.nan, np.float32)
    for begin in range(0, len(logprobs), _ROWS):
        own = logits[begin : begin + _ROWS].detach().float()
        rows = begin + np.flatnonzero(torch.isfinite(own.amax(-1)).cpu().numpy())
        if rows.size:
            logprobs[rows], top_ids[rows], top[rows] = token_logprobs(
                own[rows - begin], targets.token_ids[rows], targets.num_logprobs[rows], width
            )
    return PromptLogprobs(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)
