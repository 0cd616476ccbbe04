"""What simulated prompts are made of: streams of made-up tokens, equal where texts are equal.

A trace says which prompts share which blocks, not what they say. So every distinct piece of text
is a **stream**, a number, and token ``i`` of a stream is a pure function of both: two prompts that
name the same stretch of the same stream hold the same tokens, and two that do not never agree on a
block (60 bits tell streams apart). Generated tokens are streams as well, so that a conversation's
next turn can quote the answer before it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from pagedkv.core.arrays import Int32, Int64, UInt64

__all__ = [
    "Content",
    "first_tokens",
    "lane_tokens",
    "stream_id",
    "stream_ids",
    "stream_lanes",
    "stream_tokens",
    "text",
]

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_STEP = 0x2545F491
_LANE_BITS = 30
_LANE = 2**_LANE_BITS - 1


def _mixed(z: Any) -> Any:
    """SplitMix64 (Steele et al. 2014) of an int or an array of uint64: every input bit reaches
    every output bit.
    """
    z = (z + _GOLDEN) & _WORD
    z = ((z ^ (z >> 30)) * _MIX_1) & _WORD
    z = ((z ^ (z >> 27)) * _MIX_2) & _WORD
    return z ^ (z >> 31)


def stream_id(namespace: int, number: int) -> int:
    """Return the stream of a numbered text: below 2^63; distinct by namespace."""
    stream: int = _mixed((number & _WORD) ^ _mixed(namespace)) >> 1
    return stream


def stream_ids(namespace: int, numbers: npt.ArrayLike) -> Int64:
    """Return the same of many: [N]."""
    streams: UInt64 = _mixed(np.asarray(numbers).astype(np.uint64) ^ _mixed(namespace)) >> 1
    return streams.astype(np.int64)


def stream_tokens(streams: Int64, offsets: Int64) -> Int32:
    """Return the token at each offset of each stream; the arguments broadcast."""
    return lane_tokens(stream_lanes(streams), offsets)


def stream_lanes(streams: Int64 | UInt64) -> Int64:
    """Return all that a stream's tokens depend on: [2, *streams.shape]."""
    return np.stack(_lanes(streams.astype(np.uint64))).astype(np.int64)


def _lanes(streams: Any) -> tuple[Any, Any]:
    keys = _mixed(streams)
    return keys & _LANE, keys >> _LANE_BITS & _LANE


def lane_tokens(lanes: Int64 | tuple[int, int], offsets: Int64 | Int32) -> Int32:
    """Return the token at each offset of each stream, from `stream_lanes`; they broadcast."""
    lane: Int64 = np.where(offsets & 1, lanes[1], lanes[0])
    tokens: Int32 = ((lane + offsets * _STEP) & _LANE).astype(np.int32)
    return tokens


def first_tokens(stream: int, length: int) -> Int32:
    """Return a stream's first tokens: [length]. What wraps around 32 bits is above the lane."""
    tokens = np.arange(length, dtype=np.uint32) * np.uint32(_STEP)
    for first, lane in enumerate(_lanes(stream)):
        tokens[first::2] += np.uint32(lane)
    tokens &= np.uint32(_LANE)
    return tokens.view(np.int32)


class Content(Struct, frozen=True, eq=False):
    """A text as pieces of streams, or as the exact tokens where a trace has them.

    Attributes:
        streams: [P] The stream of each piece.
        lengths: [P] Its tokens.
        starts: [P] Where in the stream it begins; None begins all at 0.
        exact: [T] The tokens themselves; pieces are empty then.
    """

    streams: Int64
    lengths: Int64
    starts: Int64 | None = None
    exact: Int32 | None = None

    def __len__(self) -> int:
        return len(self.exact) if self.exact is not None else int(self.lengths.sum())

    def token_ids(self) -> Int32:
        """Return the tokens: [T]."""
        if self.exact is not None:
            return self.exact
        if len(self.streams) == 1 and self.starts is None:
            return first_tokens(int(self.streams[0]), int(self.lengths[0]))
        lanes = stream_lanes(self.streams)
        before = np.cumsum(self.lengths) - self.lengths
        shift = before if self.starts is None else before - self.starts
        piece = np.repeat(np.arange(len(self.streams)), self.lengths)
        offsets = np.arange(len(piece)) - shift[piece]
        return lane_tokens(lanes[:, piece], offsets)

    def __add__(self, other: "Content") -> "Content":
        """Return this text followed by another; both made of streams."""
        return Content(
            np.concatenate([self.streams, other.streams]),
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self._starts(), other._starts()]),
        )

    def _starts(self) -> Int64:
        return np.zeros(len(self.streams), np.int64) if self.starts is None else self.starts


def text(stream: int, length: int, start: int = 0) -> Content:
    """Return one stretch of one stream."""
    begin = np.array([start], np.int64) if start else None
    return Content(np.array([stream], np.int64), np.array([length], np.int64), begin)
