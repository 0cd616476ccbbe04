"""Attention whose queries are turned block by block: in the kernel, in runs, and by definition."""

import numpy as np
import pytest
import torch

from pagedkv.device.operators import CpuPagedOp, PagedBias, PagedOp, ReferenceOp, paged_attention
from pagedkv.device.quantize import quantize
from pagedkv.device.turned import TurnedBias
from pagedkv.device.turns import Turns

SIZE, HEADS, KV_HEADS, DIM, WIDTH = 8, 6, 2, 20, 7
FREQUENCIES = (1.0, 0.5)
PAIRS = 6  # the last 8 elements of a head are not rotated


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Tables, turns and tensors of some sequences; whose own queries share a turn if `alike`."""

    def __init__(self, queries, seed=0, *, size=SIZE, width=WIDTH, heads=(HEADS, KV_HEADS), **how):
        rng = np.random.default_rng(seed)
        dim, pairs = how.get("dim", DIM), how.get("pairs", PAIRS)
        queries = np.array(queries)
        self.start = np.append(0, np.cumsum(queries)).astype(np.int32)
        self.resident = rng.integers(np.minimum(queries, width * size), width * size + 1)
        self.resident = self.resident.astype(np.int32)
        self.tables = rng.permutation(width * len(queries)).reshape(-1, width).astype(np.int32)
        turns = rng.integers(-3, 2, self.tables.shape) * 37
        if how.get("alike", False):
            for row, own in enumerate((self.resident - queries) // size):
                turns[row, own:] = turns[row, own]
        frequencies = tuple(10.0 ** -np.linspace(0, 4, pairs))
        interleaved = how.get("interleaved", False)
        self.turns = Turns(turns.astype(np.int32), frequencies, interleaved=interleaved)
        self.size = size
        self.query = noise(heads[0], int(queries.sum()), dim).transpose(0, 1)  # a model's strides
        self.keys, self.values = (
            noise(self.tables.size, size, heads[1], dim, seed=seed) for seed in (1, 2)
        )

    def attend(self, op: type[PagedOp], rows: slice = slice(None)):
        """Out, lse and block lse, the operator turning the queries; of some sequences."""
        start = self.start - self.start[rows.start or 0]
        start = start[rows.start : None if rows.stop is None else rows.stop + 1]
        turns = Turns.__new__(Turns)
        vars(turns).update(vars(self.turns), index=np.ascontiguousarray(self.turns.index[rows]))
        bias = PagedBias.build(
            start,
            self.resident[rows],
            self.tables[rows],
            self.size,
            turns=turns,
            want_block_lse=True,
        )
        first = int(self.start[rows.start or 0])
        query = self.query[first : first + int(start[-1])]
        out = paged_attention(query, self.keys, self.values, bias, 0.3, op)
        return out, bias.lse, bias.block_lse

    def attend_in_runs(self, op: type[PagedOp]):
        """The same from a call for each kind of run."""
        bias = TurnedBias(
            self.start, self.resident, self.tables, self.size, self.turns, want_block_lse=True
        )
        out = bias.attend(self.query, self.keys, self.values, 0.3, op)
        return out, bias.lse, bias.block_lse


def assert_alike(ours, theirs, tolerance=1e-5):
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[2].isinf(), theirs[2].isinf())


DECODE, MIXED, PROMPT = [1] * 8, [5, 1, 2, 48], [40]
SHAPES = [
    {},
    {"size": 16, "width": 20, "heads": (9, 3), "dim": 64, "pairs": 32},  # three heads at a time
    {"size": 1, "width": 300},  # a turn for each token, several tiles
    {"size": 200, "width": 3, "pairs": 10},  # blocks longer than a tile
    {"size": 200, "width": 3, "heads": (64, 16), "dim": 64, "pairs": 32},
    {"size": 4, "width": 50, "heads": (8, 1), "dim": 64, "pairs": 16},
    {"size": 16, "width": 9, "heads": (4, 4), "dim": 16, "pairs": 8},
]


@pytest.mark.parametrize("queries", [DECODE, [1], MIXED, PROMPT])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_turns_queries_before_each_block(queries, interleaved, shape):
    case = Case(queries, interleaved=interleaved, **shape)
    assert_alike(case.attend(CpuPagedOp), case.attend(ReferenceOp))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.int8])
def test_whatever_keys_are_stored_as(stored):
    case = Case(MIXED, dim=64, pairs=32)
    if stored == torch.int8:
        case.keys, case.values = quantize(case.keys), quantize(case.values)
    else:
        case.keys, case.values = case.keys.to(stored), case.values.to(stored)
    assert_alike(case.attend(CpuPagedOp), case.attend(ReferenceOp), 2e-5)


@pytest.mark.parametrize("queries", [DECODE, [1], MIXED, PROMPT])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_runs_attended_to_one_by_one_make_the_same_whole(queries, interleaved, seed):
    case = Case(queries, seed, interleaved=interleaved, alike=True)
    theirs = case.attend(ReferenceOp)
    assert_alike(case.attend_in_runs(CpuPagedOp), theirs)
    assert_alike(case.attend_in_runs(ReferenceOp), theirs)


@pytest.mark.parametrize("queries", [DECODE, MIXED])
def test_a_sequence_gets_the_same_bits_in_any_batch(queries):
    case = Case(queries)
    out, lse, entries = case.attend(CpuPagedOp)
    for i in range(len(queries)):
        tokens = slice(*case.start[i : i + 2].tolist())
        alone = case.attend(CpuPagedOp, slice(i, i + 1))
        assert torch.equal(out[tokens], alone[0])
        assert torch.equal(lse[:, tokens], alone[1])
        assert torch.equal(entries[tokens], alone[2])


def test_turning_by_nothing_changes_no_bit():
    case = Case(MIXED)
    case.turns = Turns(np.zeros_like(case.tables), FREQUENCIES)
    bias = PagedBias.build(case.start, case.resident, case.tables, case.size, want_block_lse=True)
    plain = paged_attention(case.query, case.keys, case.values, bias, 0.3, CpuPagedOp)
    out, lse, entries = case.attend(CpuPagedOp)
    assert torch.equal(out, plain)
    assert torch.equal(lse, bias.lse)
    assert torch.equal(entries, bias.block_lse)


@pytest.mark.parametrize("op", [CpuPagedOp, ReferenceOp])
def test_turns_of_other_tables_or_longer_heads_are_refused(op):
    case = Case(DECODE)
    case.turns = Turns(np.zeros_like(case.tables[:, :-1]), FREQUENCIES)
    with pytest.raises(
        ValueError, match=r"turns are for a block table of \(8, 6\), not for \(8, 7\)"
    ):
        case.attend(op)
    case.turns = Turns(case.turns.index, (1.0,) * 11)
    case.tables = case.tables[:, :-1]
    with pytest.raises(ValueError, match="22 elements are turned, of heads of 20"):
        case.attend(op)


def test_an_operator_that_turns_nothing_says_so():
    class Stiff(ReferenceOp):
        TURNS = False

    with pytest.raises(ValueError, match="it turns no queries: attend with a TurnedBias"):
        Case(DECODE).attend(Stiff)
