"""What an evaluation reads: stretches of a text, and which of their tokens count."""

import gzip
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from pagedkv.errors import ConfigError

__all__ = ["Passage", "Text", "copy_passages", "load_text", "passkey_passages", "plain_passages"]

BUILT_IN = "moby_dick_1_2.txt"
Encode = Callable[[str], list[int]]

# Mohtashami and Jaggi 2023, in as few words as a small model needs.
_HIDE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_ASK = "\n\nWhat is the pass key? The pass key is"
_DIGITS = 5


class Passage(Struct, frozen=True, kw_only=True):
    """Tokens to read.

    Attributes:
        token_ids: All of them.
        start: The first that counts; those before it are context.
        depth: Where the key is hidden, for a passkey.
    """

    token_ids: list[int]
    start: int = 1
    depth: float | None = None


class Text(Struct, frozen=True, kw_only=True):
    """A text as tokens.

    Attributes:
        name: Its file's name.
        sha256: Of its bytes as read, unpacked.
    """

    name: str
    sha256: str
    token_ids: list[int]

    def windows(self, count: int, length: int, *, seed: int, offset: int | None) -> list[list[int]]:
        """Return stretches of the text, from one place after another or wherever the seed says.

        Raises:
            ConfigError: The text is too short, or a number is out of range.
        """
        if count < 1 or length < 2:
            flag, value, least = ("--num-samples", count, 1) if count < 1 else ("length", length, 2)
            raise ConfigError(f"it is {value}", where=flag, remedy=f"give at least {least}")
        span = length * count if offset is not None else length
        last = len(self.token_ids) - span
        if last < (offset or 0) or (offset or 0) < 0:
            raise ConfigError(
                f"{span} tokens from token {offset or 0} are asked for and the text has "
                f"{len(self.token_ids)}",
                where=self.name,
                remedy="give a longer --text or fewer tokens",
            )
        if offset is not None:
            starts = [offset + i * length for i in range(count)]
        else:
            starts = np.random.default_rng(seed).integers(0, last + 1, count).tolist()
        return [self.token_ids[start : start + length] for start in starts]


def load_text(path: str | None, encode: Encode) -> Text:
    """Read a text file, the built-in one if no path is given.

    Raises:
        ConfigError: It cannot be read, or is no UTF-8 text.
    """
    name = path or BUILT_IN
    try:
        if path is None:
            data = files("pagedkv.cli").joinpath("texts", BUILT_IN).read_bytes()
        else:
            data = Path(path).read_bytes()
            data = gzip.decompress(data) if path.endswith(".gz") else data
        token_ids = encode(data.decode())
    except (OSError, EOFError, UnicodeDecodeError) as fault:
        raise ConfigError(
            f"it cannot be read: {fault}", where=name, remedy="give a UTF-8 text, .gz or not"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    return Text(name=Path(name).name, sha256=digest, token_ids=token_ids)


def plain_passages(windows: Sequence[list[int]]) -> list[Passage]:
    """Every token counts but the first, which nothing predicts."""
    return [Passage(token_ids=window) for window in windows]


def copy_passages(windows: Sequence[list[int]], filler: int, source: int) -> list[Passage]:
    """Filler, source, filler, and the source again, which is what counts.

    Args:
        windows: Of ``2 * filler + source`` tokens.
    """
    return [
        Passage(token_ids=window + window[filler : filler + source], start=len(window))
        for window in windows
    ]


def passkey_passages(
    windows: Sequence[list[int]],
    length: int,
    depths: Sequence[float],
    encode: Encode,
    *,
    seed: int,
) -> list[Passage]:
    """A key hidden at every depth of every window, a question, and its answer, which counts.

    Args:
        windows: Of at least ``length`` tokens.
        length: Tokens of a passage in all.

    Raises:
        ConfigError: The length leaves no text, or a depth is not from 0 to 1.
    """
    rng = np.random.default_rng(seed)
    passages = []
    for window in windows:
        for depth in depths:
            if not 0 <= depth <= 1:
                raise ConfigError(f"{depth} is a depth", where="--depths", remedy="give 0 to 1")
            key = str(rng.integers(10 ** (_DIGITS - 1), 10**_DIGITS))
            hidden, asked = encode(_HIDE.format(key=key)), encode(_ASK)
            answer = encode(" " + key)
            room = length - len(hidden) - len(asked) - len(answer)
            if room < 1:
                raise ConfigError(
                    f"{length} tokens leave no room for text around the key",
                    where="--num-tokens",
                    remedy=f"give more than {length - room}",
                )
            at = round(depth * room)
            before = window[:at] + hidden + window[at:room] + asked
            passages.append(Passage(token_ids=before + answer, start=len(before), depth=depth))
    return passages


def encoder(tokenizer: Any) -> Encode:
    """Return what turns text into ids, without the special tokens that a prompt begins with."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode
