"""Between hosts, on loopback: a second pool fetches from the first one's agent, beside one plain TCP stream.

Ratios are of rounds measured one right after the other. A fetch has more threads than the stream, and so gets more of
a machine that others use too: beside the ratio stands what both ends' CPU time was, of the stream's.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.harness import KIB, MIB, keys, room_for
from bench.rdma_hosts import POOL_BYTES, Hosts, Stream, cpu
from kvplug.shm import segment

READ_BYTES = 128 * MIB
ROUNDS = 15
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
