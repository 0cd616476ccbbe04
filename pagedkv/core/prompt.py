"""A prompt as it is handed in, checked."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Int32
from pagedkv.core.request import Request
from pagedkv.errors import InvalidRequest

__all__ = ["prompt_array"]


def prompt_array(request: Request, vocab_size: int, max_len: int) -> Int32:
    """Return the prompt as int32 after checking it against vocabulary and greatest length.

    Raises:
        InvalidRequest: The prompt is empty, too long for the model, or holds something that is
            not a token id of its vocabulary.
    """
    where = f"request {request.request_id!r} prompt_token_ids"
    wide = _flat_array(request.prompt_token_ids)
    if wide.size == 0 and wide.dtype != object:
        raise InvalidRequest("the prompt is empty", where=where, remedy="give at least one token")
    if wide.ndim != 1 or wide.dtype.kind not in "iu":
        raise InvalidRequest(
            "the prompt is not a flat list of whole numbers", where=where, remedy="give token ids"
        )
    if wide.min() < 0 or wide.max() >= vocab_size:
        wrong = int(np.argmax((wide < 0) | (wide >= vocab_size)))
        raise InvalidRequest(
            f"token id {wide[wrong]} at index {wrong} is outside the vocabulary",
            where=where,
            remedy=f"give ids from 0 to {vocab_size - 1}",
        )
    if wide.size >= max_len:
        raise InvalidRequest(
            f"the prompt has {wide.size} tokens and the model takes {max_len} in all",
            where=where,
            remedy=f"give at most {max_len - 1} tokens, or raise max_model_len",
        )
    return wide.astype(np.int32)


def _flat_array(ids: Any) -> npt.NDArray[Any]:
    """Return ids as an array, of dtype object if they are not numbers in an order."""
    if isinstance(ids, np.ndarray):
        return ids
    unfit = isinstance(ids, bytes | bytearray | Set | Mapping)
    try:
        items = [None] if unfit else list(ids)
        return np.asarray([None] if any(isinstance(i, bool) for i in items) else items)
    except (TypeError, ValueError, OverflowError):
        return np.empty(0, object)
