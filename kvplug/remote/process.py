"""Other hosts' blocks, brought by a process of this one's own.

A fetch is a few hundred short calls. In a process whose interpreter is busy, as an engine's scheduler is, each of them
waits 5 ms for its turn, and takes it from the scheduler; so they are made elsewhere, and what is left here is a
question and an answer. The process has a store of its own on the same pool: what it has sealed is there for everybody.

It is started in the background, ends with this one whatever becomes of it, and may die at any instant: then what was
under way counts as not answered, and the next question starts another.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from kvplug.remote.messages import Begin, Begun, Channel, ChannelError, Fetch, Fetched, Found, Problem, WhoHas, expected
from kvplug.remote.peering import check_directory
from kvplug.remote.sources import Standing
from kvplug.store import KvStore
from kvplug.threads import guarded

__all__ = ["FetchError", "FetchProcess"]

log = logging.getLogger("kvplug")

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]
A = TypeVar("A", Found, Fetched)

# It imports what this process imports, and nothing of the working directory; Ctrl-C is the engine's to answer.
PROGRAM: Final = """import sys
sys.path[:] = sys.argv.pop(1).split("\\n")
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from kvplug.remote.worker import main
main()"""
BEGIN_S: Final = 120.0
"""Until it answers: a fresh installation may compile the pool's inner loops first."""
FIRST_S: Final = 10.0
"""How long after the beginning questions wait for the first one. Later, computing is better than to wait for it."""
LATE_S: Final = 2.0
"""How long after a question's deadline its answer may come. Then the process is taken to be stuck, and ended."""
END_S: Final = 2.0
"""How long it may take to hang up everywhere before it is killed."""
KILLED_S: Final = 5.0
BACK_OFF_FIRST_S: Final = 0.5
BACK_OFF_MOST_S: Final = 60.0
STEADY_S: Final = 30.0
"""One that lived for so long is started again at once."""


class FetchError(KvplugError):
    """The process that fetches can't: what is wrong with the settings, or the trace of an error there."""


class FetchProcess:
    """The :class:`kvplug.remote.sources.Sources` of an engine process. A copy that a fork made must not be used."""

    def __init__(self, store: KvStore, config: Config, channels: int) -> None:
        """``channels``: how many questions may be asked at a time. Raises ConfigError: settings that can't work."""
        check_directory(config)
        # As this process has them, whatever environment and files say by the time that it starts.
        settings = {name: _written(getattr(config, name)) for name in Config.model_fields}
        self._begin = Begin(store.pool_uuid, settings | {"pool": store.pool_name})
        self._late_s = LATE_S + 2 * config.lock_timeout_s
        self._wanted = channels
        self._changed = threading.Condition()
        self._running: _Running | None = None
        self._coming: _Running | None = None
        self._starts = False
        self._closed = False
        self._patient_until = time.monotonic() + FIRST_S
        self._back_off_s = 0.0
        self._not_before = 0.0
        with self._changed:
            self._start_soon()

    # ---- what is asked -----------------------------------------------------------------------------------------------

    def who_has(self, keys: U8, deadline: float) -> tuple[list[tuple[Standing, Bools]], bool]:
        """See :class:`kvplug.remote.sources.Sources`. Raises FetchError."""
        answer = self._ask(WhoHas(keys.tobytes(), deadline), Found, deadline)
        if answer is None or any(len(have) != len(keys) for _, have in answer.peers):
            return [], True
        return [(peer, np.frombuffer(have, np.bool_)) for peer, have in answer.peers], answer.silent

    def fetch(self, address: str, keys: U8, deadline: float) -> tuple[I8, Standing | None]:
        """See :class:`kvplug.remote.sources.Sources`. Raises FetchError."""
        answer = self._ask(Fetch(address, keys.tobytes(), deadline), Fetched, deadline)
        if answer is None or len(answer.codes) != len(keys):
            return np.full(len(keys), Code.TIMEOUT, np.int8), None
        return np.frombuffer(answer.codes, np.int8), answer.standing

    def _ask(self, question: WhoHas | Fetch, kind: type[A], deadline: float) -> A | None:
        """The answer, or None if there is nobody to give one in time."""
        taken = self._take(deadline)
        if taken is None:
            return None
        running, channel = taken
        why = "an error here"
        try:
            channel.send(question, deadline + self._late_s)
            answer = channel.receive(deadline + self._late_s)
            if isinstance(answer, Problem):
                why = "" if answer.goes_on else "an error there"
                raise FetchError(answer.text)
            answer, why = expected(answer, kind), ""
        except ChannelError as error:
            why = str(error)
            return None
        finally:
            if why:  # nobody knows what comes next on this channel
                channel.close()
                self._lost(running, why)
            else:
                self._give_back(running, channel)
        return answer

    def _take(self, deadline: float) -> tuple[_Running, Channel] | None:
        """A channel that nobody uses, of the process that runs; one is started if there is none."""
        with self._changed:
            while not self._closed:
                until = deadline
                if self._running is not None:
                    if self._running.idle:
                        return self._running, self._running.idle.pop()
                else:
                    if not self._starts and time.monotonic() >= self._not_before:
                        self._start_soon()
                    if not self._starts:
                        return None
                    until = min(until, self._patient_until)
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
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
            run = guarded("kvplug-fetch-process", self._run, "a later question starts another process")
            threading.Thread(target=run, name="kvplug-fetch-process", daemon=True).start()
        except RuntimeError:  # no thread is left: tried again with a later question
            self._starts = False
            self._put_off()

    def _run(self) -> None:
        """Start a process, and be there when it ends."""
        running, problem = _Running(), "an error"
        try:
            with self._changed:
                self._coming = running  # from here on it ends with this
            running.launch(self._wanted)
            if not self._closed:
                running.begin(self._begin)
            problem = ""
        except (ChannelError, FetchError, OSError, ValueError) as error:
            problem = str(error)
        finally:
            is_up = self._is_up(running, problem)
        if is_up:
            self._lost(running, f"exit status {running.wait()}")

    def _is_up(self, running: _Running, problem: str) -> bool:
        """The start is over: whether this process is the one to be asked now."""
        with self._changed:
            self._starts, self._coming = False, None
            is_wanted = not problem and not self._closed
            if is_wanted:
                self._running, running.idle = running, list(running.channels)
            else:
                running.is_over = True
                self._put_off()
            self._changed.notify_all()
        if not is_wanted:
            running.end(0.0)
            for channel in running.channels:
                channel.close()
        if problem and not self._closed:
            log.warning("kvplug: no process to fetch from other hosts could be started: %s", problem)
        return is_wanted

    def _lost(self, running: _Running, why: str) -> None:
        """It has ended, or is stuck, or can't be trusted any more."""
        with self._changed:
            if self._running is not running or self._closed:
                return
            self._running = None
            idle = running.give_up()
            if time.monotonic() < running.since + STEADY_S:
                self._put_off()
            else:
                self._back_off_s = 0.0
            self._changed.notify_all()
        running.end(0.0)
        for channel in idle:
            channel.close()
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
            idle = [channel for running in ending for channel in running.give_up()]
            self._changed.notify_all()
        for running in ending:
            running.end(END_S)
        for channel in idle:
            channel.close()


class _Running:
    """One process and its channels."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.channels: list[Channel] = []
        self.idle: list[Channel] = []
        """Those that nobody uses, for whoever has the mutex."""
        self.is_over = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """None before it was launched."""
        return None if self._process is None else self._process.pid

    def launch(self, channels: int) -> None:
        """Start it. Raises OSError, ValueError."""
        if not sys.executable:
            raise OSError("sys.executable does not say which Python this is")
        with contextlib.ExitStack() as theirs:
            descriptors = []
            for _ in range(channels):
                ours, other = map(_above_standard, socket.socketpair())
                theirs.enter_context(other)
                descriptors.append(other.fileno())
                self.channels.append(Channel(ours))
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "\n".join(map(str, sys.path)), *map(str, (os.getpid(), *descriptors))],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if _is_open(2) else subprocess.DEVNULL,
            )

    def begin(self, word: Begin) -> None:
        """Tell it what it is for. Raises ChannelError, FetchError."""
        deadline = time.monotonic() + BEGIN_S
        self.channels[0].send(word, deadline)
        answer = self.channels[0].receive(deadline)
        if isinstance(answer, Problem):
            raise FetchError(answer.text)
        expected(answer, Begun)

    def wait(self) -> int:
        """Its exit status, once it has ended: there is nothing that this would have to be in time for."""
        assert self._process is not None
        return self._process.wait()

    def give_up(self) -> list[Channel]:
        """With the mutex held: from now on no channel is given back. Those that nobody uses, to be closed."""
        self.is_over = True
        idle, self.idle = self.idle, []
        return idle

    def end(self, patience_s: float) -> None:
        """Hang up; it ends by itself, or is killed after so long."""
        for channel in self.channels:
            channel.interrupt()
        if self._process is None:
            return
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILLED_S)


def _above_standard(sock: socket.socket) -> socket.socket:
    """The same, and none of the three descriptors that a child's streams are put on."""
    if sock.fileno() > 2:
        return sock
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _written(value: object) -> object:
    """A setting as a user writes it, secrets too: they go by a socket that only the other process has."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return list(value) if isinstance(value, tuple) else value
