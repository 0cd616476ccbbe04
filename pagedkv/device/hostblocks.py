"""Blocks in host memory, where preempted sequences are swapped to."""

import torch
from torch import Tensor

__all__ = ["HostBlocks"]


class HostBlocks:
    """Room for whole blocks beside a pool; on a GPU pinned, and reached by a stream of its own.

    A block's layers lie one after another, so moving one is a single copy each for keys and for
    values. Blocks that leave are gathered by the stream that computes, which then goes on while
    they are on their way; it waits for those that come back. Copies of one block never overtake
    each other, being in one stream.

    Args:
        pool: [layers, num_blocks, ...] Whose blocks these are.
        num_blocks: How many there is room for.
    """

    def __init__(self, pool: Tensor, num_blocks: int) -> None:
        shape = (num_blocks, len(pool), *pool.shape[2:])
        pinned = pool.device.type == "cuda"
        self._blocks = torch.empty(shape, dtype=pool.dtype, device="cpu", pin_memory=pinned)
        self._stream: torch.cuda.Stream | None = None
        if pinned:
            self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]

    def take(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks of the pool here.

        Args:
            pool: As the constructor's; may be written to as soon as this returns.
            sources: int64 [C] Its blocks, on its device.
            targets: int64 [C] Blocks here, on the host.
        """
        leaving = pool.index_select(1, sources).transpose(0, 1).contiguous()
        if self._stream is None:
            self._blocks[targets] = leaving.to(self._blocks.device)
            return
        self._stream.wait_stream(torch.cuda.current_stream(pool.device))
        with torch.cuda.stream(self._stream):
            for block, target in zip(leaving, targets.tolist(), strict=True):
                self._blocks[target].copy_(block, non_blocking=True)
        leaving.record_stream(self._stream)  # not to be reused before it has left

    def give(self, pool: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks back: int64 [C] blocks here, on the host, to [C] of the pool's.

        What is computed afterwards waits for them; the host does not.
        """
        if self._stream is None:
            coming = self._blocks[sources].to(pool.device)
        else:
            with torch.cuda.stream(self._stream):
                shape = (len(sources), *self._blocks.shape[1:])
                coming = torch.empty(shape, dtype=pool.dtype, device=pool.device)
                for block, source in zip(coming, sources.tolist(), strict=True):
                    block.copy_(self._blocks[source], non_blocking=True)
            main = torch.cuda.current_stream(pool.device)
            main.wait_stream(self._stream)
            coming.record_stream(main)
        pool.index_copy_(1, targets, coming.transpose(0, 1))
