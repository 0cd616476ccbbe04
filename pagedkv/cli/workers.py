"""Processes that answer one question after the other, and end when nobody waits for them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from pagedkv.errors import WorkerLost

__all__ = ["answers"]

Answer = TypeVar("Answer")

# Seconds between looks for an interrupt: one that falls between Python's last look and the wait
# itself wakes nobody.
_GLANCE = 0.2


def answers(
    task: Callable[..., Answer],
    questions: Sequence[tuple[Any, ...]],
    most: int,
    done: Callable[[], object],
) -> list[Answer]:
    """Return what ``task`` makes of each question, asked in at most so many processes.

    Whatever ends this early, an interrupt or the first task that raises, ends all of them at once.

    Args:
        done: Called after every answer.

    Raises:
        WorkerLost: A process was killed.
        Exception: What a task raised.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(most, len(questions)), initializer=_begin)
    found: dict[int, Answer] = {}
    try:
        with _interrupts_held_back():
            futures = {pool.submit(task, *each): i for i, each in enumerate(questions)}
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, _GLANCE, FIRST_COMPLETED)
            for future in ended:
                found[futures[future]] = future.result()
                done()
    except BrokenProcessPool:
        raise WorkerLost(
            "a process was killed before it had answered",
            where="--jobs",
            remedy="give fewer, if memory was short",
        ) from None
    except BaseException:
        workers = set(multiprocessing.active_children()) - before
        for worker in workers:
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
    return [found[i] for i in range(len(questions))]


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let an interrupt wait: a pool that meets one while it starts never ends.

    Workers inherit that by fork, so none falls to it before it ignores interrupts. Only Python's
    main thread receives any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        signal.raise_signal(signal.SIGINT)


def _begin() -> None:
    """Leave interrupts to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
