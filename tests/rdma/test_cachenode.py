"""Cache nodes: what its owner has evicted is read from the node, and no fault of a node costs its owner anything."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvplug.config import Config
from kvplug.errors import Code
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.agent.cachenode import MAX_WAITING_A_READER
from kvplug.rdma.control import faults
from kvplug.rdma.control import protocol as p
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.peering import directory_reader, host_id
from kvplug.store import KvStore
from tests.lab.env import free_port
from tests.pool.children import check_bytes, check_nothing_left, settle
from tests.rdma.directory_parts import counts, wait_for
from tests.rdma.handshakes import admitted, ask, is_hung_up_on
from tests.rdma.hosts import BLOCK, KEY, SOON_S, Child, Host, keys, put, until
from tests.rdma.redis_server import RedisServer
from tests.rdma.test_directory_agent import PASSWORD, end, start_agent, url_of
from tests.stopwatch import LONG_S, Stopwatch

MakeHost = Callable[..., Host]
HOT = 24


class Family:
    """An owner with a small pool, a node, and a third host; the agents are processes, and known by the settings."""

    def __init__(self, make_host: MakeHost, *, node_size: str = "32mib", **settings: object) -> None:
        self.owner_at, self.node_at = (f"127.0.0.1:{free_port()}" for _ in range(2))
        settings = {"peer_timeout_s": 1.0} | settings
        self.owner = make_host(size="16mib", agent_listen=self.owner_at, peers=(self.node_at,), **settings)
        self.node = make_host(
            size=node_size, agent_listen=self.node_at, peers=(self.owner_at,), cache_node=True, **settings
        )
        self.reader = make_host(**settings)
        self.owner_process, _ = self.owner.agent_process()
        self.node_process: Child
        self.start_node()
        self.to_owner, self.to_node = self.reader.peer(self.owner_at), self.reader.peer(self.node_at)
        self._seed = 100

    def start_node(self) -> None:
        self.node_process, _ = self.node.agent_process()

    def count(self, what: str, peer: Peer | None = None) -> int:
        """A counter of the owner's agent, or of another."""
        return (peer or self.to_owner).stats(10.0).counters.get(what, 0)

    def hot(self, seed: int) -> np.ndarray:
        """Blocks at the owner that were used, as its agent has seen."""
        of = keys(HOT, seed)
        assert (put(self.owner.store, of, BLOCK) == 0).all()
        for _ in range(4):
            seen = self.count("looks")
            check_bytes(self.owner.store, of, BLOCK)
            until(lambda seen=seen: self.count("looks") > seen + 1)
        return of

    def fill(self, of: np.ndarray) -> np.ndarray:
        """Blocks that nobody uses, until these are the next to go; those that are left of them."""
        while self.owner.store.exists(of).all():
            self.pour(4)
        left = of[self.owner.store.exists(of)]
        assert len(left) >= len(of) - 4
        return left

    def pour(self, n: int) -> None:
        """Store ``n`` more of them."""
        self._seed += 1
        assert (put(self.owner.store, keys(n, self._seed), BLOCK) == 0).all()

    def offered_and_evicted(self, of: np.ndarray) -> None:
        """The node takes these, and then they go at their owner."""
        left = self.fill(of)
        until(lambda: self.node.store.exists(left).all(), LONG_S)
        until(lambda: self.owner.store.stats().pinned_slots == 0)  # the node's lease is released
        self.pour(HOT + 8)
        assert not self.owner.store.exists(of).any(), "to be read by a node is no use"


def test_a_block_that_its_owner_has_evicted_is_read_from_the_node(make_host: MakeHost) -> None:
    family = Family(make_host)
    of = family.hot(1)
    family.offered_and_evicted(of)
    assert (family.to_owner.fetch(of) == Code.MISSING).all()
    codes = family.to_node.fetch(of)
    assert (codes >= 0).sum() >= HOT - 4
    assert family.reader.holds(of) == (codes >= 0).sum()
    assert family.node.store.stats().sealed_blocks <= HOT, "what nobody used is not worth keeping"
    assert family.count("keys_taken", family.to_node) >= HOT - 4
    family.reader.store.check_integrity(deep=True)
    for host, process in ((family.owner, family.owner_process), (family.node, family.node_process)):
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        settle(host.store)
        check_nothing_left(host.store)


def test_a_node_that_is_killed_is_offered_to_again_when_it_is_back(make_host: MakeHost) -> None:
    family = Family(make_host)
    first = family.hot(1)
    family.node_process.kill()
    family.fill(first)
    until(lambda: family.count("nodes_not_reached") + family.count("offers_failed") > 0, LONG_S)
    assert (family.to_owner.fetch(first[:4]) >= 0).all(), "its agent serves on"
    looks = family.count("looks")
    family.pour(8)
    until(lambda: family.count("looks") > looks)
    settle(family.node.store)
    check_nothing_left(family.node.store)
    family.start_node()
    second = family.hot(2)
    family.offered_and_evicted(second)
    assert (family.to_node.fetch(second) >= 0).sum() >= HOT - 4


def test_a_node_that_is_stopped_holds_nobody_up(make_host: MakeHost) -> None:
    family = Family(make_host)
    of = family.hot(1)
    family.node_process.signal(signal.SIGSTOP)
    family.node_process.wait_stopped()
    family.fill(of)
    until(lambda: family.count("nodes_not_reached") + family.count("offers_failed") > 0, LONG_S)
    looks = family.count("looks")
    family.pour(4)
    assert (family.to_owner.fetch(of[:2]) != Code.TIMEOUT).all()
    until(lambda: family.count("looks") > looks + 1)
    family.node_process.signal(signal.SIGCONT)
    second = family.hot(2)
    family.offered_and_evicted(second)


def test_an_owner_that_is_killed_or_stopped_leaves_a_node_whole(make_host: MakeHost) -> None:
    """Offers that it made are given up in their time; the next one is taken."""
    family = Family(make_host)
    of = family.hot(1)
    family.owner_process.signal(signal.SIGSTOP)
    family.owner_process.wait_stopped()
    control, _ = admitted(family.node, family.node_at)
    offer = p.Offer(of.tobytes(), p.raw(np.full(HOT, BLOCK), np.int64), bytes(16), (family.owner_at,))
    assert p.expect(ask(control, offer), p.Offered).codes == bytes(HOT)
    until(lambda: family.count("keys_not_taken", family.to_node) == HOT, LONG_S)
    family.owner_process.kill()
    assert not family.node.store.exists(of).any()
    until(lambda: family.node.store.stats().writing_slots == 0)
    settle(family.owner.store)
    family.owner_process, _ = family.owner.agent_process()

    def taken() -> bool:
        """The node leaves a host that did not answer alone for a moment."""
        ask(control, offer)
        return bool(family.node.store.exists(of).all())

    until(taken, LONG_S)
    family.node.holds(of)


def test_what_was_there_when_the_agent_began_is_offered_too(make_host: MakeHost) -> None:
    family = Family(make_host)
    family.owner_process.kill()
    settle(family.owner.store)
    of = keys(HOT, 1)
    put(family.owner.store, of, BLOCK)
    left = family.fill(of)
    family.owner_process, _ = family.owner.agent_process()
    until(lambda: family.node.store.exists(left).all(), LONG_S)


def test_a_node_that_is_offered_more_than_it_holds_keeps_to_its_size(make_host: MakeHost) -> None:
    family = Family(make_host, node_size="4mib")
    for seed in range(1, 5):
        of = family.hot(seed)
        left = family.fill(of)
        until(lambda of=left: family.count("keys_offered_to_nodes") and family.node.store.exists(of).any(), LONG_S)
        family.pour(HOT + 8)
    node = family.node.store.stats()
    assert node.evicted_blocks > 0
    assert node.sealed_bytes <= family.node.exchange.data_bytes
    family.node.store.check_integrity(deep=True)
    newest = of[family.node.store.exists(of)]
    assert (family.to_node.fetch(newest) >= 0).all()
    assert family.reader.holds(newest) == len(newest)


def test_a_burst_costs_the_owner_no_store(make_host: MakeHost) -> None:
    """More goes than a node can take: what it gets is right, and every store succeeds meanwhile."""
    family = Family(make_host)
    for seed in range(1, 6):
        of = keys(120, seed)
        for _ in range(3):
            assert (put(family.owner.store, of, BLOCK) >= 0).all()
            check_bytes(family.owner.store, of, BLOCK, may_miss=True)
            time.sleep(0.12)  # as long as between two looks
        family.pour(120)
    until(lambda: family.count("keys_taken", family.to_node) > 0, LONG_S)
    family.owner.store.check_integrity(deep=True)
    family.node.store.check_integrity(deep=True)
    for seed in range(1, 6):
        family.node.holds(keys(120, seed))
    until(lambda: family.owner.store.stats().pinned_slots == 0)


@pytest.mark.parametrize(
    ("end", "fault"),
    [
        ("owner", "offer sent:kill"),
        ("node", "offer received:stop"),
        ("node", "offer received:cut"),
        ("node", "offered sent:drop"),
        ("owner", "offered received:corrupt"),
        ("owner", "offered received:delay"),
        ("owner", "half sent:kill"),
        ("node", "reserved:kill"),
        ("node", "piece received:drop"),
    ],
)
def test_a_fault_at_any_step_of_an_offer_costs_that_offer_at_most(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, end: str, fault: str
) -> None:
    family = Family(make_host)
    host = family.owner if end == "owner" else family.node
    (family.owner_process if end == "owner" else family.node_process).kill()
    settle(host.store)
    with monkeypatch.context() as patch:
        patch.setenv(faults.ENV, fault)
        process, _ = host.agent_process()
    first = family.hot(1)
    family.fill(first)
    if fault.endswith("kill"):
        assert process.wait() == -signal.SIGKILL
        settle(host.store)
        host.agent_process()
    elif fault.endswith("stop"):
        process.wait_stopped()
        process.signal(signal.SIGCONT)
    elif fault.endswith(("drop", "corrupt")):  # a cut one is sent again at once
        until(lambda: family.count("offers_failed") + family.count("keys_not_taken", family.to_node) > 0, LONG_S)
    for seed in range(2, 6):  # a machine that is starved meanwhile may lose another
        second = family.hot(seed)
        left = family.fill(second)
        with contextlib.suppress(AssertionError):
            until(lambda left=left: family.node.store.exists(left).all())
            break
    assert family.node.holds(left) == len(left)
    family.node.holds(first)
    for one in (family.owner, family.node):
        until(lambda one=one: one.store.stats().writing_slots == 0)
        one.store.check_integrity(deep=True)


# ---- who may offer, and how much


class Node:
    """A node in this process, which knows one host by its address: whoever speaks for that may offer."""

    def __init__(self, make_host: MakeHost, known: str, **settings: object) -> None:
        self.host = make_host(cache_node=True, peers=(known,), peer_timeout_s=1.0, **settings)
        self.agent: Agent = self.host.agent()
        self.known = known

    def offer(self, of: np.ndarray, *addresses: str, host: bytes = bytes(16), nbytes: int = BLOCK) -> p.Message:
        control, _ = admitted(self.host, self.agent.address)
        self.control = control
        return ask(control, self.message(of, *addresses, host=host, nbytes=nbytes))

    def message(self, of: np.ndarray, *addresses: str, host: bytes = bytes(16), nbytes: int = BLOCK) -> p.Offer:
        sizes = p.raw(np.full(len(of), nbytes), np.int64)
        return p.Offer(of.tobytes(), sizes, host, addresses or (self.known,))


def test_what_is_gone_before_it_was_read_is_gone(make_host: MakeHost) -> None:
    owner = make_host()
    of = keys(8, 1)
    put(owner.store, of[:3], BLOCK)
    node = Node(make_host, owner.agent().address)
    assert p.expect(node.offer(of), p.Offered).codes == bytes(8)
    until(lambda: node.agent.counters().get("keys_gone") == 5)
    assert node.host.holds(of) == 3
    again = p.array(p.expect(ask(node.control, node.message(of)), p.Offered).codes, np.int8)
    assert again.tolist() == [Code.EXISTS] * 3 + [Code.OK] * 5


def test_a_node_dials_nobody_that_only_a_message_names(make_host: MakeHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.5)
        node = Node(make_host, "127.0.0.1:1")
        named = f"127.0.0.1:{elsewhere.getsockname()[1]}"
        assert node.offer(keys(8, 1), named, host=os.urandom(16)) == p.Failed("stranger")
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert node.agent.counters()["offers_of_strangers"] == 1
    assert "keys_taken" not in node.agent.counters()


def test_a_host_that_is_no_node_takes_no_offers(make_host: MakeHost) -> None:
    host = make_host(peers=("127.0.0.1:1",))
    agent = host.agent()
    control, _ = admitted(host, agent.address)
    offer = p.Offer(keys(1, 1).tobytes(), p.raw(np.full(1, BLOCK), np.int64), bytes(16), ("127.0.0.1:1",))
    assert ask(control, offer) == p.Failed("request")


def test_a_node_declines_what_it_has_no_room_to_wait_for(make_host: MakeHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        node = Node(make_host, f"127.0.0.1:{silent.getsockname()[1]}", size="32mib")
        accepted = [p.expect(node.offer(keys(4, 1)), p.Offered).codes == bytes(4)]
        accepted += [
            p.expect(ask(node.control, node.message(keys(4, seed))), p.Offered).codes == bytes(4)
            for seed in range(2, MAX_WAITING_A_READER + 3)
        ]
        assert accepted == [True] * MAX_WAITING_A_READER + [False] * 2
        other = p.expect(node.offer(keys(4, 9), nbytes=4 << 20), p.Offered)  # another reader, but too many bytes
        assert p.array(other.codes, np.int8).tolist() == [Code.BUDGET] * 4
        assert node.agent.counters()["keys_declined"] == 12
        watch = Stopwatch()
        node.agent.close()
        assert watch.took_s() < 5


@pytest.mark.parametrize("what", ["half a key", "a size too few", "no bytes", "too many bytes"])
def test_an_offer_that_does_not_fit_together_ends_the_connection(make_host: MakeHost, what: str) -> None:
    node = Node(make_host, "127.0.0.1:1")
    of = keys(2, 1).tobytes()
    sizes = {"a size too few": [BLOCK], "no bytes": [BLOCK, 0], "too many bytes": [BLOCK, 1 << 40]}.get(
        what, [BLOCK] * 2
    )
    control, _ = admitted(node.host, node.agent.address)
    message = p.Offer(
        of[:-1] if what == "half a key" else of, p.raw(np.array(sizes), np.int64), bytes(16), (node.known,)
    )
    control.send(message, 1, time.monotonic() + SOON_S)
    assert is_hung_up_on(control)
    until(lambda: node.agent.counters().get("protocol_errors") == 1)


def test_a_node_known_by_the_directory_is_found_by_it_too(make_host: MakeHost) -> None:
    """As they are run: commands, a directory, and a reader that asks it who has the prefix."""
    server = RedisServer(password=PASSWORD)
    owner, node, here = make_host(size="16mib"), make_host(), make_host()
    of = keys(HOT, 1)
    put(owner.store, of, BLOCK)
    agents = [start_agent(node, server, cache_node="true")]
    reach = Config(pool="any", auth_key=KEY, directory_url=url_of(server), directory_ttl_s=2, directory_timeout_s=5)
    directory = directory_reader(reach, here.store)
    assert directory is not None
    try:
        assert agents[0].stdout is not None
        assert ", as a cache node, at 127.0.0.1:" in agents[0].stdout.readline()
        agents.append(start_agent(owner, server))  # what is there when it begins has the benefit of the doubt
        pour(owner.store, until_evicting=True)
        left = of[owner.store.exists(of)]
        assert len(left) >= HOT - 4
        wait_for(lambda: node.store.exists(left).all())
        wait_for(lambda: owner.store.stats().pinned_slots == 0)
        pour(owner.store)
        assert not owner.store.exists(of).any()
        expected = {host_id(node.store): len(left)}
        hits = wait_for(lambda: counts(h := directory.lookup(left)) | expected == counts(h) and h)
        best = next(peer for peer in hits.peers if peer.id == host_id(node.store))
        assert best.cache_node
        assert (here.peer(best.address).fetch(left, 20.0) == Code.OK).all()
        assert here.holds(left) == len(left)
    finally:
        directory.close()
        for agent in agents:
            end(agent)
        server.close()


def pour(store: KvStore, *, until_evicting: bool = False) -> None:
    """Blocks that nobody uses: as many as there is room for, or enough to evict what is offered."""
    before = store.stats().evicted_blocks
    for seed in range(1000, 1100):
        put(store, keys(4, seed + 500 * (not until_evicting)), BLOCK)
        if store.stats().evicted_blocks - before > (0 if until_evicting else HOT + 8):
            return
    raise AssertionError("the pool is never full")
