"""The order in which waiting sequences are tried for admission.

Every order has a fixed key per sequence, so that nothing is sorted again while time passes: ageing
by a constant rate is the time of arrival in the key. Ties end at the sequence's number, never at a
clock or a hash.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from pagedkv.config import SchedulerConfig
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import Sequence
from pagedkv.core.tenants import Tenants

__all__ = ["Key", "WaitingQueue", "make_queue", "urgency"]

Key = tuple[float, float, int]
PREFIX_WINDOW = 64
"""``lpm`` ranks this many of the longest waiting: work per step and wait are both bounded."""


def urgency(priority: int, step: int, ageing_steps: int) -> int:
    """Return a priority aged by the step at which it came: lower goes first.

    One that came ``ageing_steps`` earlier equals one that is a level more urgent, and always will,
    so a request is passed by no more than come within ``ageing_steps`` per level.
    """
    return priority * ageing_steps + step


def by_arrival(seq: Sequence) -> Key:
    """First come, first served: by the step, of one step's by the time their requests give."""
    return seq.arrived, seq.request.arrival, seq.seq_id


def by_urgency(seq: Sequence) -> Key:
    """The most urgent, of equals the first come."""
    return seq.urgency, seq.request.arrival, seq.seq_id


class WaitingQueue:
    """Waiting sequences by ascending key. Push and removal cost a binary search and a shift."""

    def __init__(self, key: Callable[[Sequence], Key]) -> None:
        self._key = key
        self._waiting: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def push(self, seq: Sequence) -> None:
        """Add a sequence; one that was preempted takes the place it had."""
        insort(self._waiting, seq, key=self._key)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence wherever it stands."""
        at = bisect_left(self._waiting, self._key(seq), key=self._key)
        assert self._waiting[at] is seq, f"sequence {seq.seq_id} does not wait"
        del self._waiting[at]

    def order(self, now: int) -> Iterator[Sequence]:
        """Yield all sequences, the first to try first; they may be removed meanwhile.

        Args:
            now: The step's number.
        """
        return iter(self._waiting.copy())


class LongestPrefixFirst(WaitingQueue):
    """Whoever finds most in the prefix cache, and a block more per ``ageing_steps`` of waiting."""

    def __init__(self, manager: BlockManager, ageing_steps: int) -> None:
        super().__init__(by_arrival)
        self._manager = manager
        self._ageing = ageing_steps

    def order(self, now: int) -> Iterator[Sequence]:
        """Yield the longest waiting `PREFIX_WINDOW`, the longest prefix first; then the others."""

        def credit(seq: Sequence) -> float:
            return len(self._manager.find_prefix(seq)) + (now - seq.arrived) / self._ageing

        window = sorted(self._waiting[:PREFIX_WINDOW], key=lambda seq: -credit(seq))
        return iter(window + self._waiting[PREFIX_WINDOW:])


class FairShare(WaitingQueue):
    """The tenant served least so far goes first (virtual token counter, Sheng et al. 2024)."""

    def __init__(self, tenants: Tenants) -> None:
        super().__init__(by_arrival)
        self._tenants = tenants
        self._queues: dict[int, WaitingQueue] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for tenant in sorted(self._queues) for seq in self._queues[tenant])

    def push(self, seq: Sequence) -> None:
        """Add a sequence to its tenant's queue."""
        self._queues.setdefault(seq.tenant_id, WaitingQueue(self._key)).push(seq)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence wherever it stands."""
        self._queues[seq.tenant_id].remove(seq)
        if not self._queues[seq.tenant_id]:
            del self._queues[seq.tenant_id]

    def order(self, now: int) -> Iterator[Sequence]:
        """Yield as if each one yielded had been served its prompt, so that tenants take turns."""
        lines = {tenant: list(queue.order(now)) for tenant, queue in self._queues.items()}
        heap = [(int(self._tenants.served[tenant]), tenant, 0) for tenant in lines]
        heapq.heapify(heap)
        while heap:
            served, tenant, i = heap[0]
            seq = lines[tenant][i]
            if i + 1 < len(lines[tenant]):
                heapq.heapreplace(heap, (served + len(seq.token_ids), tenant, i + 1))
            else:
                heapq.heappop(heap)
            yield seq


def make_queue(config: SchedulerConfig, manager: BlockManager, tenants: Tenants) -> WaitingQueue:
    """Return the queue that ``scheduler.scheduling_policy`` names."""
    if config.scheduling_policy == "lpm":
        return LongestPrefixFirst(manager, config.ageing_steps)
    if config.scheduling_policy == "fair":
        return FairShare(tenants)
    if config.scheduling_policy == "priority":
        return WaitingQueue(by_urgency)
    return WaitingQueue(by_arrival)
