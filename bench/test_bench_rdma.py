"""Between hosts, on loopback: a second pool fetches from the first one's agent, beside one plain TCP stream.

Ratios are of rounds measured one right after the other. A fetch has more threads than the stream, and so gets more of
a machine that others use too: beside the ratio stands what both ends' CPU time was, of the stream's.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.harness import KIB, MIB, keys, room_for
from bench.rdma_hosts import POOL_BYTES, Hosts, Stream, cpu, wait_until_mapped
from kvplug.remote.process import FetchProcess
from kvplug.shm import segment

READ_BYTES = 128 * MIB
ROUNDS = 15
BESIDE_ROUNDS = 5
FETCH_S = 60.0
Figure = Callable[..., None]


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
    start = hosts.owner.data_offset
    into = stream.target(READ_BYTES)
    stream_s: list[float] = []
    copies_s: list[float] = []
    cpu_s = {"fetch": 0.0, "stream": 0.0}

    def setup() -> None:
        hosts.reader.remove(wanted)
        used, began = cpu(stream.process), time.perf_counter()
        stream.receive(start, into)
        stream_s.append(time.perf_counter() - began)
        cpu_s["stream"] += cpu(stream.process) - used
        began = time.perf_counter()
        stream.receive(start, into, copies=True)
        copies_s.append(time.perf_counter() - began)

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
    speeds = [READ_BYTES / statistics.median(s) / 1e9 for s in (fetch_s, stream_s, copies_s)]
    cost = cpu_s["fetch"] / cpu_s["stream"]
    beside = "fetch {:.2f} GB/s, stream {:.2f} (by send {:.2f}); CPU {:.2f} times the stream's".format(*speeds, cost)
    size = f"{block // KIB}KiB" if block < MIB else f"{block // MIB}MiB"
    figure(f"fetch_{size}", ratio, rounds=ROUNDS, beside=beside)


LOOP = "while True: sum(i for i in range(100))"


class PythonLoop(threading.Thread):
    """Runs Python without a pause, as a scheduler under load does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            sum(i for i in range(100))

    def waited_s(self) -> float:
        """Seconds that it neither ran nor waited for a core: those in which it wanted the interpreter."""
        ran, queued = map(int, Path(f"/proc/self/task/{self.native_id}/schedstat").read_text().split()[:2])
        return time.perf_counter() - (ran + queued) / 1e9

    def stop(self) -> None:
        self._over.set()
        self.join()


def test_beside_python(benchmark: Any, hosts: Hosts, figure: Figure) -> None:
    """What a fetch takes from a thread of its process that always wants the interpreter, and that thread from it.

    By the process that fetches for an engine. Beside it: alone, and with such a thread in a process that has nothing to
    do with the fetch, which takes as much of the machine.
    """
    waits: list[float] = []
    said: list[str] = []
    process = FetchProcess(hosts.reader, hosts.reader.config.with_changes(peers=(hosts.address,)), 1)

    while process.pid is None:
        time.sleep(0.1)
    wait_until_mapped(process.pid)

    def fetch() -> None:
        codes, _ = process.fetch(hosts.address, wanted, time.monotonic() + FETCH_S)
        assert not codes.any(), np.unique(codes, return_counts=True)

    for size, block in (("16 KiB", 16 * KIB), ("256 KiB", 256 * KIB), ("2 MiB", 2 * MIB)):
        n = READ_BYTES // block
        wanted = keys(n, block + 1)
        assert not hosts.owner.put(wanted, np.ones((n, block), np.uint8)).any()
        speeds = []
        for beside in ("nothing", "another process", "a thread"):
            loop = PythonLoop() if beside == "a thread" else None
            other = subprocess.Popen([sys.executable, "-c", LOOP]) if beside == "another process" else None
            took, waited = [], 0.0
            for _ in range(1 + BESIDE_ROUNDS):
                hosts.reader.remove(wanted)
                before, began = loop.waited_s() if loop else 0.0, time.perf_counter()
                fetch()
                took.append(time.perf_counter() - began)
                waited += loop.waited_s() - before if loop else 0.0
            if loop:
                loop.stop()
                waits.append(max(0.0, waited / sum(took) * 100))
            if other:
                other.kill()
                other.wait(10)
            speeds.append(READ_BYTES / statistics.median(took[1:]) / 1e9)
        said.append(
            "{}: {:.0f} %, fetch {:.2f} GB/s; {:.2f} beside a process, {:.2f} alone".format(
                size, waits[-1], *speeds[::-1]
            )
        )
        hosts.reader.remove(wanted)
        if size != "2 MiB":
            hosts.owner.remove(wanted)

    def forget() -> None:
        hosts.reader.remove(wanted)

    benchmark.pedantic(fetch, setup=forget, rounds=3)
    process.close()
    forget()
    hosts.owner.remove(wanted)
    figure("fetch_beside_python", max(waits), rounds=BESIDE_ROUNDS, beside="; ".join(said))


def test_lookup_round_trip(benchmark: Any, hosts: Hosts, figure: Figure) -> None:
    """2048 keys, all there: asked, pinned, answered, and released."""
    from kvplug.rdma.control.protocol import Leased, Lookup, Release, Released, check_leased

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
