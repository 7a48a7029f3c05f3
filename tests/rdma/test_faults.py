"""Faults in flight: right bytes or a miss, noticed within two seconds, never a hang, and the next read works.

Most of these stop a link at one byte of a fetch, do the fault there, and let go.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.errors import Code
from kvplug.rdma.data.datapath import Arrived, DataPath, Landing, Wanted
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.pool_blocks import PoolExchange
from tests.pool.children import check_nothing_left, settle
from tests.rdma.hosts import BLOCK, Child, Fault, Host, Proxy, keys, put, random_fault, until
from tests.stopwatch import LONG_S, Stopwatch

MakeHost = Callable[..., Host]
NOTICED_S = 2.0
N = 128
SEED = int(os.environ.get("KVPLUG_TEST_SEED", "20251124"))
ROUNDS = 28


def timed(fetch: Callable[[], Any]) -> tuple[Any, float]:
    watch = Stopwatch()
    answer = fetch()
    return answer, watch.took_s()


def check(reader: Host, of: Any, codes: Any) -> int:
    """What is said to be here is, with its bytes; nothing stays in writing. How many are here."""
    assert set(codes.tolist()) <= {Code.OK, Code.EXISTS, Code.MISSING, Code.TIMEOUT, Code.CORRUPT, Code.BUDGET}
    said = int((codes >= 0).sum())
    assert reader.holds(of) == said, "a block is here that was not said to be, or the other way round"
    until(lambda: reader.store.stats().writing_slots == 0)
    until(lambda: reader.store.stats().quarantined_slots == 0)
    return said


def works_again(peer: Peer, reader: Host, of: Any) -> None:
    """The peer is fetched from again, at the latest when it was left alone for long enough."""

    def fetched() -> bool:
        return bool((peer.fetch(of) >= 0).all())

    until(fetched)
    assert reader.holds(of) == len(of)
    reader.store.check_integrity(deep=True)


class Stage:
    """Owner's agent in a process of its own, behind a link; a reader that fetches in the background."""

    def __init__(self, make_host: MakeHost, proxy: Proxy, **settings: Any) -> None:
        settings = {"peer_timeout_s": 1.0} | settings
        wide = {"agent_pin_share": 1.0, "pin_budget_share": 1.0, "agent_advertise": proxy.address}
        self.owner, self.reader = make_host(**wide, **settings), make_host(**settings)
        self.proxy = proxy
        self.keys = keys(N, 5)
        put(self.owner.store, self.keys, BLOCK)
        self.agent, proxy.upstream = self.owner.agent_process()
        self.peer = self.reader.peer(proxy.address, peer_connections=1)
        self.codes: Any = None
        self.began = 0.0

    def halted(self, kind: str = "stall", at: int = N * BLOCK // 2) -> Fault:
        """A fetch that has come this many bytes of its data connection far, and there meets the fault."""
        fault = self.proxy.fault = Fault(kind, 1, to_agent=False, at=at)

        def fetch() -> None:
            self.codes = self.peer.fetch(self.keys)

        self._thread = threading.Thread(target=fetch)
        self._thread.start()
        assert fault.happened.wait(LONG_S)
        self.since_fault = Stopwatch()
        return fault

    def ended(self, within_s: float = NOTICED_S) -> int:
        """The fetch's end, which is due by now. How many blocks it brought, all of them right."""
        self._thread.join(LONG_S)
        assert not self._thread.is_alive(), "a fetch hangs"
        assert self.since_fault.took_s() < within_s, "the fault was noticed late"
        self.proxy.fault = None
        return check(self.reader, self.keys, self.codes)


@pytest.fixture
def stage(make_host: MakeHost, proxy: Proxy) -> Stage:
    return Stage(make_host, proxy)


def test_the_owner_is_killed_in_mid_read(stage: Stage) -> None:
    stage.halted("cut")
    stage.agent.kill()
    assert 0 < stage.ended() < N
    settle(stage.owner.store)
    check_nothing_left(stage.owner.store)
    stage.agent, stage.proxy.upstream = stage.owner.agent_process()
    works_again(stage.peer, stage.reader, stage.keys)


def test_the_agent_is_stopped_in_mid_read(stage: Stage) -> None:
    stage.agent.signal(signal.SIGSTOP)
    stage.agent.wait_stopped()
    codes, took = timed(lambda: stage.peer.fetch(stage.keys))
    assert took < NOTICED_S
    assert check(stage.reader, stage.keys, codes) == 0
    codes, took = timed(lambda: stage.peer.fetch(stage.keys))
    assert took < 0.1, "a peer that does not answer is left alone for a moment"
    stage.agent.signal(signal.SIGCONT)
    works_again(stage.peer, stage.reader, stage.keys)


def test_the_link_stops_passing_anything(stage: Stage) -> None:
    stage.halted("stall")
    assert 0 < stage.ended() < N
    works_again(stage.peer, stage.reader, stage.keys)


def test_the_link_is_cut(stage: Stage) -> None:
    stage.halted("stall")
    stage.proxy.cut()
    assert 0 < stage.ended(1.0) < N
    works_again(stage.peer, stage.reader, stage.keys)


def test_the_reader_is_killed_in_mid_read(make_host: MakeHost, proxy: Proxy) -> None:
    """Its leases end at the owner; what it had in writing comes back to its pool."""
    owner, reader = make_host(agent_advertise=proxy.address), make_host()
    of = keys(32, 9)
    put(owner.store, of, BLOCK)

    go, told = os.pipe()

    def body() -> None:
        os.read(go, 1)
        own = Peer(proxy.address, PoolExchange(KvStore(config=reader.config, create=False)), reader.config)
        own.fetch(of)

    child = Child(body)  # before this process has threads that serve
    agent = owner.agent()
    fault = proxy.fault = Fault("stall", 1, to_agent=False, at=20 * BLOCK)
    proxy.upstream = agent.address
    os.write(told, b"!")
    assert fault.happened.wait(LONG_S)
    assert agent.leases.held()[0] == 1
    child.kill()
    os.close(go)
    os.close(told)
    proxy.fault = None
    until(lambda: agent.leases.held() == (0, 0))
    until(lambda: owner.store.stats().pinned_slots == 0)
    settle(reader.store)
    until(lambda: reader.store.stats().writing_slots + reader.store.stats().quarantined_slots == 0)
    reader.holds(of)
    reader.store.check_integrity(deep=True)


def test_a_byte_is_changed_on_its_way(stage: Stage) -> None:
    """The one block is wrong and is not sealed; the others are right."""
    fault = stage.halted("flip")
    assert fault.happened.is_set()
    assert stage.ended() == N - 1
    assert sorted(set(stage.codes.tolist())) == [Code.CORRUPT, Code.OK]
    assert stage.peer.counters()["wrong_checksums"] == 1
    works_again(stage.peer, stage.reader, stage.keys)


def test_a_block_that_is_wrong_at_its_owner_is_not_taken_over(stage: Stage) -> None:
    b = stage.owner.store.pin_batch(stage.keys[3:4])
    stage.owner.store.mapping[int(b.offsets[0]) + 99] ^= 1
    stage.owner.store.unpin(b.slots)
    codes = stage.peer.fetch(stage.keys)
    assert codes[3] == Code.CORRUPT
    assert check(stage.reader, stage.keys, codes) == N - 1


def test_a_slot_that_is_reused_in_mid_read_gives_no_wrong_block(make_host: MakeHost, proxy: Proxy) -> None:
    """The agent loses its pins (its process is killed) while the link holds bytes back that refer to its slots."""
    stage = Stage(make_host, proxy)
    stage.halted("delay", at=N * BLOCK // 4)
    b = stage.owner.store.pin_batch(stage.keys)
    # What a reused slot looks like to bytes on their way: other bytes in the same place.
    half = b.offsets[N // 2 :]
    for at in half.tolist():
        stage.owner.store.mapping[at : at + BLOCK] = 0xEE
    stage.owner.store.unpin(b.slots)
    got = stage.ended()
    assert set(stage.codes.tolist()) <= {Code.OK, Code.CORRUPT}
    assert got >= N // 4 - 16


def test_a_lease_that_runs_out_in_mid_read_makes_misses(make_host: MakeHost, proxy: Proxy) -> None:
    """The bytes were sent in time, arrive late and are right; but the reader can't know whose they are by then."""
    stage = Stage(make_host, proxy, lease_s=0.5, peer_timeout_s=5.0)
    few, at = stage.keys[:8], 3 * BLOCK
    held = threading.Event()
    passing = stage.proxy._pass

    def hold(number: int, way: int, data: bytearray, target: Any) -> bool:
        if number == 1 and way == 1 and stage.proxy.passed[1][1] + len(data) > at and not held.is_set():
            held.set()
            time.sleep(0.8)
        return passing(number, way, data, target)

    stage.proxy._pass = hold  # type: ignore[method-assign]
    codes, took = timed(lambda: stage.peer.fetch(few, 5.0))
    assert held.is_set()
    assert took < NOTICED_S
    assert check(stage.reader, few, codes) == 0
    assert stage.peer.counters()["leases_run_out"] == len(few)
    works_again(stage.peer, stage.reader, stage.keys)


def test_a_deadline_ends_a_fetch_that_goes_on(make_host: MakeHost, proxy: Proxy) -> None:
    stage = Stage(make_host, proxy, peer_timeout_s=5.0)
    stage.proxy.fault = Fault("stall", 1, to_agent=False, at=N * BLOCK // 2)
    codes, took = timed(lambda: stage.peer.fetch(stage.keys, 0.5))
    assert took < 1.5
    assert 0 < check(stage.reader, stage.keys, codes) < N


def test_an_owner_that_restarts_empty_is_a_miss(stage: Stage) -> None:
    stage.peer.fetch(stage.keys[:4])
    stage.agent.kill()
    settle(stage.owner.store)
    stage.owner.store.remove(stage.keys)
    stage.agent, stage.proxy.upstream = stage.owner.agent_process()
    until(lambda: (stage.peer.fetch(stage.keys)[4:] == Code.MISSING).all())


def test_faults_at_bytes_that_nobody_chose(make_host: MakeHost, proxy: Proxy) -> None:
    """Cut, stalled, changed, delayed: at any byte of any connection of a fetch, its handshakes included."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    owner = make_host(agent_advertise=proxy.address, agent_pin_share=1.0, pin_budget_share=1.0, lease_s=2.0)
    reader = make_host(size="128mib", peer_timeout_s=0.15, quarantine_grace_s=0.0)
    of = keys(N, 6)
    put(owner.store, of, BLOCK)
    agent = owner.agent()
    proxy.upstream = agent.address
    lengths: list[list[int]] = []

    def over_two_connections() -> bool:
        """Beside that for control. One does it all where it ends before the other thread begins, and on one core."""
        reader.store.remove(of)
        before = len(proxy.passed)
        peer = reader.peer(proxy.address, peer_timeout_s=5.0)
        assert (peer.fetch(of) == Code.OK).all()
        peer.close()
        lengths[:] = [list(passed) for passed in proxy.passed[before:]]
        return len(lengths) > min(2, len(os.sched_getaffinity(0)))

    until(over_two_connections)
    seen = set()
    for round_ in range(ROUNDS):
        reader.store.remove(of)
        fault = random_fault(rng, ("cut", "stall", "flip", "delay")[round_ % 4], lengths)
        fault.connection += len(proxy.passed)
        peer = reader.peer(proxy.address)
        proxy.fault = fault
        codes, took = timed(lambda peer=peer: peer.fetch(of))
        what = f"seed {SEED}: {fault}"
        assert took < 0.15 + NOTICED_S, what
        here = reader.holds(of)
        assert here == (codes >= 0).sum(), what
        if fault.happened.is_set():
            seen.add((fault.kind, here == N))
        proxy.fault = None
        peer.close()
    assert {kind for kind, _ in seen} == {"cut", "stall", "flip", "delay"}
    assert ("cut", False) in seen
    until(lambda: reader.store.stats().quarantined_slots + reader.store.stats().writing_slots == 0)
    until(lambda: agent.leases.held() == (0, 0))
    until(lambda: owner.store.stats().pinned_slots == 0)
    assert (reader.peer(proxy.address, peer_timeout_s=5.0).fetch(of) >= 0).all()
    reader.store.check_integrity(deep=True)


class LatePath(DataPath):
    """A path whose bytes land after the read was given up, as a late one-sided READ does."""

    name = "late"

    def __init__(self, memory: Any) -> None:
        self.memory, self.landing, self.targets = memory, Landing(), np.empty(0, np.int64)

    def read(self, wanted: Wanted, deadline: float, arrived: Arrived) -> Landing:
        from kvplug.errors import PeerTimeoutError

        self.targets = wanted.targets.copy()
        self.landing.error = PeerTimeoutError("late")
        return self.landing

    def land(self) -> None:
        for at in self.targets.tolist():
            self.memory[at : at + BLOCK] = 0xBD
        self.landing.settle()

    def close(self) -> None:
        return


def test_bytes_that_land_late_reach_no_slot_that_someone_may_seal(make_host: MakeHost) -> None:
    owner, reader = make_host(), make_host(size="8mib", quarantine_grace_s=60.0)
    of = keys(32, 7)
    put(owner.store, of, BLOCK)
    late = LatePath(reader.exchange.memory)
    peer = Peer(owner.agent().address, reader.exchange, reader.config, path=late)
    assert (peer.fetch(of) == Code.TIMEOUT).all()
    assert reader.store.stats().quarantined_slots == len(late.targets) > 0
    others = keys(200, 8)  # more than fits: every slot that may be had is had
    put(reader.store, others, BLOCK, batch=8)
    late.land()
    reader.holds(others)  # all that are there are right
    until(lambda: reader.store.stats().quarantined_slots == 0)
    reader.store.check_integrity(deep=True)
    peer.close()
