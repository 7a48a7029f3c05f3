"""An error that nobody foresaw in any of the loops: each is begun again and does its work, or says that it failed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

from kvplug.errors import Code, NamespaceError, PeerError, VerbsError
from kvplug.identity.weights import WeightsProbe
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.agent.cachenode import CacheNode
from kvplug.rdma.agent.offers import Offerer
from kvplug.rdma.control import link as link_module
from kvplug.rdma.data.tcp import TcpPath
from kvplug.rdma.directory.directory import Directory
from kvplug.rdma.reader.remote import Peer
from kvplug.rdma.verbs.regions import Regions
from kvplug.remote import fetcher as fetching
from kvplug.remote.process import FetchProcess, _Running
from kvplug.shm import layout as lay
from kvplug.shm.feed import BlockFeed
from kvplug.shm.pool import Pool
from kvplug.threads import troubles
from tests.inside import pool_of
from tests.rdma.directory_parts import a_host, a_pool, a_reader, ids, is_settled, wait_for
from tests.rdma.directory_parts import put as put_blocks
from tests.rdma.hosts import BLOCK, Host, keys, put
from tests.rdma.redis_server import RedisServer

MakeHost = Callable[..., Host]
WAIT_S: Final = 60.0


class UnforeseenError(Exception):
    """What no loop expects."""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    made = RedisServer()
    yield made
    made.close()


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """``raising(owner, name, when)``: from now on that raises once; its calls so far."""

    def make(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> list[int]:
        inner = getattr(owner, name)
        calls: list[int] = []

        def outer(*arguments: Any, **named: Any) -> Any:
            if not calls and when(*arguments):
                calls.append(1)
                raise UnforeseenError(f"in {name}")
            if calls:
                calls.append(1)
            return inner(*arguments, **named)

        monkeypatch.setattr(owner, name, outer)
        return calls

    return make


def noted(name: str, before: dict[str, int]) -> bool:
    return troubles().errors.get(name, 0) == before.get(name, 0) + 1


def test_the_reader_of_the_directory(server: RedisServer, raising: Any) -> None:
    server.witness().flushall()
    before = troubles().errors
    with a_reader(server) as reader:
        assert reader.wait_ready(WAIT_S)
        calls = raising(Directory, "_poll")
        wait_for(lambda: len(calls) >= 2, timeout_s=WAIT_S)
        assert noted("kvplug-directory", before)
        with a_host(server, "later") as (store, told):
            put_blocks(store, keys(5, 1))
            wait_for(lambda: is_settled(store, told, server) and ids(reader) == {"later"}, timeout_s=WAIT_S)
            wait_for(lambda: int(reader.lookup(keys(5, 1)).have.sum()) == 5, timeout_s=WAIT_S)


def test_the_publisher(server: RedisServer, raising: Any) -> None:
    server.witness().flushall()
    before = troubles().errors
    with a_host(server, "host") as (store, told):
        wait_for(lambda: is_settled(store, told, server), timeout_s=WAIT_S)
        calls = raising(BlockFeed, "read")
        wait_for(lambda: len(calls) >= 2, timeout_s=WAIT_S)
        assert noted("kvplug-directory-publisher", before)
        put_blocks(store, keys(5, 1))
        wait_for(lambda: told.stats().entries == 5 and is_settled(store, told, server), timeout_s=WAIT_S)
        assert told.is_alive


def test_the_upkeep_of_a_pool(raising: Any) -> None:
    before = troubles().errors
    with a_pool() as store:
        calls = raising(Pool, "release_expired")
        wait_for(lambda: len(calls) >= 3, timeout_s=WAIT_S)
        assert noted("kvplug-maintenance", before)
        at = pool_of(store).geometry.o_client + pool_of(store).client * lay.CLIENT_WORDS + lay.C_THREAD_ERRORS
        wait_for(lambda: int(pool_of(store).T[at]) == sum(troubles().errors.values()), timeout_s=WAIT_S)


def test_the_acceptor_and_the_readers_of_an_agent(make_host: MakeHost, raising: Any) -> None:
    owner, reader = make_host(), make_host(peer_timeout_s=WAIT_S)
    put(owner.store, keys(4, 1), BLOCK)
    agent = owner.agent()
    before = troubles().errors
    raising(socket.socket, "accept")
    wait_for(lambda: noted("kvplug-accept", before), timeout_s=WAIT_S)
    raising(Agent, "_lookup")
    assert (reader.peer(agent.address).fetch(keys(4, 1), WAIT_S) == Code.TIMEOUT).all()
    wait_for(lambda: noted("kvplug-reader", before), timeout_s=WAIT_S)
    assert (reader.peer(agent.address).fetch(keys(4, 1), WAIT_S) == Code.OK).all()
    told = reader.peer(agent.address).stats(WAIT_S).counters
    assert told["thread_errors"] == sum(troubles().errors.values()), "whoever asks for its figures is told"


def test_a_host_that_offers_and_a_cache_node_that_takes(make_host: MakeHost, raising: Any) -> None:
    owner = make_host()
    put(owner.store, keys(6, 1), BLOCK)
    agent = owner.agent()
    before = troubles().errors
    calls = raising(Offerer, "_round")
    wait_for(lambda: len(calls) >= 2, timeout_s=WAIT_S)
    assert noted("kvplug-offer", before)

    from kvplug.rdma.control import protocol as p
    from kvplug.rdma.directory.peers import StaticPeers

    reader = make_host(peer_timeout_s=WAIT_S)
    node = CacheNode(reader.exchange, reader.config, StaticPeers([agent.address]), lambda *_: None)
    raising(Peer, "fetch")
    node.start()
    try:
        for some in (keys(6, 1)[:3], keys(6, 1)[3:]):
            sizes = p.raw(np.full(3, BLOCK), np.int64)
            offer = p.Offer(some.tobytes(), sizes, bytes(16), (agent.address,))
            assert isinstance(node.answer(offer, 1), p.Offered)
        wait_for(lambda: reader.holds(keys(6, 1)[3:]) == 3, "the second offer is taken", timeout_s=WAIT_S)
        assert noted("kvplug-take", before)
        wait_for(lambda: not node._at_work, timeout_s=WAIT_S)
    finally:
        node.close()


def test_a_lane_of_a_read(make_host: MakeHost, raising: Any) -> None:
    """A miss, and no slot stays out of use."""
    owner, reader = make_host(), make_host(peer_timeout_s=WAIT_S)
    put(owner.store, keys(4, 1), BLOCK)
    agent = owner.agent()
    before = troubles().errors
    raising(TcpPath, "_carry")
    peer = reader.peer(agent.address)
    assert (peer.fetch(keys(4, 1), WAIT_S) == Code.TIMEOUT).all()
    assert noted("kvplug-tcp", before)
    assert reader.store.stats().writing_slots == 0
    wait_for(lambda: reader.store.stats().quarantined_slots == 0, timeout_s=WAIT_S)
    wait_for(lambda: not peer.is_down, timeout_s=WAIT_S)
    assert (peer.fetch(keys(4, 1), WAIT_S) == Code.OK).all()


def test_looking_up_a_name(make_host: MakeHost, raising: Any) -> None:
    owner, reader = make_host(), make_host(peer_timeout_s=WAIT_S)
    agent = owner.agent()
    before = troubles().errors
    raising(link_module, "resolve")
    with pytest.raises(PeerError):
        reader.peer(agent.address).stats(WAIT_S)
    assert noted("kvplug-resolve", before)
    assert reader.peer(agent.address).stats(WAIT_S).leases == 0


def test_asking_a_peer_and_letting_go_of_pins(
    make_host: MakeHost, make_fetcher: Any, raising: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvplug.remote.request import Outcome, Wanted, leading

    monkeypatch.setattr(fetching, "HOLD_S", 0.3)
    monkeypatch.setattr(fetching, "MISS_FOR_S", 0.0)
    owner, reader = make_host(), make_host(peer_timeout_s=WAIT_S)
    put(owner.store, keys(4, 1), BLOCK)
    fetcher = make_fetcher(reader, owner.agent().address)
    before = troubles().errors
    raising(Peer, "holds")

    def fetched() -> Any:
        fetch = fetcher.start(Wanted(keys(4, 1), BLOCK, leading(16), 64), timeout_s=WAIT_S)
        fetch.wait(WAIT_S)
        return fetch

    first = fetched()
    assert first.outcome in (Outcome.TIMEOUT, Outcome.MISSING)
    assert noted("kvplug-ask", before)
    first.release()
    raising(fetching._Pins, "_let_go")
    assert fetched().outcome is Outcome.FETCHED
    wait_for(lambda: noted("kvplug-fetch-pins", before), timeout_s=WAIT_S)
    second = fetched()  # its pins are released by the loop that was begun again
    assert second.outcome is Outcome.PRESENT
    wait_for(lambda: second not in fetcher._pins._held, timeout_s=WAIT_S)


def test_starting_the_process_that_fetches(make_host: MakeHost, raising: Any) -> None:
    host = make_host(peers=("127.0.0.1:1",))
    before = troubles().errors
    raising(_Running, "launch")
    process = FetchProcess(host.store, host.config, 1)
    try:
        wait_for(lambda: noted("kvplug-fetch-process", before), timeout_s=WAIT_S)

        def asked() -> int | None:
            process.who_has(keys(1, 1), time.monotonic() + 0.1)
            return process.pid

        wait_for(asked, "a later question starts another", timeout_s=2 * WAIT_S)
    finally:
        process.close()


class Device:
    """As the binding's, as far as registering goes."""

    def __init__(self) -> None:
        self.errors: list[Exception] = [UnforeseenError("in register")]

    def register(self, address: int, nbytes: int, access: int) -> Any:
        if self.errors:
            raise self.errors.pop()
        return type("Region", (), {"lkey": 7, "rkey": 8, "close": lambda _: None})()


def test_registering_memory() -> None:
    before = troubles().errors
    device: Any = Device()
    regions = Regions(device, np.zeros(1 << 21, np.uint8), 0, each_bytes=1 << 20)
    with pytest.raises(VerbsError, match="kvplug's own"):
        regions.keys(np.array([0, 1]), time.monotonic() + WAIT_S)
    wait_for(lambda: noted("kvplug-register", before), timeout_s=WAIT_S)
    ready, lkeys, _ = regions.keys(np.array([0, 1]), time.monotonic() + WAIT_S)
    assert ready.all()
    assert lkeys.tolist() == [7, 7]
    regions.close()


def test_identifying_weights(tmp_path: Any, raising: Any) -> None:
    import kvplug.identity.weights

    before = troubles().errors
    raising(kvplug.identity.weights, "_by_content")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(NamespaceError, match="unexpected error"):
        WeightsProbe(tmp_path).result(WAIT_S)
    wait_for(lambda: noted("kvplug-weights", before), timeout_s=WAIT_S)


def test_every_thread_of_the_product_runs_through_one_module() -> None:
    """A thread elsewhere would die of what it does not expect, and nobody would know."""
    from tests.unit.test_house import ROOT, package_sources

    own = {
        "kvplug/threads.py": "here they are made",
        "kvplug/remote/worker.py": "an error there ends the process, and is told to the engine's, which counts it",
    }
    wrong = []
    for _, path in package_sources():
        name = str(path.relative_to(ROOT))
        lines = path.read_text().splitlines()
        for at, line in enumerate(lines):
            if "threading.Thread(target=" in line and name not in own:
                before = "\n".join(lines[max(0, at - 4) : at + 1])
                if "guarded(" not in before:
                    wrong.append(f"{name}:{at + 1}")
    assert not wrong, "\n".join(wrong)
