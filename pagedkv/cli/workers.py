"""Processes that answer one question after the other, and end when nobody waits for them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pagedkv.errors import WorkerLost
from pagedkv.interrupts import Uninterrupted

__all__ = ["answers"]

Answer = TypeVar("Answer")

_GLANCE = 0.2  # seconds between looks for an interrupt


def answers(
    task: Callable[..., Answer],
    questions: Sequence[tuple[Any, ...]],
    most: int,
    done: Callable[[int, Answer], object],
) -> list[Answer]:
    """Return what ``task`` makes of each question, asked in at most so many processes.

    Whatever ends this early, an interrupt or the first task that raises, ends all of them at once.

    Args:
        done: Is told of every answer when it comes, and of which question.

    Raises:
        WorkerLost: A process was killed.
        Exception: What a task raised.
    """
    before = set(multiprocessing.active_children())
    found: dict[int, Answer] = {}
    with Uninterrupted() as interrupts:  # neither a pool nor what waits for it bears any
        pool = ProcessPoolExecutor(min(most, len(questions)), initializer=_begin)
        try:
            futures = {pool.submit(task, *each): i for i, each in enumerate(questions)}
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, _GLANCE, FIRST_COMPLETED)
                for future in ended:
                    number = futures[future]
                    found[number] = future.result()
                    done(number, found[number])
                interrupts.let_through()
        except BrokenProcessPool:
            raise WorkerLost(
                "a process was killed before it had answered",
                where="--jobs",
                remedy="give fewer, if memory was short",
            ) from None
        except BaseException:
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()
    return [found[i] for i in range(len(questions))]


def _begin() -> None:
    """Leave interrupts to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
