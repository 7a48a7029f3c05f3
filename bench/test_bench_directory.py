"""The directory on a real server over loopback: a million names written, and 2048 keys read in one round trip.

Changes come in batches as the event ring gives them, without a pool behind: storing a million blocks is measured
elsewhere. Everything else is as on a host: names made under the secret, batches packed, sent and answered.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.harness import keys
from kvplug.rdma.directory.directory import Directory
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.publisher import Publisher
from kvplug.rdma.directory.resp import Connection, Endpoint, command
from tests.rdma.redis_server import RedisServer, binaries

MILLION = 1_000_000
EVENTS = 1 << 14
BATCH = 2048
ROUNDS = 60
HOSTS = 4
DONE_S = 300.0

U8 = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass
class Batch:
    keys: U8
    sealed: np.ndarray[Any, np.dtype[np.bool_]]
    lapped: bool = False


class Sealed:
    """A feed: these keys are there at first, those are sealed later."""

    retired = False

    def __init__(self, there: U8, later: U8) -> None:
        self._there = there
        self._batches = [later[at : at + EVENTS] for at in range(0, len(later), EVENTS)][::-1]

    def read(self) -> Batch:
        some = self._batches.pop() if self._batches else np.empty((0, 32), np.uint8)
        return Batch(some, np.ones(len(some), np.bool_))

    def scan(self, wanted: Callable[[U8], Any] | None = None) -> U8:
        return self._there if wanted is None else self._there[wanted(self._there)]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    if not binaries():
        pytest.skip("no redis-server and no valkey-server is installed")
    made = RedisServer()
    yield made
    made.close()


def publisher(server: RedisServer, feed: Sealed, host_id: str) -> Publisher:
    made = Publisher(
        feed, Endpoint.parse(server.url), Names(b"bench"), host_id=host_id, address=f"{host_id}:1", ttl_s=60
    )
    made.start()
    return made


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DONE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_million_names_written(benchmark: Any, server: RedisServer, figure: Callable[..., None]) -> None:
    all_keys, none = keys(MILLION, 1), np.empty((0, 32), np.uint8)
    seconds: dict[str, float] = {}

    def write(how: str) -> None:
        server.witness().flushall()
        feed = Sealed(none, all_keys) if how == "changes" else Sealed(all_keys, none)
        began = time.perf_counter()
        made = publisher(server, feed, how)
        until(lambda: made.stats().entries == MILLION)
        seconds[how] = time.perf_counter() - began
        made.stop()

    write("begin")
    benchmark.pedantic(write, args=("changes",), rounds=1)
    at_start = f"compared with the pool at start: {MILLION / seconds['begin'] / 1e3:.0f} thousand"
    figure("directory_publish", MILLION / seconds["changes"] / 1e3, rounds=1, beside=at_start)


def test_2048_keys_read(benchmark: Any, server: RedisServer, figure: Callable[..., None]) -> None:
    all_keys, none = keys(MILLION, 1), np.empty((0, 32), np.uint8)
    names, endpoint = Names(b"bench"), Endpoint.parse(server.url)
    hosts = [publisher(server, Sealed(all_keys, none), "h0")]
    until(lambda: hosts[0].stats().reconciled == BUCKETS)
    reader = Directory(endpoint, names, ttl_s=3, timeout_s=5.0)
    rng = np.random.default_rng(2)

    def look_up(wanted: U8, n_hosts: int) -> None:
        hits = reader.lookup(wanted)
        assert hits.known
        assert hits.have.shape == (n_hosts, BATCH)
        assert hits.have.all()

    def setup(n_hosts: int) -> tuple[tuple[U8, int], dict[str, Any]]:
        return (all_keys[rng.integers(0, MILLION, BATCH)], n_hosts), {}

    try:
        until(lambda: len(reader.peers()) == 1 and reader.stats().is_connected)
        benchmark.pedantic(look_up, setup=lambda: setup(1), rounds=ROUNDS, warmup_rounds=3)
        ping = Connection.open(endpoint, time.monotonic() + 5)
        pings = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            ping.call(time.monotonic() + 5, command("PING"))
            pings.append(time.perf_counter() - began)
        ping.close()
        hosts += [publisher(server, Sealed(all_keys, none), f"h{i}") for i in range(1, HOSTS)]
        until(lambda: all(host.stats().reconciled == BUCKETS for host in hosts) and len(reader.peers()) == HOSTS)
        all_hosts = []
        for _ in range(ROUNDS):
            (wanted, n_hosts), _none = setup(HOSTS)
            began = time.perf_counter()
            look_up(wanted, n_hosts)
            all_hosts.append(time.perf_counter() - began)
        began = time.perf_counter()
        names.of(all_keys[:BATCH])
        mac_ms = (time.perf_counter() - began) * 1e3
    finally:
        reader.close()
        for host in hosts:
            host.stop()
    figure(
        "directory_lookup",
        benchmark.stats.stats.median * 1e3,
        rounds=ROUNDS,
        beside=f"a PING {statistics.median(pings) * 1e3:.2f} ms; making the names {mac_ms:.1f} ms; "
        f"best {benchmark.stats.stats.min * 1e3:.1f} ms; of {HOSTS} hosts {statistics.median(all_hosts) * 1e3:.1f} ms",
    )
