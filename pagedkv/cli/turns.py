"""What is ready in any order, shown in one."""

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["InTurn"]

Thing = TypeVar("Thing")


class InTurn(Generic[Thing]):
    """Shows things in the order of their numbers, 0, 1, 2 ..., each once all before it were shown.

    Args:
        show: Is given a number and its thing.
    """

    def __init__(self, show: Callable[[int, Thing], object]) -> None:
        self._show = show
        self._ready: dict[int, Thing] = {}
        self._turn = 0

    def add(self, number: int, thing: Thing) -> None:
        """Take what is ready now, and show all whose turn has come."""
        self._ready[number] = thing
        while self._turn in self._ready:
            self._show(self._turn, self._ready.pop(self._turn))
            self._turn += 1

    def show_rest(self) -> None:
        """Show what is ready though it is not its turn: nothing else will come."""
        for number, thing in sorted(self._ready.items()):
            self._show(number, thing)
        self._ready.clear()
