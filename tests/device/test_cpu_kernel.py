"""What the kernel's parts promise apart from attention: the cut, the threads, the import."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from numba import types
from numba.core.caching import CacheImpl

from pagedkv.device.cpu import call, kernel, layout, native
from pagedkv.device.cpu.work import Shape, cut
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.store import KVStore
from pagedkv.errors import UnsupportedBackend
from tests.device.eviction_oracle import build_model


def shape(**changes: int) -> Shape:
    usual = Shape(kv_heads=3, group=3, head_dim=64, block_size=16, width=64, window=0, causal=True)
    return replace(usual, **changes)


def items_of(rows: list[tuple[int, int]], what: Shape) -> np.ndarray:
    queries, resident = np.array(rows, np.int64).T
    starts = np.concatenate([[0], np.cumsum(queries)])
    return cut(starts, resident, resident - queries + 1, what).items


@pytest.mark.parametrize("rows", [[(1, 5)], [(1, 1000), (200, 300), (0, 9), (7, 700), (1, 0)]])
def test_the_cut_covers_every_key_once(rows: list[tuple[int, int]]) -> None:
    """Per (query, KV head): spans that neither overlap nor leave a gap, on block boundaries."""
    what = shape()
    starts = np.concatenate([[0], np.cumsum([q for q, _ in rows])])
    reached = np.zeros((starts[-1], what.kv_heads), np.int64)
    entries = np.zeros((starts[-1], what.kv_heads), np.int64)
    for item in items_of(rows, what):
        first, count = item[layout.FIRST_QUERY], item[layout.NUM_QUERIES]
        heads = slice(item[layout.HEAD_LOW], item[layout.HEAD_HIGH])
        low, high = item[layout.KEY_LOW], item[layout.KEY_HIGH]
        assert low % what.block_size == 0
        reached[first : first + count, heads] += high - low
        cleared = item[layout.CLEAR_HIGH] - item[layout.CLEAR_LOW]
        entries[first : first + count, heads] += cleared
    for b, (_, resident) in enumerate(rows):
        mine = reached[starts[b] : starts[b + 1]]
        assert (mine[-1:] == resident).all()
        assert (mine <= resident).all()
    assert (entries == what.width).all()


def test_the_cut_of_a_sequence_ignores_the_others() -> None:
    what = shape()
    places = ("ROW", "FIRST_QUERY", "TILE_ID", "PARTIAL_AT")
    of_batch = [getattr(layout, name) for name in places]
    of_sequence = np.setdiff1d(np.arange(layout.NUM_FIELDS), of_batch)
    alone = items_of([(1, 2000)], what)
    among = items_of([(50, 700), (1, 2000), (1, 3)], what)
    among = among[among[:, layout.ROW] == 1]
    order = np.argsort(alone[:, layout.SPAN]), np.argsort(among[:, layout.SPAN])
    assert len(alone) > 1
    assert np.array_equal(alone[order[0]][:, of_sequence], among[order[1]][:, of_sequence])


def test_one_long_row_is_shared_between_threads() -> None:
    assert len(items_of([(1, 32_768)], shape(width=2048))) >= 16


@pytest.mark.parametrize("size", [1, 16, 48, 200])
def test_spans_of_decode_are_whole_tiles(size: int) -> None:
    """Of whole blocks; but the last, and what is shorter than a tile."""
    tile = max(layout.TILE // size, 1) * size
    for resident in (1, tile, tile + 1, 520, 1000, 5000):
        items = items_of([(1, resident)], shape(block_size=size, width=5000))
        items = items[np.argsort(items[:, layout.SPAN])]
        lengths = items[:, layout.KEY_HIGH] - items[:, layout.KEY_LOW]
        assert (lengths[:-1] % tile == 0).all()
        assert lengths.sum() == resident


@pytest.mark.parametrize("queries", [16, 128, 129, 500])
def test_tiles_of_a_prompt_are_of_one_size(queries: int) -> None:
    """But for one query; and few enough that each reads its keys for many rows."""
    items = items_of([(queries, 900)], shape(width=100))
    counts = {int(item[layout.FIRST_QUERY]): int(item[layout.NUM_QUERIES]) for item in items}
    assert sum(counts.values()) == queries
    assert max(counts.values()) - min(counts.values()) < len(counts)
    assert len(counts) == -(-queries * shape().group // 384)


@pytest.mark.parametrize("rows", [[(1, 32_768)], [(1, 500)] * 77, [(1, 1)], [(300, 900), (1, 9)]])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_runs_of_items_are_all_of_them_and_get_shorter(
    rows: list[tuple[int, int]], threads: int
) -> None:
    queries, resident = np.array(rows, np.int64).T
    starts = np.concatenate([[0], np.cumsum(queries)])
    work = cut(starts, resident, resident - queries + 1, shape(width=2048))
    runs = work.runs(threads)
    sizes = np.diff(runs)
    assert (runs[0], runs[-1]) == (0, len(work.items))
    assert (np.diff(sizes) <= 0).all()
    assert sizes[0] == 1 if work.any_wide else sizes[0] <= max(1, len(work.items) / threads / 2)
    assert sizes[-1] == 1


def test_a_window_skips_what_is_out_of_sight() -> None:
    items = items_of([(1, 1000)], shape(window=100))
    assert items[:, layout.KEY_LOW].min() == 896  # the block that holds key 900


def test_plain_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no OpenMP runtime is found, Python's threads run the same worker."""
    from pagedkv.device.operators import PagedBias, paged_attention

    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(40, 16, 2, 32, generator=generator) for _ in range(2))
    query = torch.randn(2, 4, 32, generator=generator)
    table = np.arange(40, dtype=np.int32).reshape(2, 20)

    def run() -> torch.Tensor:
        bias = PagedBias.build(np.array([0, 1, 2]), np.array([320, 77]), table, 16)
        return paged_attention(query, key, value, bias)

    want = run()
    monkeypatch.setattr(kernel, "_openmp", lambda: None)
    assert torch.equal(run(), want)


@pytest.mark.parametrize("size", [4, 16, 24, 32])
@pytest.mark.parametrize("window", [0, 37])
def test_decode_reads_each_visible_key_once_and_no_other(window: int, size: int) -> None:
    """Every length up to beyond a tile: its four quarters end and begin in every way there is.

    What is out of sight is far off, and what was never written is NaN.
    """
    from pagedkv.device.operators import PagedBias, paged_attention

    lengths = np.arange(1, layout.TILE + 40)
    generator = torch.Generator().manual_seed(0)
    width, heads, dim = -(-int(lengths[-1]) // size), 2, 32
    key, value = (torch.full((len(lengths) * width, size, heads, dim), torch.nan) for _ in range(2))
    table = np.random.default_rng(0).permutation(len(key)).astype(np.int32).reshape(-1, width)
    query = torch.randn(len(lengths), 3 * heads, dim, generator=generator)
    want = torch.empty_like(query)
    by_block = torch.full((len(lengths), 3 * heads, width * size), -torch.inf)
    for row, n in enumerate(lengths):
        k, v = torch.randn(2, n, heads, dim, generator=generator)
        low = max(0, int(n) - window) if window else 0
        v[:low] = 1e6
        scores = torch.einsum("hgd,khd->hgk", query[row].view(heads, 3, dim), k) / dim**0.5
        by_block[row, :, low:n] = scores[..., low:].flatten(0, 1)
        weights = scores[..., low:].softmax(-1)
        want[row] = torch.einsum("hgk,khd->hgd", weights, v[low:]).reshape(-1, dim)
        slots = torch.from_numpy(table[row].astype(np.int64)[:, None] * size + np.arange(size))
        for pool, mine in ((key, k), (value, v)):
            pool.view(-1, heads, dim)[slots.ravel()[:n]] = mine
    starts = np.arange(len(lengths) + 1)
    bias = PagedBias.build(starts, lengths, table, size, window=window, want_block_lse=True)
    got = paged_attention(query, key, value, bias)
    by_block = by_block.unflatten(2, (width, size)).logsumexp(-1)
    torch.testing.assert_close(bias.block_lse, by_block, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_failing_to_compile_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_options: object) -> object:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(native, "cfunc", broken)
    with pytest.raises(UnsupportedBackend, match=r"pagedkv_cpu was tried .*no such instruction"):
        kernel._worker.__wrapped__("float32")


SMALL = types.void(types.int64)


def small(_address: int) -> None:
    """So little that compiling it takes no time."""


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_what_is_cached_is_known_without_compiling(empty_cache: Path) -> None:
    assert not native.on_disk(SMALL, small)
    assert not list(empty_cache.rglob("*.nbc"))
    native.compile_native(SMALL, small, "a function")
    assert native.on_disk(SMALL, small)
    assert not native.on_disk(types.void(types.int32), small)


def test_a_damaged_cache_costs_compiling_and_is_said(empty_cache: Path) -> None:
    native.compile_native(SMALL, small, "a function")
    (index,) = empty_cache.rglob("*.nbi")
    index.write_bytes(b"")
    assert not native.on_disk(SMALL, small)
    with pytest.warns(RuntimeWarning, match=r"a function was compiled without .*NUMBA_CACHE_DIR"):
        assert native.compile_native(SMALL, small, "a function").address


def test_nowhere_to_cache_costs_compiling_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert not native.on_disk(SMALL, small)
    with pytest.warns(RuntimeWarning, match="cannot cache function"):
        assert native.compile_native(SMALL, small, "a function").address


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "float32"), (torch.int8, "int8")], ids=["fp32", "int8"]
)
def test_the_kernel_is_compiled_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(call, "warmup", compiled.extend)
    model = build_model("llama")
    TorchExecutor(model, KVStore(model.geometry, 4, 4, dtype=dtype))
    assert compiled == [kind]


def test_fp16_needs_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "HAS_HALF", False)
    with pytest.raises(UnsupportedBackend, match="converts fp16"):
        kernel._worker.__wrapped__("float16")


def test_importing_compiles_nothing_and_warns_of_nothing() -> None:
    """Not even numba is loaded, and xformers' log stays quiet."""
    code = (
        "import sys, pagedkv.device.operators;"
        "assert 'numba' not in sys.modules and 'pagedkv.device.cpu.kernel' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


EIGHT_LANES = """
import llvmlite.binding as llvm
features = dict(llvm.get_host_cpu_features())
llvm.get_host_cpu_features = lambda: {k: v for k, v in features.items() if "512" not in k}
from pagedkv.device.cpu import simd
assert simd.LANES == 8
from tests.device.test_operators import agree, make
for dim in (20, 64):
    agree(make(heads=9, kv_heads=3, dim=dim))
    agree(make(heads=4, kv_heads=1, dim=dim), window=50)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere 8 lanes are what there is")
def test_eight_lanes_as_on_a_processor_without_avx512() -> None:
    """Compiles a kernel of its own, once: numba caches by the processor it is told of."""
    told = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_LANES],
        env=os.environ | told,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
