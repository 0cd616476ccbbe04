"""Processes that answer one question after the other, and end when nobody waits for them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pagedkv.errors import WorkerLost

__all__ = ["answers"]

Answer = TypeVar("Answer")


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
        futures = {pool.submit(task, *each): i for i, each in enumerate(questions)}
        for future in as_completed(futures):
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
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
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
