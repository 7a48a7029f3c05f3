"""A process that has imported SGLang, and forks servers: importing takes most of the time that a server takes to start.

A server of the lab is four processes that import the same ten thousand modules: seconds of every core, for each test.
So one process for each release imports them, before any plugin is loaded, and each server is forked from it, with its
own environment, session and log. A server starts its schedulers by ``multiprocessing``'s *spawn*, fresh interpreters
that import everything again; here the server forks them before it does anything else, and they wait until it spawns.
Then they are its children, with what it sends, as if they had just been started; each loads plugins by itself.

What differs from a server started cold: modules were imported before the environment was set. :func:`may_fork` says
for which environments that does not matter; tests of versions start cold.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.spawn
import multiprocessing.util
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import setproctitle

from tests.lab.env import ROOT
from tests.lab.process import EXIT_S
from tests.sglang_lab.env import MAIN, EngineError, base_env

__all__ = ["Forked", "fork_server", "may_fork"]

PRELOAD = (
    "sglang.cli.serve",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
)
READ_LATE = ("KVPLUG_", "LAB_SGLANG_", "SGLANG_PLUGINS", "SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_TEST_")
"""Variables that nothing looks at while SGLang is imported."""
START_S = 420.0
MESSAGE_BYTES = 1 << 20
HIGH_FD = 400
"""Where descriptors are parked on their way to the numbers that they have to get."""


class Forked:
    """A process that the zygote has forked: what :class:`subprocess.Popen` would say of it."""

    def __init__(self, pid: int, news: socket.socket, command: Sequence[str]) -> None:
        self.pid = pid
        self.args = list(command)
        self.returncode: int | None = None
        self._news = news

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with self._news:
                told = self._news.recv(64)
            self.returncode = int(told) if told else -signal.SIGKILL  # the zygote itself is gone, and took it along
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class _Zygote:
    def __init__(self, version: str) -> None:
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        code = f"from tests.sglang_lab import zygote; zygote.main({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=base_env(version=version),
            cwd=str(ROOT),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        self._log: list[bytes] = []
        threading.Thread(target=self._read_log, daemon=True).start()
        theirs.close()
        self._control = ours
        self._forked: list[Forked] = []

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        self._log.extend(self._process.stderr)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def idle(self) -> bool:
        self._forked = [process for process in self._forked if process.poll() is None]
        return not self._forked

    def close(self) -> None:
        """Ends it, with what it has forked."""
        self._control.close()
        self._process.wait(EXIT_S)

    def fork(self, command: Sequence[str], env: Mapping[str, str], log: Path, spares: int) -> Forked:
        asked = {"argv": list(command), "env": dict(env), "log": str(log), "spares": spares}
        news, theirs = socket.socketpair()
        with self._lock, theirs, contextlib.suppress(OSError):
            socket.send_fds(self._control, [json.dumps(asked).encode() + b"\n"], [theirs.fileno()])
        if select.select([news], [], [], START_S)[0] and (told := news.recv(64)):
            forked = Forked(int(told), news, command)
            self._forked.append(forked)
            return forked
        said = b"".join(self._log[-20:]).decode(errors="replace")
        raise EngineError(f"SGLang could not be imported within {START_S} s:\n{said}")


_zygotes: dict[str, _Zygote] = {}
_lock = threading.Lock()


def may_fork(env: Mapping[str, str | None] | None) -> bool:
    """Whether a server with these variables of its own may be forked: none is read while SGLang is imported."""
    return all(name.startswith(READ_LATE) for name in env or ())


def fork_server(
    command: Sequence[str], env: Mapping[str, str], log: Path, *, version: str = MAIN, spares: int
) -> Forked:
    """Starts ``sglang`` with the arguments *command*, in a session of its own. *spares*: processes that it will spawn.

    The first one waits until SGLang is imported. Raises EngineError where that fails.
    """
    with _lock:
        for other in [v for v, zygote in _zygotes.items() if v not in (MAIN, version) and zygote.idle]:
            _zygotes.pop(other).close()  # half a gigabyte each
        if version not in _zygotes or not _zygotes[version].alive:
            _zygotes[version] = _Zygote(version)
    return _zygotes[version].fork(command, env, log, spares)


# ---- inside the zygote -----------------------------------------------------------------------------------------------


def main(control: int) -> None:
    """Imports, forks on request, and ends with the process that holds the other end, with all that it has forked."""
    setproctitle.setproctitle("sglang lab: imports")  # it looks for its room once, before the environment is replaced
    for name in PRELOAD:
        importlib.import_module(name)
    _preload_models()
    gc.collect()
    gc.freeze()
    run = _serve(socket.socket(fileno=control))
    if run is not None:  # in a forked process
        run()


def _preload_models() -> None:
    """The classes of all models, which a scheduler would import one by one."""
    from sglang.srt.models import registry

    registry.import_model_classes("sglang.srt.models")


def _serve(control: socket.socket) -> Callable[[], None] | None:
    """Answers what a forked process has to run; None at the end."""
    children: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process
    while True:
        ready = select.select([control, *children], [], [])[0]
        for handle in ready:
            if handle is control:
                continue
            pid, news = children.pop(handle)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(handle)
            with news, contextlib.suppress(OSError):
                news.send(str(status).encode())
        if control not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
        if not data:
            for pid, _ in children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        while not data.endswith(b"\n"):
            data += control.recv(MESSAGE_BYTES)
        asked = json.loads(data)
        news = socket.socket(fileno=fds[0])
        pid = os.fork()
        if pid == 0:
            for handle, (_, other) in children.items():
                os.close(handle)
                other.close()
            control.close()
            news.close()
            return lambda: _become_server(asked)
        children[os.pidfd_open(pid)] = (pid, news)
        news.send(str(pid).encode())


def _become_server(asked: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(asked["env"])
    spares: list[tuple[int, socket.socket]] = []
    for _ in range(asked["spares"]):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for _, other in spares:
                other.close()
            ours.close()
            _become_spawned(theirs)
            return
        theirs.close()
        spares.append((pid, ours))
    _spawn_from(spares)
    setproctitle.setproctitle("sglang " + " ".join(asked["argv"]))
    sys.argv = ["sglang", *asked["argv"]]
    importlib.import_module("sglang.cli.main").main()


def _spawn_from(spares: list[tuple[int, socket.socket]]) -> None:
    """Makes *spawn* take the waiting processes first."""
    start_fresh = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path: Any, args: Sequence[Any], passfds: Sequence[int]) -> int:
        found = re.search(r"spawn_main\(tracker_fd=(\d+), pipe_handle=(\d+)\)", " ".join(map(os.fsdecode, args)))
        if found is None or not spares:
            return start_fresh(path, args, passfds)
        pid, to = spares.pop(0)
        told = {
            "tracker_fd": int(found[1]),
            "pipe_handle": int(found[2]),
            "env": dict(os.environ),
            "cwd": str(Path.cwd()),
            "fds": [int(fd) for fd in passfds],
        }
        with to:
            socket.send_fds(to, [json.dumps(told).encode() + b"\n"], told["fds"])
        return pid

    multiprocessing.util.spawnv_passfds = spawnv_passfds  # type: ignore[assignment]


def _become_spawned(control: socket.socket) -> None:
    """Waits for what ``spawn`` would have put on a command line, and goes on as it would."""
    data, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 64)
    while data and not data.endswith(b"\n"):
        data += control.recv(MESSAGE_BYTES)
    control.close()
    if not data:  # the server ended without it
        return
    told = json.loads(data)
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(parked, told["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    sys.argv = ["-c", "--multiprocessing-fork"]
    multiprocessing.spawn.spawn_main(tracker_fd=told["tracker_fd"], pipe_handle=told["pipe_handle"])
