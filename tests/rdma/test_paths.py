"""The conformance suite over every data path there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from kvplug.rdma.control.protocol import Release, Released
from kvplug.rdma.reader.choice import ChosenPath
from tests.rdma.conformance import Conformance, Wire
from tests.rdma.hosts import SOON_S, Host


def tcp(make_host: Callable[..., Host], ours: dict[str, Any], theirs: dict[str, Any]) -> Wire:
    share = {"agent_pin_share": 1.0, "pin_budget_share": 1.0}
    owner, reader = make_host(**ours, **share), make_host(**theirs, **share)
    peer = reader.peer(owner.agent().address)
    assert isinstance(peer._path, ChosenPath)
    return Wire(owner, reader, peer, peer._path.tcp)


class TestTcp(Conformance):
    """With a shared key."""

    @pytest.fixture
    def wire(self, make_host: Callable[..., Host]) -> Wire:
        return tcp(make_host, {}, {})

    def test_a_lease_that_was_released_reads_nothing(self, wire: Wire) -> None:
        """The owner is asked here; by verbs it is not, and the reader's clock alone says so."""
        lease, leased = wire.lease()
        slots = wire.slots(leased)
        assert wire.peer.link.ask(Release((lease.id,)), Released, time.monotonic() + SOON_S).count == 1
        seen: list[Any] = []
        landing = wire.path.read(wire.wanted(lease, leased, slots.offsets), time.monotonic() + SOON_S, seen.append)
        assert landing.error is not None
        assert landing.wait_settled(2)
        assert not seen


class TestChosen(Conformance):
    """As the settings' defaults choose it."""

    @pytest.fixture
    def wire(self, make_host: Callable[..., Host]) -> Wire:
        wire = tcp(make_host, {}, {})
        wire.path = wire.peer._path
        return wire


class TestTcpByReference(Conformance):
    """From an address that is not the reader's own: what the agent does for another host."""

    @pytest.fixture
    def wire(self, make_host: Callable[..., Host]) -> Wire:
        made = tcp(make_host, {"agent_listen": "127.0.0.2:0"}, {})
        made.peer.link.connect(time.monotonic() + SOON_S)
        connection = made.peer.link._connection
        assert connection is not None
        assert not connection.is_same_host
        return made


class TestTcpWithoutKey(Conformance):
    """On loopback, open to every user of the host."""

    @pytest.fixture
    def wire(self, make_host: Callable[..., Host]) -> Wire:
        return tcp(make_host, {"auth_key": None}, {"auth_key": None})


class TestTcpOverTls(Conformance):
    """Both certificates checked."""

    @pytest.fixture
    def wire(self, make_host: Callable[..., Host], certs: dict[str, dict[str, str]]) -> Wire:
        return tcp(make_host, certs["a"], certs["b"])
