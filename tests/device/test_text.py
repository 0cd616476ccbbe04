"""Streams of text against decoding everything at once."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pagedkv.device.text import TextStream
from pagedkv.errors import InvalidRequest, UnsupportedBackend

CORPUS = ["the cat sat on the mat. the dog sat too", "naïve café, 你好 world 👋🏽", "stop stopping"]
EOS = "<|end|>"


def _byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def _byte_fallback() -> Tokenizer:
    """As sentencepiece models do it: words marked by their leading space, bytes for the rest."""
    words = ["▁", "▁the", "▁cat", "s", "at", "▁on", "▁\ufffd"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    core.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return core


BYTE_LEVEL, BYTE_FALLBACK = _byte_level(), _byte_fallback()
# Id 0 is the special token; some ids lie beyond the vocabulary, as in padded models.
ANY_IDS = st.lists(st.integers(0, 310), max_size=80)
TEXTS = st.text(max_size=40) | st.text(alphabet="stop é👋🏽", max_size=40)


def splits(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


def streamed(stream: TextStream, pieces: list[list[int]]) -> list[str]:
    deltas = []
    for piece in pieces:
        deltas.append(stream.push(piece))
        assert stream.text == "".join(deltas)
    deltas.append(stream.finish())
    assert stream.text == "".join(deltas)
    return deltas


@given(TEXTS, st.lists(st.integers(0, 1000), max_size=6))
def test_text_in_any_pieces_is_the_text(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    stream = TextStream(BYTE_LEVEL)
    deltas = streamed(stream, splits(ids, cuts))
    assert stream.text == BYTE_LEVEL.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@given(ANY_IDS, st.lists(st.integers(0, 1000), max_size=6))
def test_any_ids_at_all_decode_as_at_once(ids: list[int], cuts: list[int]) -> None:
    stream = TextStream(BYTE_LEVEL)
    streamed(stream, splits(ids, cuts))
    assert stream.text == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@given(
    st.text(alphabet="the cat on s é你\n", max_size=40), st.lists(st.integers(0, 999), max_size=4)
)
def test_byte_fallback_text_is_the_text(text: str, cuts: list[int]) -> None:
    ids = BYTE_FALLBACK.encode(text.replace(" ", "▁")).ids
    stream = TextStream(BYTE_FALLBACK)
    streamed(stream, splits(ids, cuts))
    assert stream.text == BYTE_FALLBACK.decode(ids)


@given(st.lists(st.integers(0, 263), max_size=120))
def test_byte_fallback_survives_any_bytes(ids: list[int]) -> None:
    stream = TextStream(BYTE_FALLBACK)
    streamed(stream, [[i] for i in ids])
    whole = BYTE_FALLBACK.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert stream.text == whole


@pytest.mark.parametrize("core", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
def test_bytes_that_never_become_text_do_not_hold_back_what_follows(core: Tokenizer) -> None:
    bad = next(i for i in range(1, 257) if core.decode([i, i]) == "\ufffd\ufffd")
    follow = core.encode("at").ids * 30
    stream = TextStream(core)
    stream.push([bad] * 500)
    assert len(stream.text) > 490
    stream.push(follow)
    assert stream.text.count("at") > 27
    assert len(stream._pending) < 8
    stream.finish()
    assert stream.text == "\ufffd" * 500 + "at" * 30


def test_characters_behind_an_invalid_byte_are_whole() -> None:
    ids = [0xFF, 0xE4, *"你好吗世界和平万岁".encode()]
    stream = TextStream(BYTE_FALLBACK)
    stream.push(ids * 3)
    stream.finish()
    assert stream.text == "\ufffd\ufffd你好吗世界和平万岁" * 3


def test_half_a_character_is_held() -> None:
    first, *middle, last = BYTE_LEVEL.encode("🜲").ids
    stream = TextStream(BYTE_LEVEL)
    assert middle
    assert stream.push([first, *middle]) == ""
    assert stream.push([last]) == "🜲"
    assert stream.push([first]) == ""
    assert stream.finish() == "\ufffd"


def slow_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Read one character after the other and stop at the first stop string that is complete."""
    for end in range(len(text) + 1):
        done = [s for s in stop if text[:end].endswith(s)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


STOPS = st.lists(st.text(alphabet="stopé👋🏽 ", min_size=1, max_size=4), max_size=3).map(tuple)


@given(TEXTS, STOPS, st.lists(st.integers(0, 1000), max_size=6))
def test_stops_where_reading_stops(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    stream = TextStream(BYTE_LEVEL, stop)
    deltas = streamed(stream, splits(BYTE_LEVEL.encode(text).ids, cuts))
    shown, stopped = slow_stop(text, stop)
    assert (stream.text, stream.stopped) == (shown, stopped)
    # What was released before the end was never taken back, so it was never a stop's beginning.
    assert shown.startswith("".join(deltas[:-1]))


@given(TEXTS, STOPS)
def test_holds_back_no_more_than_it_must(text: str, stop: tuple[str, ...]) -> None:
    assume(slow_stop(text, stop)[1] is None)
    stream = TextStream(BYTE_LEVEL, stop)
    stream.push(BYTE_LEVEL.encode(text).ids)
    held = text[len(stream.text) :]
    assert held.rstrip("\ufffd") == "" or any(s.startswith(held.rstrip("\ufffd")) for s in stop)


@given(TEXTS, STOPS, st.integers(0, 12))
def test_no_stop_counts_that_is_complete_too_early(
    text: str, stop: tuple[str, ...], n: int
) -> None:
    """Read on from what the first n tokens gave, and look for what ends behind that."""
    ids = BYTE_LEVEL.encode(text).ids
    early = TextStream(BYTE_LEVEL)
    early.push(ids[:n])
    heard = len(text) if n >= len(ids) else len(early.text)
    want: tuple[str, str | None] = text, None
    for end in range(heard + 1, len(text) + 1):
        if done := [s for s in stop if text[:end].endswith(s)]:
            longest = max(done, key=len)
            want = text[: end - len(longest)], longest
            break
    stream = TextStream(BYTE_LEVEL, stop, min_tokens=n)
    for token in ids:
        stream.push([token])
    stream.finish()
    assert (stream.text, stream.stopped) == want


def test_a_stop_too_early_is_none_later_either() -> None:
    """It is held, as the beginning of a longer one that never comes."""
    stream = TextStream(BYTE_LEVEL, ["ab", "xaby"], min_tokens=3)
    for character in "xabz":
        stream.push(BYTE_LEVEL.encode(character).ids)
    stream.finish()
    assert (stream.text, stream.stopped) == ("xabz", None)


def test_a_stop_string_over_many_tokens() -> None:
    ids = BYTE_LEVEL.encode("one stopping xyz stop zyx").ids
    stream = TextStream(BYTE_LEVEL, ["stop z", "zzz"])
    for token_id in ids:
        stream.push([token_id])
        assert "stop z" not in stream.text
    assert stream.stopped == "stop z"
    assert stream.text == "one stopping xyz "
    assert stream.push(ids) == stream.finish() == ""


def test_the_stop_string_that_is_complete_first_counts() -> None:
    ids = BYTE_LEVEL.encode(" stop").ids
    assert len(ids) == 1
    for stop, text, stopped in ((["top", "o"], " st", "o"), (["o", "to"], " s", "to")):
        stream = TextStream(BYTE_LEVEL, stop)
        assert stream.push(ids) == text
        assert stream.stopped == stopped


def test_what_is_held_keeps_its_leading_space() -> None:
    ids = [BYTE_FALLBACK.token_to_id(word) for word in ("▁the", "▁\ufffd")]
    stream = TextStream(BYTE_FALLBACK)
    assert stream.push(ids) == "the"
    assert stream.finish() == " \ufffd"


def test_the_beginning_of_a_stop_string_comes_out_in_the_end() -> None:
    stream = TextStream(BYTE_LEVEL, ["END."])
    assert stream.push(BYTE_LEVEL.encode("the EN").ids) == "the "
    assert stream.finish() == "EN"
    assert stream.stopped is None


def test_a_stop_string_that_only_the_end_completes() -> None:
    half = BYTE_LEVEL.encode("🜲").ids[:1]
    stream = TextStream(BYTE_LEVEL, ["\ufffd"])
    assert stream.push([*BYTE_LEVEL.encode("a").ids, *half]) == "a"
    assert stream.finish() == ""
    assert (stream.text, stream.stopped) == ("a", "\ufffd")


def test_special_hidden_and_impossible_ids_are_not_shown() -> None:
    cat, sat = (BYTE_LEVEL.encode(word).ids for word in (" cat", " sat"))
    eos = BYTE_LEVEL.token_to_id(EOS)
    stream = TextStream(BYTE_LEVEL, hidden={sat[0]})
    ids = np.array([eos, *cat, -1, 5000, sat[0], eos], np.int32)
    stream.push(ids)
    stream.finish()
    assert stream.text == BYTE_LEVEL.decode([*cat])
    many = TextStream(BYTE_LEVEL)
    many.push([eos] * 10_000)
    assert many._pending == []


def test_takes_a_transformers_tokenizer() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL, eos_token=EOS)
    ids = [*BYTE_LEVEL.encode("the café 👋🏽").ids, tokenizer.eos_token_id]
    stream = TextStream(tokenizer)
    stream.push(ids)
    stream.finish()
    assert stream.text == tokenizer.decode(ids, skip_special_tokens=True) == "the café 👋🏽"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert stream.push([1, 2, 3]) == stream.finish() == stream.text == ""
    with pytest.raises(InvalidRequest, match="without a tokenizer"):
        TextStream(None, ["x"])


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UnsupportedBackend, match="fast tokenizer"):
        TextStream(object())
    with pytest.raises(InvalidRequest, match="empty stop"):
        TextStream(BYTE_LEVEL, [""])
