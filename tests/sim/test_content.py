"""Made-up tokens: equal where texts are equal, and never otherwise."""

import numpy as np

from pagedkv.config import LARGEST_INT32
from pagedkv.sim.content import Content, stream_ids, stream_tokens, text


def test_a_stretch_of_a_stream_is_the_same_wherever_it_is_quoted():
    whole = text(7, 100).token_ids()
    assert (text(7, 40, 30).token_ids() == whole[30:70]).all()
    joined = text(1, 10) + text(7, 40, 30) + text(7, 5)
    tokens = joined.token_ids()
    assert len(joined) == len(tokens) == 55
    assert (tokens[10:50] == whole[30:70]).all()
    assert (tokens[50:] == whole[:5]).all()


def test_generated_tokens_continue_a_stream_one_by_one():
    seeds = np.array([7, 8])
    drawn = [stream_tokens(seeds, np.array([at, at])) for at in range(6)]
    assert (np.stack(drawn)[:, 0] == text(7, 6).token_ids()).all()
    assert (np.stack(drawn)[:, 1] == text(8, 6).token_ids()).all()


def test_tokens_are_token_ids():
    tokens = text(3, 10_000).token_ids()
    assert tokens.dtype == np.int32
    assert tokens.min() >= 0
    assert tokens.max() < LARGEST_INT32


def test_no_two_of_a_million_streams_share_a_block():
    streams = stream_ids(1, np.arange(1_000_000))
    assert len(np.unique(streams)) == len(streams)
    first = np.stack([stream_tokens(streams, np.full(1, at)) for at in range(2)])
    pairs = first[0].astype(np.int64) << 31 | first[1]
    assert len(np.unique(pairs)) == len(streams)


def test_namespaces_are_apart():
    assert not np.intersect1d(stream_ids(1, np.arange(1000)), stream_ids(2, np.arange(1000))).size


def test_exact_tokens_are_kept():
    none = np.zeros(0, np.int64)
    content = Content(none, none, None, np.array([5, 6, 7], np.int32))
    assert content.token_ids().tolist() == [5, 6, 7]
    assert len(content) == 3
