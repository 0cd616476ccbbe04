"""Every served request's own latencies, for whoever wants more than distributions."""

from typing import Any

import numpy as np

from pagedkv.core.arrays import Float64, Int64
from pagedkv.core.request import FinishedSequence
from pagedkv.sim.workload import SimRequest

__all__ = ["Detail"]


class Detail:
    """When each token of each request came; memory grows with the tokens."""

    def __init__(self) -> None:
        self._times: dict[int, list[Float64]] = {}  # of sequences in work
        self._served: dict[int, tuple[SimRequest, Float64]] = {}

    def draw(self, seq_ids: Int64, ends: Float64) -> None:
        """Sequences have drawn a token each at every one of the times."""
        for seq_id in seq_ids.tolist():
            self._times.setdefault(seq_id, []).append(ends)

    def finish(self, number: int, request: SimRequest, ended: FinishedSequence) -> None:
        """A request has ended, served or not; only those that were are kept."""
        times = self._times.pop(ended.seq_id, [])
        if ended.finish_reason != "error":
            self._served[number] = request, np.concatenate(times)

    def merge(self, other: "Detail") -> None:
        """Take in what another engine served."""
        self._served |= other._served

    def table(self) -> dict[str, list[Any]]:
        """Return vLLM's arrays, in seconds and in the order in which requests were sent."""
        served = [self._served[number] for number in sorted(self._served)]
        return {
            "input_lens": [len(request.prompt) for request, _ in served],
            "output_lens": [len(times) for _, times in served],
            "start_times": [request.arrival for request, _ in served],
            "ttfts": [float(times[0]) - request.arrival for request, times in served],
            "itls": [np.diff(times).tolist() for _, times in served],
            "e2els": [float(times[-1]) - request.arrival for request, times in served],
        }
