"""Between hosts, on loopback: a second pool fetches from the first one's agent, beside one plain TCP stream.

The reference moves as many bytes from the same segment into shared memory of its own, through one connection that does
nothing but sendfile and recv_into: no keys, no lease, no checksum, no seal. Agent and reference's sender are processes
of their own. Ratios are of rounds measured one right after the other. A fetch has more threads than the stream, and so
gets more of a machine that others use too: beside the ratio stands what both ends' CPU time was, of the stream's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bench.harness import GIB, KIB, MIB, config, keys, pool_name, remove_pool, room_for, wait_for_memory
from kvplug import KvStore, hostmem
from kvplug.exchange import PoolExchange
from kvplug.rdma.remote import Peer
from kvplug.shm import segment

POOL_BYTES = GIB
READ_BYTES = 128 * MIB
ROUNDS = 15
SENDER = Path(__file__).resolve().parent / "rdma_stream.py"
KEY = "a key for benchmarks only"
Figure = Callable[..., None]


class Stream:
    """The reference's receiving end."""

    def __init__(self, path: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.process = subprocess.Popen([sys.executable, SENDER, path, str(listener.getsockname()[1])])
            self._sock, _ = listener.accept()

    def receive(self, at: int, into: memoryview) -> None:
        """The bytes of the file from ``at`` on."""
        self._sock.sendall(struct.pack("<qq", at, len(into)))
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
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in (os.getpid(), other.pid))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not room_for(2 * POOL_BYTES):
        pytest.skip("not enough memory to spare")
    both = Hosts()
    with contextlib.closing(both):
        yield both


@pytest.mark.parametrize("block", [16 * KIB, 256 * KIB, 2 * MIB], ids=["16KiB", "256KiB", "2MiB"])
def test_fetch(benchmark: Any, hosts: Hosts, figure: Figure, block: int) -> None:
    n = READ_BYTES // block
    wanted = keys(n, block)
    assert not hosts.owner.put(wanted, np.ones((n, block), np.uint8) * np.arange(n, dtype=np.uint8)[:, None]).any()
    stream = Stream(segment.segment_path(hosts.names[0]))
    start = hosts.owner.pool.geometry.data_offset
    into = stream.target(READ_BYTES)
    stream_s: list[float] = []
    cpu_s = {"fetch": 0.0, "stream": 0.0}

    def setup() -> None:
        hosts.reader.remove(wanted)
        used, began = cpu(stream.process), time.perf_counter()
        stream.receive(start, into)
        stream_s.append(time.perf_counter() - began)
        cpu_s["stream"] += cpu(stream.process) - used

    def fetch() -> None:
        used = cpu(hosts.agent)
        codes = hosts.peer.fetch(wanted)
        cpu_s["fetch"] += cpu(hosts.agent) - used
        assert not codes.any(), np.unique(codes, return_counts=True)

    benchmark.pedantic(fetch, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    fetch_s = list(benchmark.stats.stats.data)
    ratio = statistics.median(s / f for s, f in zip(stream_s[-ROUNDS:], fetch_s, strict=True))
    stream.close()
    hosts.reader.remove(wanted)
    hosts.owner.remove(wanted)
    speeds = [READ_BYTES / statistics.median(s) / 1e9 for s in (fetch_s, stream_s)]
    cost = cpu_s["fetch"] / cpu_s["stream"]
    beside = "fetch {:.2f} GB/s, stream {:.2f} GB/s; CPU {:.2f} times the stream's".format(*speeds, cost)
    size = f"{block // KIB}KiB" if block < MIB else f"{block // MIB}MiB"
    figure(f"fetch_{size}", ratio, rounds=ROUNDS, beside=beside)


def test_lookup_round_trip(benchmark: Any, hosts: Hosts, figure: Figure) -> None:
    """2048 keys, all there: asked, pinned, answered, and released."""
    from kvplug.rdma.protocol import Leased, Lookup, Release, Released, check_leased

    wanted = keys(2048, 77)
    assert not hosts.owner.put(wanted, np.ones((2048, 16 * KIB), np.uint8)).any()
    link, raw = hosts.peer.link, wanted.tobytes()
    alone: list[float] = []

    def look_up() -> None:
        began = time.perf_counter()
        answer = link.ask(Lookup(raw, 5.0), Leased, time.monotonic() + 5)
        blocks = check_leased(answer, 2048)
        alone.append(time.perf_counter() - began)
        assert len(blocks.offsets) == 2048
        assert link.ask(Release((answer.lease,)), Released, time.monotonic() + 5).count == 1

    benchmark.pedantic(look_up, rounds=100, warmup_rounds=5)
    hosts.owner.remove(wanted)
    both = benchmark.stats.stats.median * 1e3
    figure("fetch_lookup", statistics.median(alone) * 1e3, rounds=100, beside=f"with its release {both:.2f} ms")
