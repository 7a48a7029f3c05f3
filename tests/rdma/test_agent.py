"""The agent as a process: one per pool, bounded in everything, gone without a trace however it goes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvplug.errors import AgentError, Code
from kvplug.rdma.control import protocol as p
from kvplug.rdma.control.auth import open_handshake
from kvplug.rdma.control.leases import MAX_LEASES_A_READER
from kvplug.rdma.verbs.describe import describe_peers
from kvplug.shm import segment
from tests.lab.env import free_port
from tests.pool.children import check_nothing_left, settle
from tests.rdma.handshakes import admitted, ask, dial
from tests.rdma.hosts import BLOCK, KEY, SOON_S, Host, keys, put, until
from tests.stopwatch import Stopwatch

MakeHost = Callable[..., Host]
COMMAND = [sys.executable, "-c", "from kvplug.cli import main; main()", "agent"]


def command(host: Host, **settings: str) -> subprocess.Popen[str]:
    """`kvplug agent` for this host's pool."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
    given = {"pool": host.config.pool, "size": "32mib", "auth_key": KEY, "agent_listen": "127.0.0.1:0"} | settings
    environment = clean | {f"KVPLUG_{name.upper()}": value for name, value in given.items() if value}
    return subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_the_command_serves_and_ends_on_sigterm(make_host: MakeHost) -> None:
    owner, reader = make_host(), make_host()
    put(owner.store, keys(8, 1), BLOCK)
    process = command(owner)
    line = first_line(process)
    assert line.startswith(f"serving pool {owner.config.pool} at 127.0.0.1:")
    peer = reader.peer(line.split()[-1])
    assert (peer.fetch(keys(8, 1)) == Code.OK).all()
    asked = peer.link.ask(p.Lookup(keys(8, 1).tobytes(), 10.0), p.Leased, time.monotonic() + SOON_S)
    assert asked.lease  # and is not released
    watch = Stopwatch()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=SOON_S)
    assert (process.returncode, out, err) == (0, "", "")
    assert watch.took_s() < 9, "it waits for no lease"
    check_nothing_left(owner.store)


def test_the_command_says_what_is_wrong_in_one_line(make_host: MakeHost) -> None:
    host = make_host()
    host.agent()
    process = command(host)
    out, err = process.communicate(timeout=SOON_S)
    assert (process.returncode, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "another agent serves pool" in err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"auth_key": None, "agent_listen": "0.0.0.0:0"}, "which others can reach: set KVPLUG_AUTH_KEY"),
        ({"agent_listen": "192.0.2.1:9410"}, "cannot listen on 192.0.2.1:9410"),
        ({"agent_listen": "no-such-host.invalid:9410"}, "nobody knows the address of 'no-such-host.invalid'"),
        ({"agent_advertise": "no-such-host.invalid:9410"}, "nobody knows the address of 'no-such-host.invalid'"),
    ],
)
def test_an_agent_that_can_not_listen_says_why(make_host: MakeHost, settings: dict[str, str], says: str) -> None:
    with pytest.raises(AgentError) as caught:
        make_host(**settings).agent()
    assert says in str(caught.value)


def test_without_a_key_it_says_who_can_read(make_host: MakeHost) -> None:
    process = command(make_host(), auth_key="")
    assert "serving pool" in first_line(process)
    process.terminate()
    assert "every user of this host can read the pool" in process.communicate(timeout=SOON_S)[1]


def test_a_second_agent_waits_for_nothing_and_is_told(make_host: MakeHost) -> None:
    owner = make_host()
    child, _ = owner.agent_process()
    watch = Stopwatch()
    with pytest.raises(AgentError, match="another agent serves pool"):
        owner.agent()
    assert watch.took_s() < 1
    child.kill()
    owner.agent()  # the kernel has let go of the lock


def test_killed_it_leaves_no_pin(make_host: MakeHost) -> None:
    owner, reader = make_host(), make_host()
    put(owner.store, keys(16, 1), BLOCK)
    child, address = owner.agent_process()
    peer = reader.peer(address)
    assert peer.link.ask(p.Lookup(keys(16, 1).tobytes(), 10.0), p.Leased, time.monotonic() + SOON_S).lease
    assert owner.store.stats().pinned_slots == 16
    child.kill()
    settle(owner.store)
    check_nothing_left(owner.store)


def test_a_removed_pool_ends_its_agent(make_host: MakeHost) -> None:
    owner = make_host()
    process = command(owner)
    address = first_line(process).split()[-1]
    segment.remove_pool(owner.config.pool, force=True)
    reader = make_host()
    assert (reader.peer(address).fetch(keys(1, 1)) < 0).all()
    assert "the pool was removed" in process.communicate(timeout=SOON_S)[1]
    assert process.returncode == 1


# ---- bounds


def test_a_reader_that_goes_takes_its_leases_along(make_host: MakeHost) -> None:
    owner = make_host()
    put(owner.store, keys(16, 1), BLOCK)
    agent = owner.agent()
    control, _ = admitted(owner, agent.address)
    assert p.expect(ask(control, p.Lookup(keys(16, 1).tobytes(), 10.0)), p.Leased).lease
    assert agent.leases.held() == (1, 16 * BLOCK)
    assert owner.store.remove(keys(16, 1)).tolist() == [Code.PINNED] * 16
    control.close()
    until(lambda: agent.leases.held() == (0, 0))
    until(lambda: owner.store.stats().pinned_slots == 0)


def test_a_reader_that_stops_loses_its_leases(make_host: MakeHost) -> None:
    owner = make_host(lease_s=0.5)
    put(owner.store, keys(16, 1), BLOCK)
    agent = owner.agent()
    control, _ = admitted(owner, agent.address)
    answer = p.expect(ask(control, p.Lookup(keys(16, 1).tobytes(), 10.0)), p.Leased)
    assert answer.seconds == 0.5  # never more than the agent's own
    until(lambda: agent.leases.held() == (0, 0))
    until(lambda: owner.store.stats().pinned_slots == 0)
    assert agent.counters()["leases_expired"] == 1
    assert p.expect(ask(control, p.Extend(answer.lease, 10.0)), p.Extended).seconds == 0
    control.close()


def test_leases_are_bounded_in_bytes_and_number(make_host: MakeHost) -> None:
    owner = make_host(agent_pin_share=0.25)
    of = keys(256, 1)
    put(owner.store, of, BLOCK)
    agent = owner.agent()
    most = int(owner.exchange.data_bytes * 0.25)
    readers = [admitted(owner, agent.address)[0] for _ in range(4)]
    got = []
    for i, reader in enumerate(readers):
        answer = p.expect(ask(reader, p.Lookup(np.roll(of, 64 * i, axis=0).tobytes(), 10.0)), p.Leased)
        codes = p.array(answer.codes, np.int8)
        got.append(int((codes == 0).sum()))
        assert set(codes.tolist()) <= {0, Code.BUDGET}
    assert got[0] * BLOCK <= most // 2
    assert got[0] == got[1] > 0
    assert sum(got) * BLOCK <= most
    assert agent.leases.held()[1] <= most
    for reader in readers:
        reader.close()
    until(lambda: agent.leases.held() == (0, 0))
    put(owner.store, keys(1, 3), 100)
    reader = admitted(owner, agent.address)[0]
    of = keys(1, 3)
    for _ in range(MAX_LEASES_A_READER):
        assert p.expect(ask(reader, p.Lookup(of[:1].tobytes(), 10.0)), p.Leased).lease
    answer = p.expect(ask(reader, p.Lookup(of[:1].tobytes(), 10.0)), p.Leased)
    assert (answer.lease, p.array(answer.codes, np.int8).tolist()) == (0, [Code.BUDGET])
    reader.close()


def test_connections_are_bounded_and_those_that_are_there_go_on(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = make_host()
    agent = owner.agent()
    control, _ = admitted(owner, agent.address)
    monkeypatch.setattr("kvplug.rdma.agent.agent.MAX_CONNECTIONS", 3)
    strangers = [dial(agent.address) for _ in range(6)]
    until(lambda: agent.counters().get("refused") == 4)
    assert isinstance(ask(control, p.Stats()), p.StatsReply)
    for one in strangers:
        one.close()
    until(lambda: len(agent._connections) == 1)
    assert admitted(owner, agent.address)


def test_a_pool_in_use_by_leases_still_stores(make_host: MakeHost) -> None:
    """Three quarters of the pool are not the readers'."""
    owner = make_host()
    of = keys(256, 1)
    put(owner.store, of, BLOCK)
    agent = owner.agent()
    held = [admitted(owner, agent.address)[0] for _ in range(4)]
    for one in held:
        ask(one, p.Lookup(of.tobytes(), 10.0))
    assert (put(owner.store, keys(512, 2), BLOCK) == 0).all()
    for one in held:
        one.close()


def test_a_reader_that_stops_in_mid_read_holds_up_nobody(make_host: MakeHost) -> None:
    owner, reader = make_host(lease_s=1.0), make_host()
    of = keys(64, 1)
    put(owner.store, of, BLOCK)
    agent = owner.agent()
    control, session = admitted(owner, agent.address)
    lease = p.expect(ask(control, p.Lookup(of.tobytes(), 1.0)), p.Leased).lease
    ticket = p.expect(ask(control, p.GetTicket()), p.Ticket).ticket
    data = dial(agent.address)
    open_handshake(data, session.ticket_key(ticket), time.monotonic() + 2, ticket=ticket)
    many = np.tile(np.arange(32), 32)  # 64 MiB: no socket holds that
    data.send(p.Read(lease, p.raw(many, np.uint32)), 1, time.monotonic() + SOON_S)
    watch = Stopwatch()
    assert (reader.peer(agent.address).fetch(of) == Code.OK).all()
    assert watch.took_s() < 1
    until(lambda: agent.counters().get("broken", 0) >= 1)  # its lease ended, and with it the read
    until(lambda: agent.leases.held() == (0, 0))
    data.sock.settimeout(5)
    with contextlib.suppress(ConnectionError):
        while data.sock.recv(1 << 20):
            pass
    for connection in (control, data):
        connection.close()


def test_a_closed_agent_has_let_everybody_go(make_host: MakeHost) -> None:
    owner, reader = make_host(), make_host()
    put(owner.store, keys(8, 1), BLOCK)
    agent = owner.agent()
    peer = reader.peer(agent.address)
    peer.fetch(keys(8, 1))
    watch = Stopwatch()
    agent.close()
    agent.close()
    assert watch.took_s() < 3
    assert not agent._connections
    again = owner.agent(agent_listen=agent.address)
    reader.store.remove(keys(8, 1))
    assert (peer.fetch(keys(8, 1)) == Code.OK).all()  # a restart in between is not even a miss
    assert again.counters()["lookups"] >= 1


def test_the_doctor_asks_the_peers(make_host: MakeHost) -> None:
    """One that answers, one with another key, one that is not there."""
    there, here = make_host(), make_host()
    address, nobody = there.agent().address, f"127.0.0.1:{free_port()}"
    config = here.config.with_changes(peers=(address, nobody))
    good, gone = describe_peers(config)
    assert (good.status, good.found.split(";")[0]) == ("ok", f"{address} answers")
    assert gone.status == "warning"
    assert nobody in gone.found
    assert "kvplug agent" in gone.fix
    (stranger,) = describe_peers(config.with_changes(peers=(address,), auth_key="not the key of this house"))
    assert stranger.status == "warning"
    assert "KVPLUG_AUTH_KEY" in stranger.found + stranger.fix
    assert list(describe_peers(here.config)) == []


def test_who_is_refused_is_said_once_a_minute(make_host: MakeHost, caplog: pytest.LogCaptureFixture) -> None:
    there, here = make_host(), make_host()
    agent = there.agent()
    wrong = here.config.with_changes(peers=(agent.address,), auth_key="not the key of this house")
    for _ in range(3):
        list(describe_peers(wrong))
    until(lambda: agent.counters().get("auth_failures", 0) >= 3)
    lines = [record.getMessage() for record in caplog.records if "agent: refused" in record.getMessage()]
    assert len(lines) == 1
    assert "auth_failures" in lines[0]
