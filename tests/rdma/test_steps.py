"""Every step of the protocol × everything that can go wrong there, at either end, over real processes.

Right bytes or a miss, noticed within two seconds, never a hang; nothing is left over in either pool, and the next fetch
works. What happens at bytes between the steps is in test_faults.py.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvplug.config import Config
from kvplug.errors import Code, ConfigError
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.control import faults
from kvplug.rdma.reader import remote
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.store import KvStore
from tests.lab.env import free_port
from tests.pool import children
from tests.pool.children import check_nothing_left, settle
from tests.rdma.hosts import BLOCK, Host, keys, put, until
from tests.stopwatch import Stopwatch

MakeHost = Callable[..., Host]
NOTICED_S = 2.0
TIMEOUT_S = 0.3
N = 8
OF = keys(N, 3)

READER_SAYS = ("hello", "proof", "lookup", "getticket", "read", "release")
AGENT_SAYS = ("challenge", "welcome", "leased", "ticket", "readstart", "released")
OF_DATA_TOO = ("hello", "proof", "challenge", "welcome")
"""Said once more on the data connection."""
READER_STEPS = ("dial", "reserved", "piece received", "check")
AGENT_STEPS = ("accepted", "lease granted", "first byte sent", "half sent", "last byte sent")
IN_NO_FETCH = {"stats", "statsreply", "failed", "offer", "offered"}
OVER_VERBS_ONLY = {"openqueue", "queueopened", "getregions", "regionkeys"}

Case = tuple[str, str, int]
"""(end, point, how often it is passed before)."""


def cases() -> list[Case]:
    """Every step of a fetch."""
    found: list[Case] = [("reader", step, 0) for step in READER_STEPS]
    found += [("agent", step, 0) for step in AGENT_STEPS]
    for said, by, to in ((READER_SAYS, "reader", "agent"), (AGENT_SAYS, "agent", "reader")):
        for name in said:
            for skip in (0, 1) if name in OF_DATA_TOO else (0,):
                found += [(by, f"{name} sent", skip), (to, f"{name} received", skip)]
    found += [("reader", "dial", 1), ("agent", "accepted", 1)]
    found += [("reader", "extend sent", 0), ("agent", "extend received", 0)]
    return [*found, ("agent", "extended sent", 0), ("reader", "extended received", 0)]


def test_every_step_of_the_protocol_has_its_case() -> None:
    elsewhere = {f"{name} {way}" for name in IN_NO_FETCH | OVER_VERBS_ONLY for way in ("sent", "received")}
    assert {point for _, point, _ in cases()} | elsewhere == set(faults.POINTS)


# ---- run in the other processes

_here: dict[str, Any] = {}


def serve(store: KvStore) -> str:
    agent = _here["agent"] = Agent(PoolExchange(store), _here["config"])
    threading.Thread(target=agent.serve, args=(threading.Event(),), daemon=True).start()
    return agent.start()


def arm(_store: KvStore, point: str, action: str, skip: int, seconds: float) -> None:
    faults.arm(point, action, skip=skip, seconds=seconds)


def what_happened(_store: KvStore) -> list[str]:
    happened = list(faults.happened)
    faults.armed.clear()
    faults.happened.clear()
    return happened


def leases(_store: KvStore) -> int:
    held: int = _here["agent"].leases.held()[0]
    return held


def fetch(store: KvStore, address: str, *, anew: bool) -> tuple[list[int], float]:
    """Codes and seconds of a fetch, by the peer of the last one or by a new one."""
    if anew:
        if "peer" in _here:
            _here["peer"].close()
        remote.BACK_OFF_FIRST_S, remote.BACK_OFF_MOST_S = 0.02, 0.1  # type: ignore[misc]
        _here["peer"] = Peer(address, PoolExchange(store), _here["config"])
    watch = Stopwatch()
    codes = _here["peer"].fetch(OF, 5.0)
    return codes.tolist(), watch.took_s()


class Stage:
    """Owner's agent and a reader, each in a process of its own; this process looks on."""

    def __init__(self, make_host: MakeHost) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        settings = {"peer_timeout_s": TIMEOUT_S, "lease_s": 0.5, "agent_pin_share": 1.0}
        self.owner = make_host(agent_listen=self.address, size="8mib", **settings)
        self.reader = make_host(size="8mib", **settings)
        put(self.owner.store, OF, BLOCK)
        self.ends: dict[str, children.Peer] = {}
        for end in ("agent", "reader"):
            self.start(end)

    def start(self, end: str) -> None:
        config: Config = (self.owner if end == "agent" else self.reader).config

        def make() -> KvStore:
            _here.clear()
            _here["config"] = config
            return KvStore(config=config, create=False)

        self.ends[end] = children.Peer(make)
        if end == "agent":
            self.ends[end].call(serve)

    def fetch(self, *, anew: bool) -> tuple[list[int], float]:
        self.ends["reader"].begin(_fetch_anew if anew else _fetch_again, self.address)
        return self.ends["reader"].end()  # type: ignore[no-any-return]

    def run(self, case: Case, action: str) -> None:
        """One fault, and what has to hold then."""
        end, point, skip = case
        at, reader = self.ends[end], self.ends["reader"]
        self.reader.store.remove(OF)
        if point.startswith("exten"):  # a lease is made longer when little of it is left
            reader.call(arm, "leased received", "delay", 0, 0.3)
        at.call(arm, point, action, skip, faults.DELAY_S)
        reader.begin(_fetch_anew, self.address)
        answered = None
        if action == "kill":
            assert at.child.wait() == -signal.SIGKILL
        if action == "stop":
            at.child.wait_stopped()
        if (end, action) == ("reader", "stop"):
            self.owner_is_free()
            at.child.signal(signal.SIGCONT)
            answered, _ = reader.end()
        elif (end, action) != ("reader", "kill"):
            answered, took = reader.end()
            assert took < NOTICED_S, f"noticed after {took:.2f} s"
        if (end, action) == ("agent", "stop"):
            at.child.signal(signal.SIGCONT)
        if action == "kill":
            at.kill()
            settle((self.owner if end == "agent" else self.reader).store)
            self.start(end)
        else:
            assert point in at.call(what_happened)
        self.what_is_said_is_there(answered)
        self.owner_is_free()
        until(lambda: self.fetch(anew=action == "kill" and end == "reader")[0] == [Code.EXISTS] * N)
        assert self.reader.holds(OF) == N

    def what_is_said_is_there(self, codes: list[int] | None) -> None:
        """Right bytes, or nothing; no slot stays in writing."""
        s = self.reader.store
        until(lambda: s.stats().writing_slots + s.stats().quarantined_slots == 0)
        here = self.reader.holds(OF)
        if codes is not None:
            assert here == sum(code >= 0 for code in codes), codes

    def owner_is_free(self) -> None:
        """No lease and no pin is left."""
        until(lambda: self.owner.store.stats().pinned_slots == 0)


def _fetch_anew(store: KvStore, address: str) -> tuple[list[int], float]:
    return fetch(store, address, anew=True)


def _fetch_again(store: KvStore, address: str) -> tuple[list[int], float]:
    return fetch(store, address, anew="peer" not in _here)


@pytest.mark.parametrize("action", faults.ACTIONS)
def test_each_step(make_host: MakeHost, action: str) -> None:
    stage = Stage(make_host)
    done = 0
    for case in cases():
        if action in faults.POINTS[case[1]]:
            try:
                stage.run(case, action)
            except AssertionError as e:
                raise AssertionError(f"{action} at {case}: {e}") from e
            done += 1
    assert done >= 30
    until(lambda: stage.ends["agent"].call(leases) == 0)
    for end in stage.ends.values():
        end.close()
    for host in (stage.owner, stage.reader):
        settle(host.store)
        check_nothing_left(host.store)


def test_a_fault_that_can_not_happen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for point, action, says in (
        ("lokup sent", "cut", "no step of the protocol"),
        ("reserved", "corrupt", "can't happen at 'reserved'"),
    ):
        with pytest.raises(ConfigError, match=says):
            faults.arm(point, action)
    monkeypatch.setenv(faults.ENV, "check:kill:often")
    with pytest.raises(ConfigError, match="is not POINT:ACTION"):
        faults.arm_from_environment()
    assert not faults.armed
