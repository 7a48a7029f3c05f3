"""Agents as they are run, found by the directory: who has a prefix is asked for it, and its bytes arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvplug import doctor
from kvplug.config import Config
from kvplug.errors import Code, ConfigError
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.peering import directory_publisher, directory_reader, host_id, known_peers
from tests.pool.children import blocks
from tests.rdma.directory_parts import counts, ids, wait_for
from tests.rdma.hosts import BLOCK, KEY, Host, keys, put
from tests.rdma.redis_server import RedisServer

PASSWORD = "only for this test"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    made = RedisServer(password=PASSWORD)
    yield made
    made.close()


def url_of(server: RedisServer) -> str:
    return f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{server.port}"


def end(agent: subprocess.Popen[str]) -> None:
    agent.kill()
    agent.wait(60)
    if agent.stdout:
        agent.stdout.close()


def start_agent(host: Host, server: RedisServer, **more: str) -> subprocess.Popen[str]:
    settings = {"pool": host.config.pool, "auth_key": KEY, "agent_listen": "127.0.0.1:0"}
    settings |= {"directory_url": url_of(server), "directory_ttl_s": "2"} | more
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
    return subprocess.Popen(
        [sys.executable, "-c", "from kvplug.cli import main; main()", "agent"],
        env=clean | {f"KVPLUG_{name.upper()}": value for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_prefix_is_found_and_fetched_from_who_has_most_of_it(
    make_host: Callable[..., Host], server: RedisServer
) -> None:
    here, most, some = make_host(), make_host(), make_host()
    wanted = keys(40, 1)
    put(most.store, wanted[:30], BLOCK)
    put(some.store, wanted[:10], BLOCK)
    agents = [start_agent(host, server) for host in (most, some)]
    reader = directory_reader(
        Config(pool="any", auth_key=KEY, directory_url=url_of(server), directory_ttl_s=2, directory_timeout_s=5),
        here.store,
    )
    assert reader is not None
    known = known_peers(here.config.with_changes(peers=("10.0.0.7:9410", "127.0.0.1:0")), reader)
    try:
        expected = {host_id(most.store): 30, host_id(some.store): 10}
        hits = wait_for(lambda: counts(h := reader.lookup(wanted)) == expected and h)
        assert {peer.address for peer in known.peers()} == {*(peer.address for peer in hits.peers), "10.0.0.7:9410"}
        best = hits.peers[int(np.argmax(hits.leading()))]
        assert best.id == host_id(most.store)
        peer = Peer(best.address, here.exchange, here.config)
        try:
            codes = peer.fetch(wanted, timeout_s=20)
        finally:
            peer.close()
        assert codes.tolist() == [Code.OK] * 30 + [Code.MISSING] * 10
        out = np.zeros((30, BLOCK), np.uint8)
        assert not here.store.get_into(wanted[:30], list(out)).any()
        assert (out == blocks(wanted[:30], BLOCK)).all()

        agents[0].send_signal(signal.SIGTERM)  # leaves the directory at once
        wait_for(lambda: ids(reader) == {host_id(some.store)})
        agents[1].kill()  # is forgotten when its time is up
        wait_for(lambda: not ids(reader))
        assert agents[0].wait(60) == 0
        assert agents[0].stdout is not None
        said = agents[0].stdout.read()
        assert PASSWORD not in said
        assert KEY not in said
    finally:
        known.close()
        for agent in agents:
            end(agent)


def test_an_agent_serves_also_while_there_is_no_directory(make_host: Callable[..., Host], server: RedisServer) -> None:
    here, there = make_host(), make_host()
    wanted = keys(5, 2)
    put(there.store, wanted, BLOCK)
    server.kill()
    agent = start_agent(there, server)
    try:
        assert agent.stdout is not None
        line = wait_for(lambda: (text := agent.stdout.readline()) and "serving pool" in text and text)
        peer = Peer(line.split()[-1], here.exchange, here.config)
        try:
            assert not peer.fetch(wanted, timeout_s=20).any()
        finally:
            peer.close()
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 0
    finally:
        end(agent)


def test_without_a_directory_in_the_settings_there_is_none(make_host: Callable[..., Host]) -> None:
    host = make_host()
    assert directory_reader(host.config) is None
    assert directory_publisher(host.config, host.store, "127.0.0.1:1") is None


def test_a_directory_elsewhere_needs_a_key_and_an_agent_an_address(make_host: Callable[..., Host]) -> None:
    host = make_host()
    with pytest.raises(ConfigError, match="needs auth_key"):
        directory_reader(Config(directory_url="redis://10.0.0.9"))
    reach = Config(directory_url="redis://10.0.0.9", auth_key=KEY)
    for wildcard in ("0.0.0.0:9410", "[::]:9410"):
        with pytest.raises(ConfigError, match="set agent_advertise"):
            directory_publisher(reach, host.store, wildcard)
    made = directory_publisher(reach.with_changes(agent_advertise="10.0.0.7:1"), host.store, "0.0.0.0:9410")
    assert made is not None
    assert made.me.address == "10.0.0.7:1"
    with pytest.raises(ConfigError, match="directory_url must be"):
        directory_reader(Config(directory_url="http://10.0.0.9", auth_key=KEY))


def test_the_doctor_says_whether_the_directory_answers(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> doctor.Finding:
        return next(finding for finding in doctor.examine() if finding.name == "directory")

    assert not [finding for finding in doctor.examine() if finding.name == "directory"]
    monkeypatch.setenv("KVPLUG_DIRECTORY_URL", url_of(server))
    assert found().status is doctor.Status.OK
    assert f"127.0.0.1:{server.port}/0 answers (" in found().found
    monkeypatch.setenv("KVPLUG_DIRECTORY_URL", url_of(server).replace("only", "wrong"))
    assert found().status is doctor.Status.WARNING
    assert "WRONGPASS" in found().found
    monkeypatch.setenv("KVPLUG_DIRECTORY_URL", "redis://10.0.0.9")
    assert found().status is doctor.Status.FAULT
    assert "needs auth_key" in found().found
