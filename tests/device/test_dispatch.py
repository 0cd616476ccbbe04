"""The table of operators: what serves which device, dtype, storage, block size and head size."""

from functools import partial
from itertools import product

import pytest
import torch

from pagedkv.device import dispatch
from pagedkv.device.dispatch import OPERATORS, choose_operator
from pagedkv.device.gathered import GatheredOp
from pagedkv.device.operators import CpuPagedOp
from pagedkv.device.splitk import SplitKPagedOp
from pagedkv.errors import UnsupportedBackend

FLOATS = ("float32", "float16", "bfloat16")
NARROW = FLOATS[1:]

# (device, what the model computes in, what keys are stored as, block size, head size): operator
EXPECTED = {
    **dict.fromkeys(
        product(["cpu"], FLOATS, [*FLOATS, "int8"], [1, 7, 16, 256], [1, 24, 64, 576]),
        "pagedkv_cpu",
    ),
    **dict.fromkeys(
        product(["cuda"], FLOATS, NARROW, [16, 48, 64, 256], [16, 64, 128, 256, 512]),
        "pagedkv_splitk",
    ),
    **dict.fromkeys(product(["cuda"], NARROW, ["int4"], [16, 64], [16, 512]), "pagedkv_splitk"),
    **dict.fromkeys(product(["cuda"], FLOATS, NARROW, [1, 7, 24], [64, 128]), "pagedkv_gathered"),
    **dict.fromkeys(product(["cuda"], FLOATS, NARROW, [16, 64], [8, 80, 96]), "pagedkv_gathered"),
    **dict.fromkeys(product(["cuda"], NARROW, ["int8"], [1, 16], [8, 64, 256]), "pagedkv_gathered"),
    **dict.fromkeys(product(["cuda"], NARROW, ["int4"], [7], [64]), "pagedkv_gathered"),
    # and what nothing serves
    **dict.fromkeys(product(["cpu"], FLOATS, ["int4", "float64"], [16], [64]), None),
    **dict.fromkeys(product(["cuda"], FLOATS, ["float32", "float64"], [16], [64]), None),
    **dict.fromkeys(product(["cuda"], NARROW, NARROW, [7], [512]), None),
    **dict.fromkeys(product(["cuda"], NARROW, NARROW, [16], [20, 576]), None),
    **dict.fromkeys(product(["cuda"], ["float32"], ["int4", "int8"], [16], [64]), None),
    **dict.fromkeys(product(["mps"], FLOATS, FLOATS, [16], [64]), None),
}


@pytest.mark.parametrize("wanted", [*sorted({entry.name for entry in OPERATORS}), None])
def test_the_table(wanted: str | None) -> None:
    for (device, dtype, stored, block_size, head_dim), name in EXPECTED.items():
        if name != wanted:
            continue
        choose = partial(
            choose_operator,
            device,
            getattr(torch, dtype),
            stored=getattr(torch, stored),
            block_size=block_size,
            head_dim=head_dim,
        )
        if name is None:
            with pytest.raises(UnsupportedBackend):
                choose()
        else:
            assert name == choose().NAME


def test_its_lines_are_all_reached() -> None:
    """Each is the one that serves some combination: none is hidden by those before it."""
    for entry in OPERATORS:
        dim = 64 if entry.head_dims is None else max(entry.head_dims & {64, 80})
        size = entry.block_size if entry.name != GatheredOp.NAME else 7
        operator = choose_operator(
            entry.device, entry.dtypes[-1], stored=entry.stored[-1], block_size=size, head_dim=dim
        )
        assert entry.name == operator.NAME
        assert issubclass(operator, CpuPagedOp | SplitKPagedOp | GatheredOp)


@pytest.mark.parametrize(("block_size", "tile"), [(16, 16), (32, 32), (48, 16), (64, 64)])
def test_blocks_are_read_in_tiles_that_fit(block_size: int, tile: int) -> None:
    operator = choose_operator("cuda:0", torch.float16, block_size=block_size)
    assert issubclass(operator, SplitKPagedOp)
    assert tile == operator.KERNEL.BLOCK_N


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "told"),
    [
        ("cpu", torch.float64, {}, r"pagedkv_cpu was tried and refused: dtype=float64 \(takes"),
        ("mps", torch.float32, {}, "no operator runs on device=mps .*cpu and cuda"),
        ("cuda", torch.float32, {}, r"pagedkv_splitk .*float32 .*; pagedkv_gathered .*float32"),
        ("cuda", torch.float16, {"block_size": 8, "head_dim": 512}, "block_size=8 .*head_dim=512"),
        ("cuda", torch.float16, {"head_dim": 20}, r"head_dim=20 \(takes 16, 32.*8, 16 \.\. 256\)"),
        ("cpu", torch.float32, {"stored": torch.int4}, "keys and values in int4 .*int8"),
    ],
)
def test_refusals_name_what_was_tried_and_why(
    device: str, dtype: torch.dtype, shape: dict[str, int], told: str
) -> None:
    with pytest.raises(UnsupportedBackend, match=told):
        choose_operator(device, dtype, **shape)  # type: ignore[arg-type]


def test_what_a_machine_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = dispatch.triton_splitk.FwOp
    monkeypatch.setattr(kernel, "is_available", classmethod(lambda cls: False))
    with pytest.raises(UnsupportedBackend, match=r"pagedkv_splitk .*install pagedkv\[gpu\]"):
        choose_operator("cuda", torch.float16, head_dim=512)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UnsupportedBackend, match=r"pagedkv_gathered .*7\.5 \(needs 8\.0\)"):
        choose_operator("cuda", torch.float16)
