"""Two hosts on one machine, and the plain TCP stream that a fetch between them is compared with.

The reference moves as many bytes from the same segment into shared memory of its own, through one connection that does
nothing but sendfile and recv_into: no keys, no lease, no checksum, no seal. Agent and reference's sender are processes
of their own.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import GIB, config, pool_name, remove_pool, wait_for_memory
from bench.others import cpu_s
from kvplug import KvStore, hostmem
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.pool_blocks import PoolExchange

POOL_BYTES = 2 * GIB
SENDER = Path(__file__).resolve().parent / "rdma_stream.py"
KEY = "a key for benchmarks only"


class Stream:
    """The reference's receiving end."""

    def __init__(self, path: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.process = subprocess.Popen([sys.executable, SENDER, path, str(listener.getsockname()[1])])
            self._sock, _ = listener.accept()

    def receive(self, at: int, into: memoryview, *, copies: bool = False) -> None:
        """The bytes of the file from ``at`` on. ``copies``: sent by `send`, not by `sendfile`."""
        self._sock.sendall(struct.pack("<qqq", at, len(into), copies))
        got = 0
        while got < len(into):
            got += self._sock.recv_into(into[got:])

    def target(self, nbytes: int) -> memoryview:
        """Shared memory, mapped whole: what slots are, in pages of the same size."""
        with tempfile.TemporaryFile(dir=hostmem.DEV_SHM) as file:
            file.truncate(nbytes)
            memory = np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)
        memory[:] = 1
        return memory.data

    def close(self) -> None:
        """Hang up; the sender ends."""
        self._sock.close()
        self.process.wait(10)


def wait_until_mapped(pid: int, timeout_s: float = 60.0) -> None:
    """Until a process has mapped its pool, which it does in the background and with a core."""
    deadline = time.monotonic() + timeout_s
    used = cpu_s(pid)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        before, used = used, cpu_s(pid)
        if used - before < 0.05:
            return
    raise TimeoutError(f"process {pid} still works after {timeout_s:g} s")


class Hosts:
    """Two pools, the first one's agent, and a reader in this process."""

    def __init__(self) -> None:
        self.names = pool_name(), pool_name()
        ours = [config(name, POOL_BYTES, auth_key=KEY) for name in self.names]
        self.owner, self.reader = (KvStore(config=c) for c in ours)
        for store in (self.owner, self.reader):
            wait_for_memory(store)
        settings = {k: v for k, v in os.environ.items() if not k.startswith("KVPLUG_")}
        settings |= {"KVPLUG_POOL": self.names[0], "KVPLUG_SIZE": str(POOL_BYTES), "KVPLUG_AUTH_KEY": KEY}
        settings |= {"KVPLUG_AGENT_PIN_SHARE": "1", "KVPLUG_PIN_BUDGET_SHARE": "1"}
        self.agent = subprocess.Popen(
            [sys.executable, "-c", "from kvplug.cli import main; main()", "agent", "--listen", "127.0.0.1:0"],
            env=settings,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.agent.stdout is not None
        self.address = self.agent.stdout.readline().split()[-1]
        self.peer = Peer(self.address, PoolExchange(self.reader), ours[1])
        wait_until_mapped(self.agent.pid)

    def close(self) -> None:
        """End everything."""
        self.peer.close()
        self.agent.terminate()
        assert self.agent.wait(10) == 0
        for store, name in zip((self.owner, self.reader), self.names, strict=True):
            store.close()
            remove_pool(name)


def cpu(other: subprocess.Popen[Any]) -> float:
    """Seconds of CPU that this process and another one have used."""
    return time.process_time() + cpu_s(other.pid)
