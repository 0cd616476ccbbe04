"""The order in which waiting sequences are admitted."""

from collections import deque
from collections.abc import Iterator

from pagedkv.core.request import Sequence

__all__ = ["FirstComeFirstServed"]


class FirstComeFirstServed:
    """Arrival order; a preempted sequence goes back to the front."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def push(self, seq: Sequence) -> None:
        """Add a new sequence."""
        self._waiting.append(seq)

    def push_preempted(self, seq: Sequence) -> None:
        """Add a sequence that was running."""
        self._waiting.appendleft(seq)

    def peek(self) -> Sequence:
        """Return the next sequence without taking it; the queue must not be empty."""
        return self._waiting[0]

    def pop(self) -> Sequence:
        """Take the next sequence; the queue must not be empty."""
        return self._waiting.popleft()

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence wherever it stands. O(waiting)."""
        self._waiting.remove(seq)
