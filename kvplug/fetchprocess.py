"""Other hosts' blocks, brought by a process of this one's own.

A fetch is a few hundred short calls. In a process whose interpreter is busy, as an engine's scheduler is, each of them
waits 5 ms for its turn, and takes it from the scheduler; so they are made elsewhere, and what is left here is a
question and an answer. The process has a store of its own on the same pool: what it has sealed is there for everybody.

It is started in the background, ends with this one whatever becomes of it, and may die at any instant: then what was
under way counts as not answered, and the next question starts another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import SecretStr

from kvplug.config import Config
from kvplug.errors import Code, KvplugError
from kvplug.fetchwords import Begin, Begun, Channel, ChannelError, Fetch, Fetched, Found, Problem, WhoHas, expected
from kvplug.holders import Standing
from kvplug.peering import check_directory
from kvplug.store import KvStore

__all__ = ["FetchError", "FetchProcess"]

log = logging.getLogger("kvplug")

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]
A = TypeVar("A", Found, Fetched)

PROGRAM: Final = "from kvplug.fetchworker import main; main()"
BEGIN_S: Final = 120.0
"""Until it answers: a fresh installation may compile the pool's inner loops first."""
LATE_S: Final = 2.0
"""How long after a question's deadline its answer may come. Then the process is taken to be stuck, and ended."""
END_S: Final = 1.0
"""How long it may take to hang up everywhere before it is killed."""
KILLED_S: Final = 5.0
BACK_OFF_FIRST_S: Final = 0.5
BACK_OFF_MOST_S: Final = 60.0
STEADY_S: Final = 30.0
"""One that lived for so long is started again at once."""


class FetchError(KvplugError):
    """The process that fetches can't: what is wrong with the settings, or the trace of an error there."""


class FetchProcess:
    """The :class:`kvplug.holders.Sources` of an engine process. A copy that a fork made must not be used."""

    def __init__(self, store: KvStore, config: Config, channels: int) -> None:
        """``channels``: how many questions may be asked at a time. Raises ConfigError: settings that can't work."""
        check_directory(config)
        # As this process has them, whatever environment and files say by the time that it starts.
        settings = {name: getattr(config, name) for name in config.model_fields_set}
        self._begin = Begin(store.pool.segment.uuid, _written(settings | {"pool": store.pool_name}))
        self._wanted = channels
        self._changed = threading.Condition()
        self._running: _Running | None = None
        self._coming: _Running | None = None
        self._starts = False
        self._was_up = False
        self._closed = False
        self._back_off_s = 0.0
        self._not_before = 0.0
        with self._changed:
            self._start_soon()

    # ---- what is asked -----------------------------------------------------------------------------------------------

    def who_has(self, keys: U8, deadline: float) -> tuple[list[tuple[Standing, Bools]], bool]:
        """See :class:`kvplug.holders.Sources`. Raises FetchError."""
        answer = self._ask(WhoHas(keys.tobytes(), deadline), Found, deadline)
        if answer is None:
            return [], True
        return [(peer, np.frombuffer(have, np.bool_)) for peer, have in answer.peers], answer.silent

    def fetch(self, address: str, keys: U8, deadline: float) -> tuple[I8, Standing | None]:
        """See :class:`kvplug.holders.Sources`. Raises FetchError."""
        answer = self._ask(Fetch(address, keys.tobytes(), deadline), Fetched, deadline)
        if answer is None:
            return np.full(len(keys), Code.TIMEOUT, np.int8), None
        return np.frombuffer(answer.codes, np.int8), answer.standing

    def _ask(self, question: WhoHas | Fetch, kind: type[A], deadline: float) -> A | None:
        """The answer, or None if there is nobody to give one in time."""
        taken = self._take(deadline)
        if taken is None:
            return None
        running, channel = taken
        try:
            channel.send(question, deadline + LATE_S)
            answer = channel.receive(deadline + LATE_S)
            if isinstance(answer, Problem):
                raise FetchError(answer.text)
            answer = expected(answer, kind)
        except ChannelError as error:
            self._lost(running, str(error))
            return None
        finally:
            self._give_back(running, channel)
        return answer

    def _take(self, deadline: float) -> tuple[_Running, Channel] | None:
        """A channel that nobody uses, of the process that runs; one is started if there is none."""
        with self._changed:
            while not self._closed:
                if self._running is not None and self._running.idle:
                    return self._running, self._running.idle.pop()
                if self._running is None:
                    if not self._starts and time.monotonic() >= self._not_before:
                        self._start_soon()
                    if self._was_up or not self._starts:  # computing is better than to wait for the next one
                        return None
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    return None
        return None

    def _give_back(self, running: _Running, channel: Channel) -> None:
        with self._changed:
            if running.is_over:
                channel.close()
            else:
                running.idle.append(channel)
                self._changed.notify()

    # ---- the process -------------------------------------------------------------------------------------------------

    def _start_soon(self) -> None:
        """With the mutex held."""
        self._starts = True
        try:
            threading.Thread(target=self._start, name="kvplug-fetch-start", daemon=True).start()
        except RuntimeError:  # no thread is left: tried again with the next question
            self._starts = False
            self._put_off()

    def _start(self) -> None:
        running, problem = None, ""
        try:
            running = _Running(self._wanted)
            with self._changed:
                self._coming = running
            if not self._closed:
                running.begin(self._begin)
        except (ChannelError, FetchError, OSError, ValueError) as error:
            problem = str(error)
        with self._changed:
            self._starts, self._coming = False, None
            is_wanted = not problem and not self._closed
            if is_wanted:
                self._running, self._was_up = running, True
            else:
                self._put_off()
            self._changed.notify_all()
        if not is_wanted and running is not None:
            running.idle = running.channels  # nobody else has had one
            running.end(0.0)
        if problem and not self._closed:
            log.warning("kvplug: no process to fetch from other hosts could be started: %s", problem)

    def _lost(self, running: _Running, why: str) -> None:
        """It has ended, or is stuck."""
        with self._changed:
            if self._running is not running or self._closed:
                return
            self._running = None
            if time.monotonic() < running.since + STEADY_S:
                self._put_off()
            else:
                self._back_off_s = 0.0
        running.end(0.0)
        log.warning("kvplug: the process that fetches from other hosts was lost (%s); another one is started", why)

    def _put_off(self) -> None:
        """With the mutex held: not at once again."""
        self._not_before = time.monotonic() + self._back_off_s
        self._back_off_s = min(max(2 * self._back_off_s, BACK_OFF_FIRST_S), BACK_OFF_MOST_S)

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none that answers."""
        running = self._running
        return None if running is None else running.pid

    def close(self) -> None:
        """End it; questions that are under way end too. Idempotent."""
        with self._changed:
            self._closed = True
            ending = [running for running in (self._running, self._coming) if running is not None]
            self._running = None
            self._changed.notify_all()
        for running in ending:
            running.end(END_S)


class _Running:
    """One process and its channels."""

    def __init__(self, channels: int) -> None:
        """Raises OSError, ValueError: it can't be started."""
        self.since = time.monotonic()
        pairs = [socket.socketpair() for _ in range(channels)]
        self.channels = [Channel(ours) for ours, _ in pairs]
        descriptors = [other.fileno() for _, other in pairs]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, (os.getpid(), *descriptors))],
                env=os.environ | {"PYTHONSAFEPATH": "1"},  # nothing of the working directory is imported
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        except BaseException:
            for channel in self.channels:
                channel.close()
            raise
        finally:
            for _, other in pairs:
                other.close()
        self.pid = self._process.pid
        self.is_over = False
        self.idle: list[Channel] = []
        """Those that nobody uses."""

    def begin(self, word: Begin) -> None:
        """Tell it what it is for. Raises ChannelError, FetchError."""
        deadline = time.monotonic() + BEGIN_S
        self.channels[0].send(word, deadline)
        answer = self.channels[0].receive(deadline)
        if isinstance(answer, Problem):
            raise FetchError(answer.text)
        expected(answer, Begun)
        self.idle = list(self.channels)

    def end(self, patience_s: float) -> None:
        """Hang up; it ends by itself, or is killed after so long."""
        self.is_over = True
        for channel in self.channels:
            channel.interrupt()
        while self.idle:
            self.idle.pop().close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILLED_S)


def _written(settings: dict[str, object]) -> dict[str, object]:
    """Settings as a user writes them, secrets too: they go by a socket that only the other process has."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, SecretStr):
            found[name] = value.get_secret_value()
        elif value is not None:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found
