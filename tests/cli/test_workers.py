"""Processes that share a sweep: they end when nobody waits for them; one that dies is missed."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pagedkv import WorkerLost
from pagedkv.cli.workers import answers

LONG = ("--num-prompts", "1000000", "--request-rate", "5", "--seed", "0,1,2,3", "--jobs", "2")
# Whoever started the tests may have had interrupts ignored.
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pagedkv.cli import main
sys.exit(main(sys.argv[1:]))
"""
PATIENCE = 60  # seconds after which it is hopeless


def double(number):
    return 2 * number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number):
    if number == 1:
        raise ValueError("the second")
    time.sleep(10 * PATIENCE)


def test_answers_come_in_the_order_of_questions():
    told = []
    assert answers(double, [(i,) for i in range(5)], 2, lambda *each: told.append(each)) == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert sorted(told) == [(i, 2 * i) for i in range(5)]


def test_a_process_that_is_killed_is_a_typed_error():
    with pytest.raises(WorkerLost, match="killed before it had answered"):
        answers(die, [(0,), (1,)], 2, lambda *_: None)


def test_the_first_that_raises_ends_the_others():
    with pytest.raises(ValueError, match="the second"):
        answers(refuse, [(i,) for i in range(4)], 2, lambda *_: None)
    until(lambda: not multiprocessing.active_children())


@pytest.fixture
def interruptible():
    """Ctrl-C as Python handles it: whoever started the tests may have had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "it was not put back"
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("name", ["submit", "shutdown"])
def test_an_interrupt_waits_until_the_pool_has_started_or_ended(monkeypatch, name):
    call = getattr(concurrent.futures.ProcessPoolExecutor, name)

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return call(*args, **options)

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(double, [(i,) for i in range(5)], 2, lambda *_: None)
    until(lambda: not multiprocessing.active_children())


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_answers_are_waited_for_ends_the_sweep(monkeypatch):
    """In the middle of the wait itself it would leave the pool locked for ever."""
    wait = concurrent.futures.wait

    def interrupted(futures, *args):
        for future in futures:
            with future._condition:
                signal.raise_signal(signal.SIGINT)
        return wait(futures, *args)

    monkeypatch.setattr("pagedkv.cli.workers.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(refuse, [(i,) for i in range(2, 6)], 2, lambda *_: None)
    until(lambda: not multiprocessing.active_children())


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_told_though_the_pool_breaks(monkeypatch):
    def broken(*_):
        signal.raise_signal(signal.SIGINT)
        raise concurrent.futures.process.BrokenProcessPool("gone")

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", broken)
    with pytest.raises(KeyboardInterrupt):
        answers(double, [(1,)], 1, lambda *_: None)


def members(group):
    """Return the processes of a group that are still at work, from ps."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,pid="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [pid for pgid, state, pid in rows if pgid == str(group) and not state.startswith("Z")]


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("to", ["all", "parent"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_ends_with_whoever_asked_for_it(signum, to):
    """By the terminal, which tells the whole group, and by who knows the parent's number only."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, "simulate", *LONG],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(lambda: len(members(run.pid)) == 3)
        (os.killpg if to == "all" else os.kill)(run.pid, signum)
        _, err = run.communicate(timeout=PATIENCE)
        until(lambda: not members(run.pid))
    finally:
        if members(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    if signum == signal.SIGINT:
        assert run.returncode == 130
        assert err.decode().strip() == "pagedkv: interrupted"
