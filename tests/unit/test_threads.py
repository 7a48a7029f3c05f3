"""Threads that must live: an error that nobody foresaw is counted, said once, and the loop is begun again."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvplug import threads
from kvplug.threads import LivingThread, guarded, note, troubles

WAIT_S = 60.0
_numbers = itertools.count()


@pytest.fixture
def name() -> Iterator[str]:
    made = f"kvplug-test-{next(_numbers)}"
    yield made
    threads._errors.pop(made, None)
    threads._dead.pop(made, None)
    threads._said.pop(made, None)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def test_a_loop_that_raised_is_begun_again_counted_and_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    turns = []

    def loop() -> None:
        turns.append(1)
        if len(turns) <= 3:
            raise KeyError("one that nobody foresaw")
        stop.wait(WAIT_S)

    living = LivingThread(name, loop)
    assert living.start()
    until(lambda: len(turns) == 4)
    assert living.is_alive()
    assert living.restarts == 3
    assert troubles().errors[name] == 3
    said = [record for record in caplog.records if name in record.getMessage()]
    assert [record.levelno for record in said] == [logging.ERROR]
    assert said[0].exc_info
    assert "KeyError" in said[0].getMessage()
    stop.set()
    assert living.end(WAIT_S)
    assert not living.is_alive()


def test_it_ends_while_it_pauses_and_when_its_loop_returns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PAUSE_FIRST_S", 3600.0)

    def fails() -> None:
        raise ValueError(name)

    living = LivingThread(name, fails)
    living.start()
    until(lambda: troubles().errors.get(name))
    assert living.end(WAIT_S)
    other = LivingThread(name, lambda: None)
    other.start()
    until(lambda: not other.is_alive())
    assert other.restarts == 0


def test_pauses_grow_to_a_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    living = LivingThread(name, lambda: 1 // 0)

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) == 12

    monkeypatch.setattr(living._ending, "wait", wait)
    living.start()
    until(lambda: not living.is_alive())
    assert waited[:3] == [0.1, 0.2, 0.4]
    assert waited[-1] == threads.PAUSE_MOST_S


def test_a_process_without_threads_left_is_told_and_counted(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    living = LivingThread(name, lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        assert not living.start()
    assert troubles().dead[name] == 1
    assert "could not be started" in caplog.text
    assert not living.is_alive()
    assert living.end(1.0)


def test_work_that_ends_by_itself_is_noted(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def fails(what: str) -> None:
        raise LookupError(what)

    run = guarded(name, fails, "its reader was hung up on")
    for _ in range(3):
        thread = threading.Thread(target=run, args=("nothing there",))
        thread.start()
        thread.join(WAIT_S)
    assert troubles().errors[name] == 3
    assert caplog.text.count("its reader was hung up on") == 1
    note(name, TypeError("another kind"), "it goes on")
    assert caplog.text.count("Please report it") == 2


def test_a_forked_child_counts_its_own_whatever_its_parents_threads_were_doing(name: str) -> None:
    note(name, KeyError("the parent's"), "it goes on")
    held, forked = threading.Event(), threading.Event()

    def count() -> None:
        with threads._mutex:  # as note() does
            held.set()
            forked.wait(WAIT_S)

    counting = threading.Thread(target=count)
    counting.start()
    assert held.wait(WAIT_S)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(WAIT_S))  # ends a child that waits for a thread that it does not have
        before = troubles()
        logging.disable()
        note(name, KeyError("its own"), "it goes on")
        os._exit(0 if (before.errors, troubles().errors) == ({}, {name: 1}) else 1)
    forked.set()
    counting.join(WAIT_S)
    assert os.waitpid(child, 0)[1] == 0
    assert troubles().errors[name] == 1
