"""What changes logits before a token is drawn: what is allowed or biased, and penalties."""

import math

import numpy as np
import torch
from torch import Tensor

from pagedkv.core.plan import Adjustments, Penalties, SamplingBatch
from pagedkv.device.send import sender

__all__ = ["adjust", "penalise"]


def adjust(x: Tensor, wanted: Adjustments) -> None:
    """Make what is not allowed -inf, and add biases.

    Args:
        x: [S, V] Logits, changed in place.
        wanted: Of the rows, with tokens from 0 to V - 1.
    """
    there = sender(x.device)
    if len(wanted.kept_sample):
        rows, place = np.unique(wanted.kept_sample, return_inverse=True)
        row, token = (there(a.astype(np.int64)) for a in (wanted.kept_sample, wanted.kept_token))
        kept = x.new_full((len(rows), x.shape[1]), -math.inf)
        kept[there(place), token] = x[row, token]
        x[there(rows.astype(np.int64))] = kept
    row, token = (there(a.astype(np.int64)) for a in (wanted.sample, wanted.token))
    # They are added up: a token that is both biased and forbidden is named twice.
    x.index_put_((row, token), there(wanted.bias), accumulate=True)


def penalise(x: Tensor, batch: SamplingBatch, seen: Penalties) -> None:
    """Apply the three penalties, in vLLM's order.

    Args:
        x: [S, V] Logits, changed in place.
        batch: The rows' parameters.
        seen: The tokens, from 0 to V - 1, that rows with a penalty hold.
    """
    there = sender(x.device)
    row, token = (there(a.astype(np.int64)) for a in (seen.sample, seen.token))
    value = x[row, token]
    factor = there(batch.repetition_penalty[seen.sample])
    # A token that is seen twice is written twice, with the same value.
    x[row, token] = torch.where(value > 0, value / factor, value * factor)

    generated = np.flatnonzero(seen.generated)
    pair = seen.sample[generated].astype(np.int64) * x.shape[1] + seen.token[generated]
    pair, count = np.unique(pair, return_counts=True)
    sample_of, token_of = np.divmod(pair, x.shape[1])
    row, token = there(sample_of), there(token_of)
    frequency = batch.frequency_penalty[sample_of] * count.astype(np.float32)
    value = x[row, token] - there(frequency)
    x[row, token] = value - there(batch.presence_penalty[sample_of])
