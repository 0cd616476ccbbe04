"""How the tokens of running sequences are drawn, as columns of the sequence table."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.config import LARGEST_INT32
from pagedkv.core.arrays import Bool, Float32, Int32
from pagedkv.core.request import Sequence

__all__ = ["AdjustmentFields", "SamplingColumns"]

# The fields of `Adjustments`, in their order.
AdjustmentFields = tuple[Int32, Int32, Int32, Int32, Float32]
_NONE = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
_NO_PENALTY = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


class SamplingColumns(dict[str, npt.NDArray[Any]]):
    """[rows] each: the parameters that `SamplingBatch` takes, by name.

    Attributes:
        penalised: [rows] Whether any penalty is set.
        adjusted: [rows] Whether some tokens are biased, or only some allowed.
        min_tokens: [rows] How many are drawn before any of ``stop_ids`` may be.
        stop_ids: [rows, width] Token ids that end the sequence; -1 fills.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(
            temperature=np.zeros(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            min_p=np.zeros(rows, np.float32),
            seed=np.zeros(rows, np.uint64),
            num_logprobs=np.full(rows, -1, np.int32),
            repetition_penalty=np.ones(rows, np.float32),
            presence_penalty=np.zeros(rows, np.float32),
            frequency_penalty=np.zeros(rows, np.float32),
        )
        self.penalised: Bool = np.zeros(rows, np.bool_)
        self.adjusted: Bool = np.zeros(rows, np.bool_)
        # Of those rows: the tokens allowed, the tokens biased, and their biases.
        self._asked: dict[int, tuple[Int32, Int32, Float32]] = {}
        self.min_tokens: Int32 = np.zeros(rows, np.int32)
        self.stop_ids: Int32 = np.full((rows, 1), -1, np.int32)

    def bind(self, seq: Sequence, row: int, stop_ids: list[int]) -> None:
        """Write a sequence's parameters into a row."""
        params = seq.request.sampling
        for name, column in self.items():
            if name not in ("seed", "num_logprobs"):
                column[row] = getattr(params, name)
        self["seed"][row] = seq.seed
        self.penalised[row] = any(getattr(params, name) != at for name, at in _NO_PENALTY.items())
        self.adjusted[row] = bool(params.logit_bias or params.allowed_token_ids)
        self._asked.pop(row, None)
        if self.adjusted[row]:
            bias = params.logit_bias or {}
            self._asked[row] = (
                np.array(params.allowed_token_ids or (), np.int32),
                np.array(list(bias), np.int32),
                np.array(list(bias.values()), np.float32),
            )
        self.min_tokens[row] = min(params.min_tokens, LARGEST_INT32)
        reported = 0 if params.ranks and params.logprobs is None else params.logprobs
        reported = params.num_candidates(len(stop_ids)) or reported
        self["num_logprobs"][row] = -1 if reported is None else reported
        short = len(stop_ids) - self.stop_ids.shape[1]
        if short > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, short)), constant_values=-1)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids

    def adjustments_of(self, rows: Int32) -> AdjustmentFields:
        """Return what those in some rows ask of certain tokens at every step."""
        some = np.flatnonzero(self.adjusted[rows])
        # In front of them one that asks for nothing, so that there is something to join.
        asked = [self._asked[row] for row in rows[some].tolist()]
        kept, token, bias = zip(_NONE, *asked, strict=True)
        sample = np.concatenate([[0], some]).astype(np.int32)
        return (
            np.repeat(sample, [len(each) for each in kept]),
            np.concatenate(kept),
            np.repeat(sample, [len(each) for each in token]),
            np.concatenate(token),
            np.concatenate(bias),
        )
