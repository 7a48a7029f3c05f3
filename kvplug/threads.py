"""Threads that must live, and what becomes of an error in one that nobody foresaw.

A thread that ends by an exception says so on stderr once, and from then on does nothing: hosts that come are never
seen, memory is never reserved. So every thread of kvplug's runs through here. What comes out of it is counted, logged
with its traceback the first time, and

* of a :class:`LivingThread` the loop is begun again, after a pause that grows while it goes on failing;
* of work that ends by itself (:func:`guarded`, :func:`note`) whoever waits for it learns that it failed.

The counts are of the process (:func:`troubles`): a pool's clients write theirs into their row, for `kvplug stat` and
`kvplug doctor`, and an agent tells them to whoever asks for its figures.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["LivingThread", "Troubles", "guarded", "note", "troubles"]

log = logging.getLogger("kvplug")

PAUSE_FIRST_S: Final = 0.1
PAUSE_MOST_S: Final = 10.0
STEADY_S: Final = 60.0
"""A loop that went on for so long is begun again after the shortest pause."""
MOST_SAID: Final = 8
"""Different errors of one thread that are logged; those after them are only counted."""

_mutex = threading.Lock()
_errors: collections.Counter[str] = collections.Counter()
_said: dict[str, set[str]] = {}
_dead: collections.Counter[str] = collections.Counter()


def _begin_in_child() -> None:
    """What was counted was the parent's, whose other threads, one of which may hold the mutex, are not here."""
    global _mutex
    _mutex = threading.Lock()
    _errors.clear()
    _said.clear()
    _dead.clear()


os.register_at_fork(after_in_child=_begin_in_child)


@dataclasses.dataclass(frozen=True, slots=True)
class Troubles:
    """Of this process, since its start, by the thread's name."""

    errors: dict[str, int]
    """Errors that nobody foresaw."""
    dead: dict[str, int]
    """Threads that must live and could not be started."""


def troubles() -> Troubles:
    """What has happened so far."""
    with _mutex:
        return Troubles(dict(_errors), dict(_dead))


def note(name: str, error: BaseException, outcome: str) -> None:
    """Count an error that nobody foresaw, and log it with its traceback unless the same has been logged.

    ``outcome``: what that means for whoever uses the thread, as the end of a sentence.
    """
    kind = f"{type(error).__name__}: {str(error).strip()[-200:]}"
    with _mutex:
        _errors[name] += 1
        said = _said.setdefault(name, set())
        is_new = kind not in said and len(said) < MOST_SAID
        if is_new:
            said.add(kind)
    if is_new:
        log.error(
            "kvplug: an error in thread %s that is kvplug's own (%s: %s); %s. Please report it. It is counted from "
            "here on (thread_errors in `kvplug stat`)",
            name,
            type(error).__name__,
            error,
            outcome,
            exc_info=error,
        )


def guarded(name: str, work: Callable[..., Any], outcome: str) -> Callable[..., None]:
    """``work``, for a thread that does it once: an error that nobody foresaw is noted, and the thread is over."""

    def run(*arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 - that is what this module is for
            note(name, error, outcome)

    return run


class LivingThread:
    """A daemon thread whose loop is begun again if it ends by an exception, until it returns or :meth:`end` is called.

    The loop has to leave what it works on in a state in which it can be begun again.
    """

    def __init__(self, name: str, loop: Callable[[], None]) -> None:
        self.name = name
        self._loop = loop
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.restarts = 0
        """How often the loop was begun again."""

    def start(self) -> bool:
        """Begin. False: the process can have no more threads; that is counted, and logged."""
        try:
            self._thread.start()
        except RuntimeError as error:
            if self._thread.ident is not None:
                raise  # started twice
            with _mutex:
                _dead[self.name] += 1
            log.error("kvplug: thread %s could not be started (%s): what it is for is not done", self.name, error)
            return False
        return True

    def is_alive(self) -> bool:
        """Whether it has begun and not ended."""
        return self._thread.is_alive()

    def end(self, timeout_s: float) -> bool:
        """Don't begin the loop again, and wait so long for the thread to end, unless it is this one; whether it has."""
        self._ending.set()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause_s = PAUSE_FIRST_S
        while True:
            began = time.monotonic()
            try:
                self._loop()
                return
            except Exception as error:  # noqa: BLE001 - that is what this module is for
                if self._ending.is_set():
                    return
                note(self.name, error, "it is begun again")
            if time.monotonic() > began + STEADY_S:
                pause_s = PAUSE_FIRST_S
            if self._ending.wait(pause_s):
                return
            pause_s = min(2 * pause_s, PAUSE_MOST_S)
            self.restarts += 1
