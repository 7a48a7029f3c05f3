"""The directory's server dies, stops, forgets, is slow, has no memory, lies: a miss, never a wait, and it heals."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvplug.rdma.directory import publisher as publishing
from kvplug.rdma.directory.directory import Directory
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.peers import PeerInfo, to_record
from kvplug.rdma.directory.publisher import Publisher
from kvplug.rdma.directory.resp import Endpoint
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.rdma.directory_parts import (
    SECRET,
    U8,
    a_host,
    a_pool,
    a_reader,
    counts,
    ids,
    is_settled,
    keys,
    put,
    wait_for,
)
from tests.rdma.redis_server import Delay, RedisServer
from tests.stopwatch import Stopwatch

BUSY_S = 1.5
"""What a starved machine may add to a deadline."""
NAMES = Names(SECRET)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    made = RedisServer()
    yield made
    made.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after a fraction of a second."""
    monkeypatch.setattr(publishing, "NO_MEMORY_RETRY_S", 0.2)
    monkeypatch.setattr(publishing, "AUDIT_S", 0.2)


def test_killed_and_back_empty_everything_is_announced_again(server: RedisServer) -> None:
    known = keys(300, 1)
    with a_host(server, "host", ttl_s=3) as (store, told), a_reader(server, timeout_s=0.5) as reader:
        put(store, known)
        wait_for(lambda: counts(reader.lookup(known)) == {"host": 300})
        server.kill()
        for _ in range(200):
            watch = Stopwatch()
            hits = reader.lookup(known)
            assert watch.took_s() < 0.5 + BUSY_S
            assert not hits.known
            assert hits.have.shape == (0, 300)
        assert ids(reader) == {"host"}, "who was known stays known, and can be asked directly"
        store.remove(known[:100])
        put(store, keys(50, 2))
        server.start()
        wait_for(lambda: counts(reader.lookup(known)) == {"host": 200})
        wait_for(lambda: is_settled(store, told, server))
        assert told.stats().failures > 0


def test_not_there_at_first_does_not_matter(server: RedisServer) -> None:
    known = keys(30, 3)
    server.kill()
    with a_host(server, "early", ttl_s=3) as (store, told), a_reader(server) as reader:
        put(store, known)
        wait_for(lambda: told.stats().failures and reader.stats().failures)
        assert not reader.lookup(known).known
        assert reader.peers() == ()
        server.start()
        wait_for(lambda: counts(reader.lookup(known)) == {"early": 30})


def test_stopped_it_costs_one_deadline_and_then_nothing(server: RedisServer) -> None:
    """SIGSTOP: connections are still accepted, and nobody answers."""
    known = keys(100, 4)
    with a_host(server, "host", ttl_s=3) as (store, told), a_reader(server, timeout_s=0.2) as reader:
        put(store, known)
        wait_for(lambda: counts(reader.lookup(known, 5.0)) == {"host": 100})
        with server.stopped():
            waits = []
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                began = time.monotonic()
                assert not reader.lookup(known).known
                waits.append(time.monotonic() - began)
                time.sleep(0.002)
            assert max(waits) < 0.2 + BUSY_S
            assert reader.stats().timeouts <= 2, "only the first of many waited for its answer"
            assert len(waits) > 50
            assert ids(reader) == {"host"}
            store.remove(known[:40])
        wait_for(lambda: counts(reader.lookup(known, 5.0)) == {"host": 60})
        wait_for(lambda: is_settled(store, told, server))


def test_slow_it_is_asked_less_and_less(server: RedisServer) -> None:
    """It answers, always later than anybody waits."""
    known = keys(20, 5)
    slow = Delay(server, 0.15)
    with a_host(server, "host") as (store, _), a_reader(slow, ttl_s=6, timeout_s=0.1) as reader:
        put(store, known)
        wait_for(lambda: counts(reader.lookup(known, 5.0)) == {"host": 20})
        until = time.monotonic() + 4
        while time.monotonic() < until:
            watch = Stopwatch()
            assert not reader.lookup(known).known
            assert watch.took_s() < 0.1 + BUSY_S
            time.sleep(0.002)
        assert 2 <= reader.stats().timeouts <= 5, "each look-up that came too late leaves the server alone for longer"
        wait_for(lambda: counts(reader.lookup(known, 5.0)) == {"host": 20})
    slow.close()


def test_without_memory_what_fits_is_announced_and_the_rest_when_there_is_some(
    server: RedisServer, quick: None
) -> None:
    witness = server.witness()
    with a_host(server, "host", ttl_s=1.5) as (store, told), a_reader(server) as reader:
        wait_for(lambda: ids(reader) == {"host"})
        witness.config_set("maxmemory-policy", "noeviction")
        witness.config_set("maxmemory", str(1024))
        known = keys(2000, 6)
        put(store, known)
        wait_for(lambda: told.stats().refused > 0)
        time.sleep(3)  # twice the time to live
        assert ids(reader) == {"host"}, "a host that can't write is still a member"
        assert told.stats().failures == 0
        store.remove(known[:500])
        witness.config_set("maxmemory", "0")
        wait_for(lambda: is_settled(store, told, server))
        wait_for(lambda: counts(reader.lookup(known)) == {"host": 1500})


def test_sets_that_the_server_evicted_come_back(server: RedisServer) -> None:
    known = keys(500, 7)
    with a_host(server, "host", ttl_s=1.5) as (store, told), a_reader(server) as reader:
        put(store, known)
        wait_for(lambda: is_settled(store, told, server))
        witness = server.witness()
        for bucket in (0, 3, 15):
            witness.unlink(NAMES.has("host", told.me.epoch, bucket))
        wait_for(lambda: told.stats().losses > 0)
        wait_for(lambda: is_settled(store, told, server))
        witness.unlink(NAMES.host("host"), NAMES.members)
        wait_for(lambda: counts(reader.lookup(known)) == {"host": 500})


def test_a_set_of_the_right_size_with_the_wrong_names_is_found_out(server: RedisServer, quick: None) -> None:
    """As after a fail-over to a copy that was behind."""
    with a_host(server, "host") as (store, told):
        put(store, keys(400, 8))
        wait_for(lambda: is_settled(store, told, server))
        witness = server.witness()
        for bucket in range(BUCKETS):
            key = NAMES.has("host", told.me.epoch, bucket)
            if name := witness.spop(key):
                witness.sadd(key, bytes(8 * [255 - bucket]))
                assert isinstance(name, bytes)
        assert not is_settled(store, told, server)
        wait_for(lambda: is_settled(store, told, server))


def test_a_lie_is_a_hint_like_any_other(server: RedisServer) -> None:
    """Somebody with access to the server can say that a host has a block. He can't make up a host."""
    known = keys(10, 9)
    with a_host(server, "host", ttl_s=1.5) as (store, told), a_reader(server) as reader:
        wait_for(lambda: told.stats().reconciled >= BUCKETS and ids(reader) == {"host"})
        witness = server.witness()
        name, bucket = NAMES.of(known[:1])[0], int(NAMES.buckets(known[:1])[0])
        witness.sadd(NAMES.has("host", told.me.epoch, bucket), name.tobytes())
        forged = PeerInfo(id="evil", address="evil.test:1", epoch="00")
        for record in (to_record(forged, Names(b"guessed")), b"", b"x" * 5000):
            witness.sadd(NAMES.members, "evil")
            witness.set(NAMES.host("evil"), record)
            bad = reader.stats().bad_records
            wait_for(lambda bad=bad: reader.stats().bad_records > bad + 1)
            assert ids(reader) == {"host"}
        witness.sadd(NAMES.members, b"\xff\xfe", "a" * 70, "no:id", "")
        witness.set(NAMES.host("host"), to_record(forged, NAMES))  # another's record under this host's name
        wait_for(lambda: ids(reader) == {"host"})
        put(store, known[1:2])
        wait_for(lambda: counts(reader.lookup(known)).get("host") in (1, 2))
        wait_for(lambda: is_settled(store, told, server), "the heartbeat finds a set too large")
        assert counts(wait_for(lambda: (h := reader.lookup(known)).known and h)) == {"host": 1}


def test_a_key_of_another_kind_in_the_way_is_removed_and_concerns_nobody_else(server: RedisServer) -> None:
    known = keys(40, 10)
    with (
        a_host(server, "host", ttl_s=30) as (store, told),
        a_host(server, "other") as (other, _),
        a_reader(server) as reader,
    ):
        put(store, known)
        put(other, known)
        wait_for(lambda: counts(reader.lookup(known)) == {"host": 40, "other": 40})
        witness = server.witness()
        bucket = int(NAMES.buckets(known[:1])[0])
        key = NAMES.has("host", told.me.epoch, bucket)
        witness.unlink(key)
        witness.set(key, "in the way")
        hits = counts(reader.lookup(known))
        assert hits["other"] == 40
        assert hits["host"] < 40
        put(store, known := np.concatenate((known, known_in(bucket))))
        wait_for(lambda: witness.type(key) == b"set")
        wait_for(lambda: is_settled(store, told, server))
        wait_for(lambda: counts(reader.lookup(known)).get("host") == len(known))


def known_in(bucket: int) -> U8:
    """Some keys of one bucket."""
    some = keys(500, 20)
    return some[NAMES.buckets(some) == bucket]


def test_a_server_that_takes_no_writes_is_said_once_and_tried_again(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    other = RedisServer()
    try:
        witness = server.witness()
        with a_host(server, "host", ttl_s=1.5) as (store, told):
            wait_for(lambda: told.stats().reconciled >= BUCKETS)
            witness.replicaof("127.0.0.1", other.port)  # a replica now: READONLY
            put(store, keys(10, 11))
            wait_for(lambda: told.stats().failures >= 3)
            assert caplog.text.count("can't be used") == 1
            assert "READONLY" in caplog.text
            witness.replicaof("no", "one")
            wait_for(lambda: is_settled(store, told, server))
    finally:
        other.close()


def test_stopping_a_publisher_does_not_wait_for_a_stopped_server(server: RedisServer) -> None:
    with a_host(server, "host") as (_, told):
        wait_for(lambda: told.stats().reconciled >= BUCKETS)
        with server.stopped():
            watch = Stopwatch()
            told.stop()
            assert watch.took_s() < 5 + BUSY_S


def test_a_pool_that_was_removed_is_left(server: RedisServer) -> None:
    import os

    with a_host(server, "host") as (store, told), a_reader(server) as reader:
        put(store, keys(10, 12))
        wait_for(lambda: ids(reader) == {"host"})
        os.unlink(pool_of(store).segment.path)
        wait_for(lambda: not told.is_alive, "the publisher ends with its pool")
        assert not server.witness().exists(NAMES.host("host"))


def test_whatever_happens_it_is_right_in_the_end(server: RedisServer, quick: None) -> None:
    """A small pool, so the ring laps too; connections cut, data flushed, the server killed: at random."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    names = np.random.default_rng(seed)
    with a_host(server, "host", size="2mib", ttl_s=1.5) as (store, told), a_reader(server) as reader:
        until = time.monotonic() + 4
        recent = [keys(1, 0)]
        while time.monotonic() < until:
            batch = names.integers(0, 256, (rng.randrange(1, 120), 32), np.uint8)
            store.put(batch, np.zeros((len(batch), 4096), np.uint8))
            recent = [*recent[-5:], batch]
            if rng.random() < 0.5:
                store.remove(rng.choice(recent)[: rng.randrange(1, 60)])
            reader.lookup(rng.choice(recent), 0.2)
            what = rng.random()
            if what < 0.01:
                server.restart_empty()
            elif what < 0.03:
                server.witness().flushall()
            elif what < 0.08:
                server.witness().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            elif what < 0.1:
                with server.stopped():
                    time.sleep(rng.random() / 2)
            time.sleep(rng.random() / 50)
        settle(store, told, server)
        there = store.exists(recent[-1])
        hits = wait_for(lambda: len((h := reader.lookup(recent[-1], 5.0)).peers) == 1 and h)
        assert (hits.have[0] == there).all()


def settle(store: KvStore, told: Publisher, server: RedisServer) -> None:
    wait_for(lambda: told.stats().is_connected and is_settled(store, told, server), str(told.stats()))


def test_a_publisher_says_nothing_of_passwords(caplog: pytest.LogCaptureFixture) -> None:
    class Nothing:
        retired = False

    made = Publisher(
        Nothing(),  # type: ignore[arg-type]
        Endpoint.parse("redis://me:hunter2@127.0.0.1:1"),
        NAMES,
        host_id="h",
        address="a:1",
        ttl_s=1,
    )
    made.start()
    wait_for(lambda: made.stats().failures > 0)
    made.stop()
    assert "127.0.0.1:1" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_user_with_the_rights_that_the_faq_names_is_enough(server: RedisServer) -> None:
    faq = (Path(__file__).resolve().parents[2] / "docs" / "faq.md").read_text()
    named = re.search(r"the user needs ([A-Z,\s]+)\s+and\s+([A-Z]+)\s+on\s+`kvplug:\*`,\s+and\s+PING,\s+SELECT", faq)
    assert named is not None
    commands = [*re.findall(r"[A-Z]+", named[1]), named[2], "PING", "SELECT"]
    server.witness().acl_setuser(
        "limited",
        enabled=True,
        passwords=["+pw"],
        keys=["kvplug:*"],
        commands=[f"+{name.lower()}" for name in commands],
    )
    endpoint = Endpoint.parse(f"redis://limited:pw@127.0.0.1:{server.port}/0")
    known = keys(30, 13)
    with a_pool() as store:
        told = Publisher(store.feed(), endpoint, NAMES, host_id="host", address="h:1", ttl_s=1.5)
        reader = Directory(endpoint, NAMES, ttl_s=0.9, timeout_s=5.0)
        try:
            told.start()
            put(store, known)
            wait_for(lambda: counts(reader.lookup(known)) == {"host": 30})
            store.remove(known[:10])
            wait_for(lambda: is_settled(store, told, server))
        finally:
            told.stop()
            reader.close()
        assert (told.stats().failures, reader.stats().failures) == (0, 0)
        assert not server.witness().exists(NAMES.host("host"))
