"""Tokens to text as they come, and the strings that end it."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pagedkv.errors import InvalidRequest, UnsupportedBackend

__all__ = ["TextStream"]

# A character is at most 4 bytes: no more tokens than these can be one that is not whole yet.
_UNFINISHED = 3


class TextStream:
    """The text of one sequence, released as far as nothing that follows can change it.

    Held back are bytes that are not a whole character yet, and text that may turn out to be the
    beginning of a stop string. The pieces given out add up to `text`; without a stop string that
    is what the tokenizer decodes all tokens to, special tokens left out, whatever the pushes.
    (Bytes that are no text are U+FFFD either way, though not always equally many: a tokenizer
    with byte fallback replaces the valid neighbours of an invalid byte too.)

    Decoding is done by the tokenizers library's ``DecodeStream``.

    Args:
        tokenizer: A transformers fast tokenizer or a ``tokenizers.Tokenizer``. None if there is no
            text to be had: then `text` stays empty.
        stop: Strings that end the text and are not part of it. The one that is complete first
            counts; of those complete at the same character, the longest.
        hidden: Ids that are not shown, beside the tokenizer's special tokens: the model's
            end-of-sequence tokens.
        min_tokens: What is complete before more tokens than these were pushed counts as no stop.

    Attributes:
        stopped: The stop string that ended it, or None.

    Raises:
        UnsupportedBackend: The tokenizer is a slow one, written in Python.
        InvalidRequest: There are stop strings and no tokenizer to find them with, or one is empty.

    Cost:
        About 3 microseconds a token, 20 with stop strings; memory for the text itself.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        hidden: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._released: list[str] = []
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._core = _core(tokenizer)
        _check_stop(self._stop, self._core)
        self._hidden = frozenset(hidden) | _special_ids(self._core)
        self._held = ""
        # No stop counts up to so many tokens, nor in so much of what is held.
        self._min_tokens, self._num_pushed, self._unheard = min_tokens, 0, 0
        self._stream = DecodeStream(skip_special_tokens=True)
        # Mirrors what the stream remembers: tokens that became text last, and tokens since then.
        self._shown: list[int] = []
        self._pending: list[int] = []

    @property
    def text(self) -> str:
        """All that was released."""
        self._released = ["".join(self._released)]
        return self._released[0]

    def push(self, token_ids: Iterable[int]) -> str:
        """Take further tokens and return the text they release.

        After a stop string, and after `finish`, everything is ignored. So are ids below 0 and
        beyond the tokenizer's vocabulary: models are often padded to more.
        """
        before = len(self._released)
        for token_id in token_ids:
            if self.stopped is not None or self._core is None:
                break
            self._num_pushed += 1
            if token_id >= 0 and token_id not in self._hidden:
                self._release(self._decoded(self._core, int(token_id)))
        return "".join(self._released[before:])

    def finish(self) -> str:
        """Release what was held back, and return it: no token follows."""
        before = len(self._released)
        if self._core is not None and self.stopped is None:
            self._release(self._rest(self._core, self._pending), last=True)
        self._core = None
        return "".join(self._released[before:])

    def _decoded(self, core: Tokenizer, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            piece = self._stream.step(core, token_id)
        except Exception as error:  # the library raises nothing narrower
            if "Invalid prefix" not in str(error):
                raise
            # What was shown already would decode otherwise with this token behind it.
            return self._restart(core, len(self._pending))
        if piece is not None:
            self._shown, self._pending = self._pending, []
            return piece
        count = _settled(core, self._pending) if len(self._pending) > _UNFINISHED else 0
        return self._restart(core, count) if count else ""

    def _restart(self, core: Tokenizer, count: int) -> str:
        """Return the text of the first `count` pending tokens; a new stream takes the others."""
        piece, later = self._rest(core, self._pending[:count]), self._pending[count:]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._shown, self._pending = [], []
        return piece + "".join(self._decoded(core, token_id) for token_id in later)

    def _rest(self, core: Tokenizer, pending: list[int]) -> str:
        """Return the text of pending tokens behind those that were shown."""
        if not pending:
            return ""
        shown = core.decode(self._shown, skip_special_tokens=True)
        both = core.decode(self._shown + pending, skip_special_tokens=True)
        if both.startswith(shown):
            return both[len(shown) :]
        return core.decode(pending, skip_special_tokens=True)

    def _release(self, piece: str, *, last: bool = False) -> None:
        if not self._stop or not (piece or last):
            self._released.append(piece)
            return
        self._held += piece
        if self._num_pushed <= self._min_tokens:
            self._unheard = len(self._held)
        found = _first_stop(self._held, self._stop, self._unheard)
        if found is not None:
            keep, self.stopped = found
            last = True
        else:
            keep = len(self._held) - (0 if last else _may_begin(self._held, self._stop))
        self._released.append(self._held[:keep])
        self._held = "" if last else self._held[keep:]
        self._unheard = max(0, self._unheard - keep)


def _core(tokenizer: Any) -> Tokenizer | None:
    core = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if core is not None and not isinstance(core, Tokenizer):
        raise UnsupportedBackend(
            f"{type(tokenizer).__name__} has no backend of the tokenizers library",
            where="tokenizer",
            remedy="load a fast tokenizer (one with a tokenizer.json)",
        )
    return core


def _check_stop(stop: tuple[str, ...], core: Tokenizer | None) -> None:
    if "" in stop:
        raise InvalidRequest(
            "an empty stop string", where="sampling.stop", remedy="give strings with text"
        )
    if stop and core is None:
        raise InvalidRequest(
            "stop strings without a tokenizer",
            where="sampling.stop",
            remedy="load the model with its tokenizer, or give stop_token_ids",
        )


def _special_ids(core: Tokenizer | None) -> frozenset[int]:
    added = core.get_added_tokens_decoder() if core is not None else {}
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _settled(core: Tokenizer, pending: list[int]) -> int:
    """Return how many of the tokens that wait for a character no later one can change, 0 if none.

    The stream waits while its text ends in U+FFFD. That is an unfinished character at first; with
    more tokens it is bytes that will never be one, which would hold back what follows for ever.
    """
    for count in range(len(pending) - 1, 0, -1):
        if _begins_whole(core, pending[count:]):
            return count
    whole = core.decode(pending)
    for count in range(len(pending) - _UNFINISHED, 0, -1):
        if core.decode(pending[:count]) + core.decode(pending[count:]) == whole:
            return count
    return 0


def _begins_whole(core: Tokenizer, token_ids: list[int]) -> bool:
    """Whether a whole character begins with these tokens, so that no earlier byte can join them."""
    texts = (core.decode(token_ids[:n]) for n in range(1, min(4, len(token_ids)) + 1))
    return any(text and not text.startswith("\ufffd") for text in texts)


def _first_stop(text: str, stop: tuple[str, ...], unheard: int) -> tuple[int, str] | None:
    """Return where the stop string begins that ends first behind what is unheard, and it."""
    places = ((text.find(s, max(0, unheard + 1 - len(s))), s) for s in stop)
    found = [(at + len(s), at, s) for at, s in places if at >= 0]
    if not found:
        return None
    _, at, first = min(found)
    return at, first


def _may_begin(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest end of the text that a stop string begins with."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    ends = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop))
    return next(ends, 0)
