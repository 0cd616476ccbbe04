"""Ctrl-C at a moment that suits: never half way through what must be whole."""

import signal
import threading
from types import FrameType
from typing import Self

__all__ = ["Uninterrupted"]


class Uninterrupted:
    """Holds Ctrl-C back until its end.

    Only the main thread is ever interrupted, and only where Python handles the signal.

    Cost: tens of microseconds, most of it the enums of Python's `signal`; nearly none in other
    threads.
    """

    def __enter__(self) -> Self:
        self._pressed: list[tuple[int, FrameType | None]] = []
        handler = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        self._handler = handler if main and callable(handler) else None
        if self._handler is not None:
            signal.signal(signal.SIGINT, lambda *call: self._pressed.append(call))
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.let_through()

    def let_through(self) -> None:
        """Do now what was held back; raises what its handler does, mostly KeyboardInterrupt."""
        if self._handler is not None and self._pressed:
            call = self._pressed[0]
            self._pressed.clear()
            self._handler(*call)
