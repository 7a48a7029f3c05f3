"""What the tests of the directory share: pools of their own, hosts that publish, readers, waiting with a deadline."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvplug.config import Config
from kvplug.rdma.directory.directory import Directory, Hits
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.publisher import Publisher
from kvplug.rdma.directory.resp import Endpoint
from kvplug.shm import segment
from kvplug.shm.jit import warm_up
from kvplug.store import KvStore
from tests.rdma.redis_server import Delay, RedisServer

U8 = npt.NDArray[np.uint8]
SECRET: Final = b"a secret of all the hosts"
BLOCK: Final = 4096
TTL_S: Final = 6.0
POLL_TTL_S: Final = 0.9
"""Readers look for members three times in this."""
WAIT_S: Final = 120.0
"""Longer than a busy machine starves anybody."""
_numbers = itertools.count()


def keys(n: int, seed: int) -> U8:
    """``n`` random keys, (n, 32)."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def put(store: KvStore, of: U8) -> None:
    """Store a small block under each key."""
    assert (store.put(of, np.zeros((len(of), BLOCK), np.uint8)) >= 0).all()


def wait_for(what: Callable[[], Any], why: str = "", timeout_s: float = WAIT_S) -> Any:
    """Until ``what()`` is true; its answer."""
    deadline = time.monotonic() + timeout_s
    while not (answer := what()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {why}"
        time.sleep(0.01)
    return answer


def new_pool_name() -> str:
    return f"t-dir-{os.getpid()}-{next(_numbers)}"


def remove_pool(name: str) -> None:
    """Unlink pool and lock file of a name that is a test's own."""
    for leftover in (segment.segment_path(name), segment.lock_path(name)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(leftover)


def open_pool(name: str, size: str = "16mib") -> KvStore:
    warm_up()
    return KvStore(config=Config(pool=name, size=size, min_block=BLOCK, lock_timeout_s=5.0))


@contextlib.contextmanager
def a_pool(size: str = "16mib") -> Iterator[KvStore]:
    """A store on a pool of its own, removed afterwards."""
    name = new_pool_name()
    store = open_pool(name, size)
    try:
        yield store
    finally:
        store.close()
        remove_pool(name)


def publisher(server: RedisServer, store: KvStore, host_id: str, *, ttl_s: float = TTL_S) -> Publisher:
    """A host that publishes what ``store`` has; started."""
    made = Publisher(
        store.feed(),
        Endpoint.parse(server.url),
        Names(SECRET),
        host_id=host_id,
        address=f"{host_id}.test:9410",
        ttl_s=ttl_s,
    )
    made.start()
    return made


@contextlib.contextmanager
def a_host(
    server: RedisServer, host_id: str, *, size: str = "16mib", ttl_s: float = TTL_S
) -> Iterator[tuple[KvStore, Publisher]]:
    """A pool and its publisher."""
    with a_pool(size) as store:
        told = publisher(server, store, host_id, ttl_s=ttl_s)
        try:
            yield store, told
        finally:
            told.stop()


@contextlib.contextmanager
def a_reader(
    server: RedisServer | Delay, *, ttl_s: float = POLL_TTL_S, timeout_s: float = 5.0, own_id: str | None = None
) -> Iterator[Directory]:
    """A reader of the directory."""
    made = Directory(Endpoint.parse(server.url), Names(SECRET), ttl_s=ttl_s, timeout_s=timeout_s, own_id=own_id)
    try:
        yield made
    finally:
        made.close()


def ids(reader: Directory) -> set[str]:
    """Ids of the peers that the reader knows now."""
    return {peer.id for peer in reader.peers()}


def counts(hits: Hits) -> dict[str, int]:
    """Number of keys that each peer is said to have."""
    return {peer.id: int(n) for peer, n in zip(hits.peers, hits.have.sum(axis=1), strict=True)}


def is_settled(store: KvStore, told: Publisher, server: RedisServer) -> bool:
    """Whether what the server has of this host is exactly what its pool has, as another client sees it."""
    names = Names(SECRET)
    witness = server.witness()
    there: set[bytes] = set()
    for bucket in range(BUCKETS):
        there |= witness.smembers(names.has(told.me.id, told.me.epoch, bucket))  # type: ignore[arg-type]
    return there == {name.tobytes() for name in names.of(store.feed().scan())}
