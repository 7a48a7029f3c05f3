"""Who is let in: who has the key, says so freshly, means this agent, and only for as long as he may."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvplug.errors import AgentError, Code, ConfigError, PeerAuthError, PeerError, ProtocolError
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.control import protocol as p
from kvplug.rdma.control.auth import check_exposure, open_handshake, shared_key
from kvplug.rdma.control.wire import FrameMac
from tests.rdma.handshakes import admitted, ask, dial, frame, half_way, is_hung_up_on, opened
from tests.rdma.hosts import BLOCK, KEY, SOON_S, Host, Proxy, keys, put, until

MakeHost = Callable[..., Host]
OTHER_KEY = "another key for the tests of kvplug"


@pytest.fixture
def owner(make_host: MakeHost) -> Host:
    host = make_host()
    put(host.store, keys(8, 1), BLOCK)
    return host


def refused(host: Host, agent: Agent, reader: Host, address: str = "") -> str:
    """The reader gets nothing, nothing is read, and the agent serves others still. Why, in the reader's words."""
    peer = reader.peer(address or agent.address)
    assert (peer.fetch(keys(8, 1)) == Code.TIMEOUT).all()
    counters = agent.counters()
    assert "lookups" not in counters
    assert "bytes_sent" not in counters
    good = host.peer(agent.address)
    assert good.stats().leases == 0
    with pytest.raises(PeerError) as caught:
        reader.peer(address or agent.address).stats()
    assert isinstance(caught.value, PeerAuthError), caught.value
    return str(caught.value)


def test_the_wrong_key_gets_nothing(owner: Host, make_host: MakeHost) -> None:
    agent = owner.agent()
    assert "KVPLUG_AUTH_KEY" in refused(owner, agent, make_host(auth_key=OTHER_KEY))
    until(lambda: agent.counters()["auth_failures"] == 2)


def test_no_key_gets_nothing_where_there_is_one(owner: Host, make_host: MakeHost) -> None:
    assert "only one of the two has a key" in refused(owner, owner.agent(), make_host(auth_key=None))


def test_a_reader_with_a_key_does_not_talk_to_an_agent_without(make_host: MakeHost) -> None:
    """Else whoever listens at the agent's port first would be asked."""
    owner, reader = make_host(auth_key=None), make_host()
    with pytest.raises(PeerAuthError, match="only one of the two has a key"):
        reader.peer(owner.agent().address).stats()


def test_an_agent_that_has_not_the_key_is_found_out(owner: Host, make_host: MakeHost) -> None:
    impostor = make_host(auth_key=OTHER_KEY)
    with pytest.raises(PeerAuthError):
        owner.peer(impostor.agent().address).stats()


def test_a_handshake_that_was_listened_to_is_good_for_nothing(owner: Host, make_host: MakeHost, proxy: Proxy) -> None:
    """Everything that a reader sent, sent again to the same agent: its challenge is another one now."""
    agent = owner.agent(agent_advertise=proxy.address)
    proxy.upstream = agent.address
    reader = make_host()
    assert (reader.peer(proxy.address).fetch(keys(8, 1)) == Code.OK).all()
    before = agent.counters()["lookups"]
    dialled = []
    for recorded, _ in proxy.recorded:
        again = dial(agent.address)
        again.sock.sendall(bytes(recorded))
        dialled.append(again)
    until(lambda: agent.counters().get("auth_failures", 0) >= len(proxy.recorded))
    assert agent.counters()["lookups"] == before
    for again in dialled:
        again.close()


def test_a_challenge_that_was_listened_to_lets_nobody_pose_as_the_agent(
    owner: Host, make_host: MakeHost, proxy: Proxy
) -> None:
    """Everything that the agent sent, sent again to a reader who dials: its Hello is another one now."""
    agent = owner.agent(agent_advertise=proxy.address)
    proxy.upstream = agent.address
    assert (make_host().peer(proxy.address).fetch(keys(8, 1)) == Code.OK).all()
    recorded = [bytes(said) for _, said in proxy.recorded]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pose() -> None:
            for _ in range(2):
                sock, _ = listener.accept()
                sock.sendall(recorded[0])
                opened.append(sock)

        thread = threading.Thread(target=pose)
        thread.start()
        reader = make_host()
        peer = reader.peer(f"127.0.0.1:{listener.getsockname()[1]}")
        assert (peer.fetch(keys(8, 1)) == Code.TIMEOUT).all()
        with pytest.raises(ProtocolError, match="MAC"):
            reader.peer(peer.address).stats()
        thread.join(5)
    assert reader.holds(keys(8, 1)) == 0


def test_a_proof_of_another_challenge_is_refused(owner: Host) -> None:
    agent = owner.agent()
    first, second = dial(agent.address), dial(agent.address)
    session, _ = half_way(first, shared_key(owner.config))
    half_way(second, shared_key(owner.config))
    header, body = p.encode(p.Proof(), 0)
    proof = frame(p.Proof(), FrameMac(session.to_agent).next(header, body))
    second.sock.sendall(proof)
    assert is_hung_up_on(second)
    until(lambda: agent.counters().get("auth_failures") == 1)
    assert "lookups" not in agent.counters()
    first.sock.sendall(proof)
    first.secure(session.to_agent, session.to_reader)
    assert isinstance(first.receive(time.monotonic() + SOON_S)[0], p.Welcome)


def test_the_agents_own_frames_are_no_proof(owner: Host) -> None:
    """Reflection: a MAC of the other direction is none of this one."""
    agent = owner.agent()
    connection = dial(agent.address)
    session, _ = half_way(connection, shared_key(owner.config))
    header, body = p.encode(p.Proof(), 0)
    connection.sock.sendall(frame(p.Proof(), FrameMac(session.to_reader).next(header, body)))
    assert is_hung_up_on(connection)


def test_requests_before_the_proof_are_refused(owner: Host) -> None:
    agent = owner.agent()
    connection = dial(agent.address)
    connection.sock.sendall(frame(p.Lookup(keys(8, 1).tobytes(), 5.0)))
    assert is_hung_up_on(connection)
    connection = dial(agent.address)
    half_way(connection, shared_key(owner.config))
    connection.sock.sendall(frame(p.Lookup(keys(8, 1).tobytes(), 5.0)) + bytes(16))
    assert is_hung_up_on(connection)
    assert "lookups" not in agent.counters()


@pytest.mark.parametrize("attack", ["replayed", "reordered", "left out", "changed", "without its MAC"])
def test_every_frame_is_held_to_its_place_and_content(owner: Host, attack: str) -> None:
    agent = owner.agent()
    connection, session = admitted(owner, agent.address)
    mac = FrameMac(session.to_agent)
    mac.next(*p.encode(p.Proof(), 0))
    frames = [frame(m, mac.next(*p.encode(m, 0))) for m in (p.Stats(), p.GetTicket(), p.Stats())]
    if attack == "replayed":
        sent = frames[0] + frames[0]
    elif attack == "reordered":
        sent = frames[1] + frames[0]
    elif attack == "left out":
        sent = frames[0] + frames[2]
    elif attack == "changed":
        sent = frames[0] + frames[1][:3] + bytes([11]) + frames[1][4:]  # asks for something else
    else:
        sent = frames[0] + frames[1][:-16] + bytes(16)
    connection.sock.sendall(sent)
    if attack != "reordered":
        connection.receive(time.monotonic() + SOON_S)
    assert is_hung_up_on(connection)
    until(lambda: agent.counters().get("protocol_errors") == 1)


def test_a_frame_of_the_agents_that_was_changed_ends_the_connection(
    owner: Host, make_host: MakeHost, proxy: Proxy
) -> None:
    from tests.rdma.hosts import Fault

    agent = owner.agent(agent_advertise=proxy.address)
    proxy.upstream = agent.address
    reader = make_host()
    peer = reader.peer(proxy.address)
    peer.stats()
    proxy.fault = Fault("flip", 0, to_agent=False, at=proxy.passed[0][1] + 20)
    with pytest.raises(ProtocolError, match="MAC"):
        peer.stats()
    assert peer.stats().leases == 0  # on a new connection


def test_a_reader_must_mean_this_agent(owner: Host, make_host: MakeHost, proxy: Proxy) -> None:
    """Who passes a handshake on to a host that was not meant is refused, unless that host goes by that name too."""
    agent = owner.agent()
    proxy.upstream = agent.address
    assert "KVPLUG_AGENT_ADVERTISE" in refused(owner, agent, make_host(), proxy.address)


def test_a_ticket_is_good_once_for_its_reader_and_not_for_long(owner: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = owner.agent()
    control, session = admitted(owner, agent.address)

    def ticket() -> bytes:
        return p.expect(ask(control, p.GetTicket()), p.Ticket).ticket

    def show(given: bytes, key: bytes) -> None:
        connection = dial(agent.address)
        open_handshake(connection, key, time.monotonic() + SOON_S, ticket=given)

    first = ticket()
    with pytest.raises(PeerAuthError):  # who has listened knows the ticket, but not its key
        show(first, shared_key(owner.config) or b"")
    show(first, session.ticket_key(first))
    with pytest.raises(PeerAuthError):
        show(first, session.ticket_key(first))
    with pytest.raises(PeerAuthError, match="not good any more"):
        show(b"0" * 16, session.ticket_key(b"0" * 16))
    _, other = admitted(owner, agent.address)
    second = ticket()
    with pytest.raises(PeerAuthError):
        show(second, other.ticket_key(second))
    monkeypatch.setattr("kvplug.rdma.agent.agent.TICKET_S", 0.0)
    third = ticket()
    with pytest.raises(PeerAuthError, match="not good any more"):
        show(third, session.ticket_key(third))
    monkeypatch.undo()
    fourth = ticket()
    control.close()
    until(lambda: len(agent._readers) == 1)
    with pytest.raises(PeerAuthError, match="not good any more"):
        show(fourth, session.ticket_key(fourth))


def test_tickets_are_bounded(owner: Host) -> None:
    agent = owner.agent()
    control, _ = admitted(owner, agent.address)
    answers = [ask(control, p.GetTicket()) for _ in range(40)]
    assert [type(a).__name__ for a in answers] == ["Ticket"] * 32 + ["Failed"] * 8


def test_another_readers_lease_can_not_be_read(owner: Host) -> None:
    agent = owner.agent()
    one, _ = admitted(owner, agent.address)
    two, session = admitted(owner, agent.address)
    lease = p.expect(ask(one, p.Lookup(keys(8, 1).tobytes(), 5.0)), p.Leased).lease
    assert lease
    ticket = p.expect(ask(two, p.GetTicket()), p.Ticket).ticket
    data = dial(agent.address)
    open_handshake(data, session.ticket_key(ticket), time.monotonic() + SOON_S, ticket=ticket)
    assert ask(data, p.Read(lease, p.raw(np.arange(8), np.uint32))) == p.Failed("lease")
    assert p.expect(ask(two, p.Release((lease,))), p.Released).count == 0
    assert p.expect(ask(two, p.Extend(lease, 5.0)), p.Extended).seconds == 0
    assert "bytes_sent" not in agent.counters()


def test_a_block_outside_the_lease_can_not_be_read(owner: Host) -> None:
    agent = owner.agent()
    control, session = admitted(owner, agent.address)
    lease = p.expect(ask(control, p.Lookup(keys(8, 1)[:2].tobytes(), 5.0)), p.Leased).lease
    ticket = p.expect(ask(control, p.GetTicket()), p.Ticket).ticket
    data = dial(agent.address)
    open_handshake(data, session.ticket_key(ticket), time.monotonic() + SOON_S, ticket=ticket)
    data.send(p.Read(lease, p.raw(np.array([2]), np.uint32)), 1, time.monotonic() + SOON_S)
    assert is_hung_up_on(data)


# ---- addresses and TLS


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_without_key_or_tls_it_listens_on_loopback_only(make_host: MakeHost, listen: str) -> None:
    host = make_host(auth_key=None)
    with pytest.raises(AgentError, match="KVPLUG_AUTH_KEY"):
        host.agent(agent_listen=listen)
    check_exposure(listen, guarded=True)
    check_exposure("127.0.0.1:0", guarded=False)
    host.agent()  # the refusal kept nothing that would be in its way


def test_tls_wants_both_certificates_of_the_same_ca(make_host: MakeHost, certs: dict[str, dict[str, str]]) -> None:
    owner, reader = make_host(**certs["a"]), make_host(**certs["b"])
    put(owner.store, keys(8, 1), BLOCK)
    agent = owner.agent()
    assert (reader.peer(agent.address).fetch(keys(8, 1)) == Code.OK).all()
    before = agent.counters()["lookups"]
    for stranger in (make_host(**certs["stranger"]), make_host()):  # another CA's; no TLS at all
        assert (stranger.peer(agent.address).fetch(keys(8, 1)) == Code.TIMEOUT).all()
    until(lambda: agent.counters().get("auth_failures", 0) >= 2)
    assert agent.counters()["lookups"] == before
    with pytest.raises(PeerAuthError, match="no TLS with"):  # nor does a reader trust a stranger's agent
        reader.peer(make_host(**certs["stranger"]).agent().address).stats()


def test_tls_files_that_are_not_there_are_named(make_host: MakeHost, tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing.pem")
    with pytest.raises(ConfigError, match=r"nothing\.pem"):
        make_host(tls_cert=nothing, tls_key=nothing, tls_ca=nothing).agent()


def test_the_key_is_in_no_message_of_an_agent(owner: Host, make_host: MakeHost, proxy: Proxy) -> None:
    agent = owner.agent(agent_advertise=proxy.address)
    proxy.upstream = agent.address
    make_host().peer(proxy.address).fetch(keys(8, 1))
    secret = shared_key(owner.config)
    assert secret
    for directions in proxy.recorded:
        for sent in directions:
            assert KEY.encode() not in sent
            assert secret not in sent
