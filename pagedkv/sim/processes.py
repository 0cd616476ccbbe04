"""Work that is dealt to processes."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

__all__ = ["in_processes", "most_processes"]

Found = TypeVar("Found")


def most_processes(wanted: int) -> int:
    """Return how many processes `in_processes` may be asked for: 1 where none can be forked."""
    return wanted if "fork" in multiprocessing.get_all_start_methods() else 1


def in_processes(serve: Callable[[int], Found], count: int) -> list[Found]:
    """Return what ``serve`` makes of 0, 1 ... ``count - 1``: of 0 here, of the others in processes
    that are forked from this one, so that only the answers need to be plain data.

    Raises:
        Exception: What ``serve`` raised, here or elsewhere.
        ChildProcessError: A process was killed.
    """
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    children = []
    for number in range(1, count):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_answer, args=(serve, number, sender), daemon=True)
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    try:
        return [serve(0), *(_received(pipe) for pipe in pipes)]
    finally:
        for child in children:
            child.terminate()
            child.join()


def _answer(serve: Callable[[int], Any], number: int, sender: Connection) -> None:
    try:
        sender.send((serve(number), None))
    except Exception as fault:
        sender.send((None, fault))


def _received(pipe: Connection) -> Any:
    try:
        found, fault = pipe.recv()
    except EOFError:
        raise ChildProcessError("a process ended before it had answered") from None
    if fault is not None:
        raise fault
    return found
