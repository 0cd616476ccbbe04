"""Attention over runs of turned queries: native code gives what torch gives, in any batch."""

import numpy as np
import pytest
import torch

from pagedkv.device import turned
from pagedkv.device.cpu import partials
from pagedkv.device.operators import CpuPagedOp
from pagedkv.device.turned import TurnedBias
from pagedkv.device.turns import Turns

SIZE, HEADS, KV_HEADS, DIM, WIDTH, BLOCKS = 8, 6, 2, 20, 7, 64
FREQUENCIES = tuple(10.0 ** -np.arange(6))  # the last 8 elements of a head are not rotated


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(seed, queries):
    """Tables and turns of sequences with 1 to 3 runs each."""
    rng = np.random.default_rng(seed)
    resident = rng.integers(np.maximum(queries, 1), WIDTH * SIZE + 1).astype(np.int32)
    tables = rng.permutation(BLOCKS)[: WIDTH * len(queries)].reshape(-1, WIDTH).astype(np.int32)
    turns = np.sort(rng.integers(-3, 1, (len(queries), WIDTH)) // 2 * 37, axis=1)
    return resident, tables, turns.astype(np.int32)


def attended(queries, resident, tables, turns, query, interleaved=False):
    start = np.append(0, np.cumsum(queries)).astype(np.int32)
    angles = Turns(turns, FREQUENCIES, interleaved=interleaved)
    bias = TurnedBias(start, resident, tables, SIZE, angles, want_block_lse=True)
    keys, values = (noise(BLOCKS, SIZE, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    out = bias.attend(query, keys, values, 0.3, CpuPagedOp)
    return out, bias.lse, bias.block_lse


@pytest.mark.parametrize("queries", [[1] * 8, [1], [5, 1, 1, 8], [3]])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_native_code_turns_and_merges_as_torch_does(monkeypatch, queries, interleaved, seed):
    made = batch(seed, queries)
    query = noise(HEADS, sum(queries), DIM).transpose(0, 1)  # as a model hands it on
    ours = attended(queries, *made, query, interleaved)
    monkeypatch.setattr(turned, "_is_native", lambda query: False)
    theirs = attended(queries, *made, query, interleaved)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(ours[2].isinf(), theirs[2].isinf())


def test_a_sequence_gets_the_same_bits_in_any_batch():
    queries = [1] * 8
    resident, tables, turns = batch(0, queries)
    query = noise(8, HEADS, DIM)
    whole = attended(queries, resident, tables, turns, query)
    for i in range(8):
        one = slice(i, i + 1)
        alone = attended([1], resident[one], tables[one], turns[one], query[one])
        assert torch.equal(whole[0][one], alone[0])
        assert torch.equal(whole[1][:, one], alone[1])
        assert torch.equal(whole[2][one], alone[2])


@pytest.mark.parametrize("pairs", [1, 6, 8, 10, 32])
def test_turned_queries_have_the_bits_of_torch(pairs):
    angles = Turns(np.array([[0, 5, -70]], np.int32), tuple(10.0 ** -np.arange(pairs)))
    query = noise(4, 3, 2 * pairs + 3)[:, :2]
    token, row = np.array([3, 0, 0, 1, 2]), np.array([1, 0, 2, 2, 0])
    ours = partials.Turn(token, row, angles.cos, angles.sin)(query)
    asked = query.index_select(0, torch.from_numpy(token))
    assert torch.equal(ours, angles.apply(asked, torch.from_numpy(row)))


@pytest.mark.parametrize("split", [5, 3])
def test_pairs_that_weigh_nothing_and_numbers_that_are_not_stay_so(split):
    """Two queries: one of three pairs, one of two of which the second is NaN."""
    token = np.array([0, 1, 0, 1, 0])
    first, count = np.array([0, 0, 1, 2, 3]), np.array([1, 1, 2, 1, 1])
    out, lse = noise(5, 1, 9), torch.tensor([[0.5, 1.0, -torch.inf, torch.nan, 2.0]])
    entries = noise(5, 1, 2)
    cut = [slice(0, split), slice(split, 5)][: 1 + (split < 5)]
    answers = [(out[part], lse[:, part], entries[part]) for part in cut]
    whole, total, seen = partials.Merge(token, first, count, split, 2, 5)(answers)
    weights = torch.tensor([0.5, 2.0]).softmax(0)
    torch.testing.assert_close(whole[0], weights[0] * out[0] + weights[1] * out[4])
    torch.testing.assert_close(total[0, 0], torch.tensor([0.5, 2.0]).logsumexp(0))
    assert whole[1].isnan().all()
    assert total[0, 1].isnan()
    gap = torch.tensor([-torch.inf])
    expected = torch.cat([entries[0, 0, :1], entries[2, 0], entries[4, 0, :1], gap])
    assert torch.equal(seen[0, 0], expected)
