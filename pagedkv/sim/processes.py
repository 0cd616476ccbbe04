"""Work that is dealt to processes."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from pagedkv.errors import WorkerLost

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
        WorkerLost: A process was killed.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits for it ends it
    try:
        sender.send((serve(number), None))
    except Exception as fault:
        sender.send((None, fault))


def _received(pipe: Connection) -> Any:
    try:
        found, fault = pipe.recv()
    except EOFError:
        raise WorkerLost(
            "a process was killed before it had answered",
            where="processes",
            remedy="give fewer, if memory was short",
        ) from None
    if fault is not None:
        raise fault
    return found
