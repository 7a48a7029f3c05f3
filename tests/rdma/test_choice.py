"""Which path is taken, where there is no RDMA: TCP, said once; and what an agent says that has none.

With devices the same is shown in the lab's guests (tests/rdma_lab).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvplug.errors import AgentError, Code, PeerTimeoutError
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.control import protocol as p
from kvplug.rdma.control.link import RefusedError
from kvplug.rdma.data.datapath import DataPath, Landing
from kvplug.rdma.reader import choice
from kvplug.rdma.reader.choice import ASIDE_FIRST_S, ChosenPath
from kvplug.rdma.reader.remote import Peer
from kvplug.rdma.verbs.binding import Port
from kvplug.rdma.verbs.rails import Gid, best_gid, gids_of
from tests.rdma.hosts import BLOCK, SOON_S, Host, keys, put

N = 32
NOBODYS = {"verbs_device": "kvplug-test0"}
"""A device that no host has."""


def offering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents say that they have verbs, and loopback counts as a network."""
    monkeypatch.setattr(Agent, "_welcome", lambda self: p.Welcome(self._config.lease_s, p.MAX_KEYS, ("tcp", "verbs")))
    monkeypatch.setattr(choice, "is_loopback", lambda _: False)


def ready(make_host: Callable[..., Host], **settings: Any) -> tuple[Peer, Any, Host]:
    owner, reader = make_host(), make_host(**NOBODYS, **settings)
    of = keys(N, 3)
    assert (put(owner.store, of, BLOCK) == 0).all()
    return reader.peer(owner.agent().address), of, reader


def test_a_reader_without_rdma_takes_tcp_and_says_so_once(
    make_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offering(monkeypatch)
    peer, of, reader = ready(make_host)
    with caplog.at_level(logging.WARNING, "kvplug"):
        assert (peer.fetch(of[:16]) == Code.OK).all()
        assert (peer.fetch(of[16:]) == Code.OK).all()
    assert reader.holds(of) == N
    said = [record.message for record in caplog.records if "verbs" in record.message]
    assert len(said) == 1, said
    assert "over TCP for now" in said[0]
    counters = peer.counters()
    assert (counters["verbs_not_set_up"], counters["verbs_to_tcp"]) == (1, 1), "set aside after the first"


def test_on_loopback_nobody_asks_for_verbs(make_host: Callable[..., Host]) -> None:
    peer, of, _ = ready(make_host)
    assert (peer.fetch(of) == Code.OK).all()
    assert isinstance(peer._path, ChosenPath)
    assert not peer._path.takes_verbs()
    assert not [name for name in peer.counters() if name.startswith("verbs")]


def test_asked_for_alone_verbs_are_that_or_a_miss(
    make_host: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    peer, of, _ = ready(make_host, data_path="verbs")
    with caplog.at_level(logging.WARNING, "kvplug"):
        assert (peer.fetch(of) == Code.TIMEOUT).all()
    assert "data_path = verbs" in caplog.text


def test_an_agent_that_is_told_to_use_verbs_and_has_none_does_not_start(make_host: Callable[..., Host]) -> None:
    host = make_host(**NOBODYS)
    with pytest.raises(AgentError, match="data_path = verbs, but"):
        Agent(host.exchange, host.config.with_changes(data_path="verbs"))
    host.agent()  # its lock was let go


@pytest.mark.parametrize("data_path", ["tcp", "auto"])
def test_an_agent_without_verbs_refuses_a_queue_and_serves_on(make_host: Callable[..., Host], data_path: str) -> None:
    owner, reader = make_host(data_path=data_path), make_host()
    peer = reader.peer(owner.agent().address)
    end = p.QueueEnd(1, 2, bytes(16), 0, 3, 1)
    for message in (p.OpenQueue(end, 0), p.GetRegions(0, 1, bytes(4), 1.0)):
        with pytest.raises(RefusedError, match="can't do"):
            peer.link.ask(message, p.QueueOpened, time.monotonic() + SOON_S)
    assert peer.link.welcome is not None
    assert peer.link.welcome.paths == ("tcp",)
    assert peer.link.generation == 1


class Failing(DataPath):
    """A path that fails as told."""

    name = "verbs"

    def __init__(self) -> None:
        self.errors: list[Any] = []

    def read(self, wanted: Any, deadline: float, arrived: Any) -> Landing:
        landing = Landing()
        landing.error = self.errors.pop(0)
        landing.settle()
        return landing

    def close(self) -> None:
        """Nothing to close."""


def test_a_fabric_that_fails_twice_in_a_row_is_set_aside_for_longer_each_time(
    make_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    offering(monkeypatch)
    peer, of, _ = ready(make_host)
    path = peer._path
    assert isinstance(path, ChosenPath)
    peer.link.connect(time.monotonic() + SOON_S)
    failing = path.verbs = Failing()  # type: ignore[assignment]
    fault = PeerTimeoutError("told to")
    now = [time.monotonic()]
    monkeypatch.setattr(choice.time, "monotonic", lambda: now[0])
    failing.errors = [fault, None, fault, fault]
    for expected in (True, True, True, False):
        assert path.takes_verbs()
        path.read([0], now[0] + 1e6, lambda _: None)  # type: ignore[arg-type]
        assert path.takes_verbs() is expected
    now[0] += ASIDE_FIRST_S
    assert path.takes_verbs()
    failing.errors = [fault]
    path.read([0], now[0] + 1e6, lambda _: None)  # type: ignore[arg-type]
    now[0] += ASIDE_FIRST_S
    assert not path.takes_verbs()
    now[0] += ASIDE_FIRST_S
    assert path.takes_verbs()
    assert len(of) == N


# ---- addresses -------------------------------------------------------------------------------------------------------

LINK_LOCAL = Gid(0, bytes.fromhex("fe80000000000000020000fffe000001"), True)
V4_ROCE1 = Gid(1, bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 7]), False)
V4 = Gid(2, bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 7]), True)
OTHER_V4 = Gid(3, bytes(10) + b"\xff\xff" + bytes([192, 168, 1, 7]), True)
V6 = Gid(4, bytes.fromhex("20010db8000000000000000000000007"), True)


@pytest.mark.parametrize(
    ("gids", "near", "best"),
    [
        ((LINK_LOCAL, V4_ROCE1, V4, OTHER_V4, V6), "10.0.0.7", V4),
        ((LINK_LOCAL, V4, OTHER_V4, V6), "192.168.1.7", OTHER_V4),
        ((LINK_LOCAL, V4, OTHER_V4, V6), "2001:db8::7", V6),
        ((LINK_LOCAL, V4, OTHER_V4), "172.16.0.1", V4),
        ((LINK_LOCAL, V6), "", V6),
        ((LINK_LOCAL, V4_ROCE1), "10.0.0.7", LINK_LOCAL),
        ((LINK_LOCAL,), "", LINK_LOCAL),
    ],
)
def test_the_address_is_the_controls_own_else_one_that_is_routed(gids: Any, near: str, best: Gid) -> None:
    assert best_gid(gids, near) is best


def test_a_ports_addresses_are_read_past_holes(tmp_path: Any) -> None:
    folder = tmp_path / "rxe0" / "ports" / "1"
    (folder / "gids").mkdir(parents=True)
    (folder / "gid_attrs" / "types").mkdir(parents=True)
    for gid in (LINK_LOCAL, OTHER_V4):
        text = ":".join(gid.raw.hex()[i : i + 4] for i in range(0, 32, 4))
        (folder / "gids" / str(gid.index)).write_text(text + "\n")
        (folder / "gid_attrs" / "types" / str(gid.index)).write_text("RoCE v2\n")
    for hole in np.setdiff1d(np.arange(64), [0, 3]).tolist():
        (folder / "gids" / str(hole)).write_text("0000:" * 7 + "0000\n")
    port = Port("rxe0", 1, 0, 3, 1 << 20, 100, 16)
    assert gids_of(port, tmp_path) == (LINK_LOCAL, OTHER_V4)
