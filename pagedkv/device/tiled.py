"""Attention by xformers' own kernels for CUDA, behind the contract of ours: what they share.

A batch is cut into tiles (`tiles.py`), and those of one length are one launch: a decode step is a
single one. No kernel knows a block lse; that comes from one more launch, in which each pair of
query and block is a sequence of its own.

Without a GPU the same kernels run under Triton's interpreter, in `test_cuda_operators.py`.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from pagedkv.errors import UnsupportedBackend

from .bias import PagedBias, read
from .library import attn_bias as masks
from .operators import PagedOp, outputs, paged_attention, result
from .send import Send, sender
from .tiles import Tiles, pairs, tiles

__all__ = ["Launch", "TiledOp", "query_sequences"]


@dataclass(frozen=True)
class Launch:
    """Tiles on the device.

    Attributes:
        queries: int64 [N * each], which queries of the batch they are.
        num_real: Of those, from the first; the rest only round the number up.
        mask: What `TiledOp.mask` made of the tiles.
        entry: int64 [num_real] As in `Tiles`.
    """

    queries: torch.Tensor
    num_real: int
    mask: Any
    entry: torch.Tensor | None


class TiledOp(PagedOp):
    """A contract for subclasses: what a mask over tiles is, and how to launch a kernel with it."""

    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cuda"}
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = {torch.float16, torch.bfloat16}
    MOST_QUERIES: ClassVar[int]  # in a tile under a causal mask

    @classmethod
    @abstractmethod
    def mask(cls, cut: Tiles, block_size: int, send: Send) -> Any:
        """Put the tiles' lengths and tables where the kernel reads them."""

    @classmethod
    @abstractmethod
    def launch(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from the tiles' queries: out like `q`, lse [1, G, H, N * each].

        Args:
            q: [1, N * each, G, H, D]
            k: [1, slots, G, H, row], H of stride 0 if shared.
            v: Like `k`.
            mask: What `mask` returned.
            scale: Of the scores.
        """

    @classmethod
    def asked_in(cls, computed: torch.dtype, stored: torch.dtype) -> torch.dtype:
        """Return what queries are rounded to: as keys are stored, or as the model computes."""
        return computed if stored == torch.int32 else stored

    @classmethod
    def prepare(cls, bias: PagedBias, send: Send) -> None:
        """Cut the batch, once for all layers."""
        cls._cut(bias, bias.prepared, send)

    @classmethod
    def get_ready(cls, keys: torch.Tensor, computed: torch.dtype, heads: int, dim: int) -> None:
        """As in `PagedOp`, by a decode step of one query; other batches compile as they come."""
        send = sender(keys.device)
        bias = PagedBias.build(_ONE_QUERY, _ONE_KEY, _BLOCK_0, keys.shape[1], send=send)
        query = torch.zeros((1, heads, dim), dtype=computed, device=keys.device)
        with _typed(cls.NAME):
            paged_attention(query, keys, keys, bias, op=cls).cpu()  # which waits for it

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """Run attention; returns (out, Context(out, lse)).

        Raises:
            UnsupportedBackend: A kernel cannot be compiled or run.

        Cost: one launch for each length of tile; one more for block lse, which reads every block
        again for every query.
        """
        q, k, v = inp.get_qkv_in_bmghk()
        out, lse, block_lse = outputs(inp, q)
        prepared = getattr(inp.attn_bias, "prepared", {})
        if "tiles" not in prepared:
            cls._cut(inp.attn_bias, prepared, sender(q.device))
        for launch in prepared["tiles"]:
            partial, logs = cls._run(q, k, v, launch, inp.scale_float)
            real = launch.queries[: launch.num_real]
            out.index_copy_(1, real, partial)
            lse.index_copy_(1, real, logs)
        if block_lse is not None:
            launch = prepared["pairs"]
            _, logs = cls._run(q, k, v, launch, inp.scale_float)
            block_lse.fill_(-torch.inf)
            block_lse[launch.queries[: launch.num_real], :, launch.entry] = logs.t()
        return result(inp, out, lse, needs_gradient)

    @classmethod
    def _run(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: Launch, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One launch: fp32 out [1, N, G, H, D] and lse [G * H, N] of the N real queries."""
        _, _, groups, heads, dim = q.shape
        asked = q.index_select(1, launch.queries)
        with _typed(cls.NAME):  # a shape that comes for the first time is compiled now
            out, lse = cls.launch(asked, k, v, launch.mask, scale)
        out = out.reshape(1, -1, groups, heads, dim)[:, : launch.num_real].float()
        return out, lse.reshape(groups * heads, -1)[:, : launch.num_real].float()

    @classmethod
    def _cut(cls, bias: Any, prepared: dict[Any, Any], send: Send) -> None:
        batch = read(bias)

        def launch(cut: Tiles) -> Launch:
            entry = None if cut.entry is None else send(cut.entry)
            real = cut.num_real * cut.queries.shape[1]
            mask = cls.mask(cut, batch.block_size, send)
            return Launch(send(cut.queries.ravel()), real, mask, entry)

        prepared["tiles"] = [launch(cut) for cut in tiles(batch, cls.MOST_QUERIES)]
        if getattr(bias, "want_block_lse", False):
            prepared["pairs"] = launch(pairs(batch))


@contextmanager
def _typed(name: str) -> Iterator[None]:
    """Name the operator in whatever Triton, xformers and their compilers raise."""
    try:
        yield
    except UnsupportedBackend:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise UnsupportedBackend(
            f"{name} was tried and refused: its kernel cannot be compiled or run "
            f"({text.splitlines()[0]:.200})",
            where="device.operators",
            remedy="use device cpu, or see `pagedkv env` for what is installed",
        ) from error


def query_sequences(cut: Tiles, send: Send) -> Any:
    """Return xformers' description of the tiles' queries."""
    number, each = cut.queries.shape
    starts = np.arange(number + 1, dtype=np.int32) * np.int32(each)
    return masks._SeqLenInfo(
        seqstart=send(starts), max_seqlen=each, min_seqlen=each, seqstart_py=starts
    )


_ONE_QUERY = np.array([0, 1], np.int32)
_ONE_KEY = np.ones(1, np.int32)
_BLOCK_0 = np.zeros((1, 1), np.int32)
