"""Hosts that a test makes: a pool each, an agent in this process or in one of its own, and a link that breaks on cue.

Two pools of one machine are two hosts to everything here: nothing but the agent's connections leads from one to the
other.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug import KvStore
from kvplug.config import Config
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.shm import copy as copies
from tests.pool.children import Child, blocks, check_bytes, keys, put

BLOCK = 64 << 10
KEY = "a key for the tests of kvplug"
SOON_S = 60.0
U8 = npt.NDArray[np.uint8]
__all__ = ["BLOCK", "KEY", "Child", "Host", "Proxy", "blocks", "certificates", "check_bytes", "keys", "put", "until"]


def checksums(store: KvStore, offsets: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """XXH3 (its bits) of ranges of a segment: offsets from its start and bytes, int64[N]."""
    out = np.empty(len(offsets), np.int64)
    copies.hash_batch(store.base_address + offsets, np.array(nbytes, np.int64), out)
    return out


def until(condition: Callable[[], object], timeout_s: float = SOON_S) -> None:
    """Wait for it; AssertionError if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.005)


class Host:
    """One pool and what serves and reads it. ``settings`` are Config's."""

    def __init__(self, pool: str, **settings: Any) -> None:
        base = {"pool": pool, "size": "32mib", "lock_timeout_s": 5.0, "agent_listen": "127.0.0.1:0", "auth_key": KEY}
        base |= {"quarantine_grace_s": 0.05, "peer_timeout_s": 5.0, "peer_connections": 2}
        self.config = Config(**(base | settings))
        self.store = KvStore(config=self.config)
        self.exchange = PoolExchange(self.store)
        self._agents: list[Agent] = []
        self._peers: list[Peer] = []
        self._children: list[Child] = []

    def agent(self, **changes: Any) -> Agent:
        """An agent on this host's pool, in this process."""
        agent = Agent(self.exchange, self.config.with_changes(**changes))
        self._agents.append(agent)
        agent.start()
        stop = threading.Event()
        thread = threading.Thread(target=agent.serve, args=(stop,), daemon=True)
        thread.start()
        closing = agent.close

        def close() -> None:
            stop.set()
            thread.join(SOON_S)
            closing()

        agent.close = close  # type: ignore[method-assign]
        return agent

    def agent_process(self, **changes: Any) -> tuple[Child, str]:
        """An agent in a process of its own, with a store of its own: (process, address)."""
        near, far = Pipe()
        config = self.config.with_changes(**changes)

        def body() -> None:
            store = KvStore(config=config, create=False)
            agent = Agent(PoolExchange(store), config)
            stop = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            far.send(agent.start())
            agent.serve(stop)
            agent.close()
            store.close()

        child = Child(body)
        self._children.append(child)
        far.close()
        assert near.poll(SOON_S), "the agent does not start"
        return child, near.recv()

    def peer(self, address: str, **changes: Any) -> Peer:
        """What fetches from the agent there into this host's pool."""
        peer = Peer(address, self.exchange, self.config.with_changes(**changes))
        self._peers.append(peer)
        return peer

    def holds(self, of: U8, nbytes: int = BLOCK) -> int:
        """How many of these keys are here; every one that is has the right bytes."""
        return check_bytes(self.store, of, nbytes, may_miss=True)

    def close(self) -> None:
        """Hang up, stop, leave."""
        for closing in (*self._peers, *self._agents):
            closing.close()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                if child.status is None:
                    child.signal(signal.SIGCONT)
            child.kill()
        self.store.close()


class Fault:
    """What a link does at one byte: ``cut``, ``stall`` (nothing passes any more), ``flip`` (a bit), ``delay``."""

    def __init__(
        self, kind: str, connection: int, to_agent: bool, at: int, act: Callable[[], object] | None = None
    ) -> None:
        self.kind, self.connection, self.to_agent, self.at, self.act = kind, connection, to_agent, at, act
        self.happened = threading.Event()

    def __repr__(self) -> str:
        way = "to the agent" if self.to_agent else "to the reader"
        return f"{self.kind} at byte {self.at} {way} of connection {self.connection}"


class Proxy:
    """A link between a reader and an agent: passes bytes on until a fault says otherwise."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.upstream = ""
        self.fault: Fault | None = None
        self.passed: list[list[int]] = []
        """Bytes so far of each connection: [to the agent, to the reader]."""
        self.recorded: list[tuple[bytearray, bytearray]] = []
        self.taking = threading.Event()
        """Cleared: nothing is taken from either end, so that what was sent waits in the senders' sockets."""
        self.taking.set()
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            host, _, port = self.upstream.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), 5)
            except (OSError, ValueError):  # nobody there, or not yet
                near.close()
                continue
            self._sockets += [near, far]
            number = len(self.passed)
            self.passed.append([0, 0])
            self.recorded.append((bytearray(), bytearray()))
            threading.Thread(target=self._pump, args=(number, near, far), daemon=True).start()

    def _pump(self, number: int, near: socket.socket, far: socket.socket) -> None:
        with near, far, contextlib.suppress(OSError, ValueError):
            while not self._ended.is_set():
                for source in select.select([near, far], [], [], 0.1)[0]:
                    way = 0 if source is near else 1
                    if not self.taking.wait(SOON_S):
                        return
                    data = source.recv(1 << 16)
                    if not data or not self._pass(number, way, bytearray(data), far if way == 0 else near):
                        return

    def _pass(self, number: int, way: int, data: bytearray, target: socket.socket) -> bool:
        begin = self.passed[number][way]
        self.passed[number][way] += len(data)
        if len(self.recorded[number][way]) < 1 << 16:
            self.recorded[number][way].extend(data)
        fault = self.fault
        if fault and fault.connection == number and fault.to_agent == (way == 0):
            at = fault.at - begin
            if 0 <= at < len(data) and not fault.happened.is_set():
                fault.happened.set()
                if fault.kind == "cut":
                    target.sendall(data[:at])
                    raise OSError
                if fault.kind == "stall":
                    target.sendall(data[:at])
                    self._ended.wait(SOON_S)
                    return False
                if fault.kind == "flip":
                    data[at] ^= 0x10
                if fault.kind == "delay":
                    time.sleep(0.1)
                if fault.act is not None:
                    fault.act()
        target.sendall(data)
        return True

    def cut(self) -> None:
        """Cut every connection that there is."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        self._ended.set()
        self.taking.set()
        self._listener.close()
        self.cut()
        self._thread.join(SOON_S)
        for sock in self._sockets:
            sock.close()


def random_fault(rng: random.Random, kind: str, lengths: list[list[int]]) -> Fault:
    """A fault at a byte that a fetch without faults has passed. ``lengths``: as :attr:`Proxy.passed` had them."""
    number = rng.randrange(len(lengths))
    to_agent = rng.random() < 0.5
    most = lengths[number][0 if to_agent else 1]
    early = rng.random() < 0.5  # frames are few bytes beside blocks
    return Fault(kind, number, to_agent, rng.randrange(min(most, 600) if early else most))


def certificates(folder: Path) -> dict[str, dict[str, str]]:
    """Made by openssl: settings of hosts "a" and "b", whose CA is one, and of "stranger", whose CA is another."""

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True, timeout=60)

    (folder / "san.txt").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for ca in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 2,
                "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")  # fmt: skip
    made = {}
    for name, ca in (("a", "ca"), ("b", "ca"), ("stranger", "other")):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", 2, "-extfile", "san.txt", "-out", f"{name}.pem")  # fmt: skip
        made[name] = {
            "tls_cert": os.fspath(folder / f"{name}.pem"),
            "tls_key": os.fspath(folder / f"{name}.key"),
            "tls_ca": os.fspath(folder / "ca.pem"),
        }
    return made


def two(
    make: Callable[..., Host], n: int = 64, *, seed: int = 7, nbytes: int = BLOCK, **settings: Any
) -> Iterator[Any]:
    """Owner with ``n`` blocks, reader without, and their keys."""
    owner, reader = make(**settings), make(**settings)
    of = keys(n, seed)
    assert (put(owner.store, of, nbytes) == 0).all()
    yield from (owner, reader, of)
