"""Memory for keys and values: as torch's, wherever it comes from."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from pagedkv.device import memory

BIG = (3, 1 << 20)  # fp32: 12 MiB


@pytest.mark.parametrize("shape", [BIG, (3, 5), (2, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_it_is_a_tensor_like_any(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = memory.empty(shape, dtype)
    assert made.shape == shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert torch.equal(made.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_views_keep_the_memory_alive() -> None:
    view = memory.empty(BIG, torch.float32).fill_(2.0)[1]
    others = [memory.empty(BIG, torch.float32).fill_(1.0) for _ in range(4)]
    assert (view == 2).all()
    assert len(others) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages as Linux has them")
def test_large_tensors_lie_in_huge_pages_where_there_are_any() -> None:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("this system hands out no huge pages")
    made = memory.empty(BIG, torch.float32)
    assert made.data_ptr() % (2 << 20) == 0
    for area in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        low, high = (int(x, 16) for x in area.split(maxsplit=1)[0].split("-"))
        if low <= made.data_ptr() < high:
            assert re.search(r"VmFlags:.*\bhg\b", area)  # asked for; given when there are some
            return
    raise AssertionError("the tensor lies in no mapped area")


def test_a_system_without_them_gets_torchs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert memory.empty(BIG, torch.float32).fill_(1.0).sum() == 3 << 20


def test_no_room_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        memory.empty((1 << 62,), torch.int8)
