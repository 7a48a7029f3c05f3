"""The directory on a real Redis and a real Valkey: what a pool has is said, and what it has no longer is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvplug.errors import Code, KeyFormatError
from kvplug.rdma.directory import directory as reading
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.publisher import Publisher
from kvplug.rdma.directory.resp import Endpoint
from tests.inside import pool_of
from tests.rdma.directory_parts import (
    SECRET,
    TTL_S,
    a_host,
    a_pool,
    a_reader,
    counts,
    ids,
    is_settled,
    keys,
    new_pool_name,
    open_pool,
    publisher,
    put,
    remove_pool,
    wait_for,
)
from tests.rdma.redis_server import RedisServer, binaries

SHORT_TTL_S = 1.5


@pytest.fixture(scope="module", params=binaries() or [None], ids=lambda path: os.path.basename(path or "none"))
def any_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    made = RedisServer(request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    made = RedisServer()
    yield made
    made.close()


def test_what_two_hosts_have_is_found_in_one_look_up(any_server: RedisServer) -> None:
    wanted = keys(700, 1)
    with (
        a_host(any_server, "one") as (one, told),
        a_host(any_server, "two") as (two, _),
        a_reader(any_server) as reader,
    ):
        put(one, wanted[:300])
        put(two, wanted[100:150])
        wait_for(lambda: ids(reader) == {"one", "two"})
        hits = wait_for(lambda: counts(h := reader.lookup(wanted)) == {"one": 300, "two": 50} and h)
        assert hits.known
        rows = dict(zip((p.id for p in hits.peers), hits.have, strict=True))
        assert np.flatnonzero(rows["one"]).tolist() == list(range(300))
        assert np.flatnonzero(rows["two"]).tolist() == list(range(100, 150))
        assert dict(zip((p.id for p in hits.peers), hits.leading().tolist(), strict=True)) == {"one": 300, "two": 0}
        assert {p.address for p in hits.peers} == {"one.test:9410", "two.test:9410"}
        assert (one.remove(wanted[:5]) == Code.OK).all()
        wait_for(lambda: counts(reader.lookup(wanted)).get("one") == 295, "what was removed is withdrawn")
        wait_for(lambda: is_settled(one, told, any_server))


def test_what_was_there_before_is_announced_too(server: RedisServer) -> None:
    wanted = keys(400, 2)
    with a_pool() as store, a_reader(server) as reader:
        put(store, wanted)
        told = publisher(server, store, "late")
        wait_for(lambda: counts(reader.lookup(wanted)) == {"late": 400})
        assert told.stats().reconciled == BUCKETS
        told.stop()
        wait_for(lambda: not ids(reader), "who leaves is gone at once")
        assert not [key for key in server.witness().keys() if b":has:late:" in key]  # noqa: SIM118


def test_a_host_finds_the_others_and_not_itself(server: RedisServer) -> None:
    wanted = keys(10, 3)
    with (
        a_host(server, "me") as (mine, _),
        a_host(server, "you") as (yours, _),
        a_reader(server, own_id="me") as reader,
    ):
        put(mine, wanted)
        put(yours, wanted)
        wait_for(lambda: counts(reader.lookup(wanted)) == {"you": 10})
        assert ids(reader) == {"you"}


def test_evicted_blocks_are_withdrawn(server: RedisServer) -> None:
    """Several times the pool's capacity goes through it."""
    with a_host(server, "small", size="2mib") as (store, told):
        for at in range(20):
            put(store, keys(100, 100 + at))
        assert store.stats().evicted_blocks > 100
        wait_for(lambda: is_settled(store, told, server))
        assert told.stats().entries == store.stats().sealed_blocks


def test_of_a_block_that_comes_and_goes_between_two_looks_the_last_counts(server: RedisServer) -> None:
    """By the events alone: nothing is reconciled meanwhile."""
    with a_host(server, "hasty") as (store, told):
        here, not_here = keys(20, 18), keys(20, 19)
        put(store, here)
        wait_for(lambda: told.stats().unsettled_buckets == 0 and is_settled(store, told, server))
        for _ in range(4):
            store.remove(here)
            put(store, not_here)
            put(store, here)
            store.remove(not_here)
        wait_for(lambda: is_settled(store, told, server))
        assert told.stats().entries == 20
        assert (told.stats().reconciled, told.stats().laps) == (BUCKETS, 0)


def test_a_publisher_that_was_lapped_is_right_again(server: RedisServer) -> None:
    with a_host(server, "lapped", size="2mib") as (store, told):
        wait_for(lambda: told.stats().reconciled >= BUCKETS)
        ring = pool_of(store).geometry.event_cap
        some, others = keys(64, 4), keys(64, 5)
        put(store, others)
        while told.stats().laps == 0:
            for _ in range(ring // len(some) + 1):
                put(store, some)
                store.remove(some)
        store.remove(others[:32])
        wait_for(lambda: is_settled(store, told, server))


def test_a_rebuilt_pool_is_announced_as_it_is_now(server: RedisServer) -> None:
    with a_host(server, "rebuilt") as (store, told):
        put(store, keys(200, 6))
        wait_for(lambda: is_settled(store, told, server))
        died = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DIE_IN_A_SECTION), store.pool_name],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert died.returncode == -signal.SIGKILL, died.stderr
        put(store, keys(50, 7))
        assert store.stats().rebuilds == 1
        wait_for(lambda: told.stats().laps > 0)
        wait_for(lambda: is_settled(store, told, server))


DIE_IN_A_SECTION = """
    import sys
    from kvplug.config import Config
    from kvplug.shm import failpoints
    from kvplug.store import KvStore
    from tests.inside import pool_of
    store = KvStore(config=Config(pool=sys.argv[1], size="16mib", min_block=4096, lock_timeout_s=5))
    failpoints.arm(pool_of(store).L, "sealed_word")
    store.put([bytes(32)], [bytes(100)])
"""


PUBLISH_AND_WAIT = """
    import sys, time
    from kvplug.rdma.directory.publisher import Publisher
    from tests.rdma.directory_parts import *
    store = open_pool(sys.argv[2])
    made = Publisher(store.feed(), Endpoint.parse(sys.argv[1]), Names(SECRET), host_id="mortal",
                     address="mortal.test:1", ttl_s=float(sys.argv[3]))
    made.start()
    wait_for(lambda: made.stats().reconciled >= 16)
    print(made.me.epoch, flush=True)
    time.sleep(60)
"""


def start_mortal(server: RedisServer, pool: str, ttl_s: float) -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PUBLISH_AND_WAIT), server.url, pool, str(ttl_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait(60)
    if child.stdout:
        child.stdout.close()


def test_a_host_that_was_killed_is_gone_when_its_time_is_up_and_its_old_entries_never_count(
    server: RedisServer,
) -> None:
    """SIGKILL; a reader that still knows the old epoch; then a new start that has less than the one before."""
    pool, wanted = new_pool_name(), keys(100, 8)
    store = open_pool(pool)
    names = Names(SECRET)
    try:
        put(store, wanted)
        with a_reader(server) as reader, a_reader(server, ttl_s=900) as drowsy:
            child, epoch = start_mortal(server, pool, SHORT_TTL_S)
            try:
                drowsy._wake.set()  # reads the members once, and then not for minutes
                wait_for(lambda: counts(drowsy.lookup(wanted)) == {"mortal": 100})
                wait_for(lambda: counts(reader.lookup(wanted)) == {"mortal": 100})
            finally:
                end(child)
            wait_for(lambda: not ids(reader), "a dead host is gone when its time to live is up", SHORT_TTL_S + 15)
            assert ids(drowsy) == {"mortal"}
            assert server.witness().exists(names.has("mortal", epoch, 0)), "its sets are still there"
            hits = drowsy.lookup(wanted)
            assert hits.known
            assert counts(hits) == {}, "a host without a record counts for nothing"
            assert drowsy.stats().stale_epochs == 1

            store.remove(wanted[10:])
            again = publisher(server, store, "mortal")
            try:
                assert again.me.epoch != epoch
                wait_for(lambda: counts(reader.lookup(wanted)) == {"mortal": 10})
            finally:
                again.stop()
    finally:
        store.close()
        remove_pool(pool)


def test_a_restart_removes_what_the_start_before_left_and_readers_follow_at_once(server: RedisServer) -> None:
    pool, wanted = new_pool_name(), keys(100, 9)
    store = open_pool(pool)
    names = Names(SECRET)
    try:
        put(store, wanted)
        with a_reader(server, ttl_s=900) as drowsy:
            child, epoch = start_mortal(server, pool, TTL_S)
            try:
                drowsy._wake.set()
                wait_for(lambda: counts(drowsy.lookup(wanted)) == {"mortal": 100})
            finally:
                end(child)
            store.remove(wanted[10:])
            again = publisher(server, store, "mortal")
            try:
                wait_for(lambda: again.stats().reconciled >= BUCKETS)
                # It still asks for the old epoch, is told of the new one, and asks for that.
                assert counts(drowsy.lookup(wanted)) == {"mortal": 10}
                assert drowsy.stats().stale_epochs == 1
                left = [names.has("mortal", epoch, bucket) for bucket in range(BUCKETS)]
                assert server.witness().exists(*left) == 0
            finally:
                again.stop()
    finally:
        store.close()
        remove_pool(pool)


def test_a_host_that_is_stopped_goes_and_comes_back(server: RedisServer) -> None:
    pool, wanted = new_pool_name(), keys(20, 10)
    store = open_pool(pool)
    try:
        put(store, wanted)
        with a_reader(server) as reader:
            child, _ = start_mortal(server, pool, SHORT_TTL_S)
            try:
                wait_for(lambda: counts(reader.lookup(wanted)) == {"mortal": 20})
                child.send_signal(signal.SIGSTOP)
                wait_for(lambda: not ids(reader), "a stopped host does not renew its record")
                store.remove(wanted[:5])
                child.send_signal(signal.SIGCONT)
                wait_for(lambda: counts(reader.lookup(wanted)) == {"mortal": 15})
            finally:
                end(child)
    finally:
        store.close()
        remove_pool(pool)


def test_many_hosts_are_asked_for_a_few_keys_first_and_the_best_in_full(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PEERS_IN_FULL", 2)
    wanted = keys(64, 11)
    with a_pool() as whole, a_pool() as head, a_pool() as tail, a_pool() as empty, a_reader(server) as reader:
        put(whole, wanted)
        put(head, wanted[:40])
        put(tail, wanted[20:])
        stores = {"empty": empty, "tail": tail, "head": head, "whole": whole}
        told = [publisher(server, store, name) for name, store in stores.items()]
        try:
            wait_for(lambda: all(p.stats().reconciled >= BUCKETS for p in told))
            wait_for(lambda: len(ids(reader)) == 4)
            assert counts(reader.lookup(wanted)) == {"whole": 64, "head": 40}
        finally:
            for p in told:
                p.stop()


def test_look_ups_from_many_threads_do_not_mix(server: RedisServer) -> None:
    with a_host(server, "shared") as (store, _), a_reader(server) as reader:
        known = keys(200, 12)
        put(store, known)
        wait_for(lambda: counts(reader.lookup(known)) == {"shared": 200})
        wrong: list[object] = []

        def look(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                mine = keys(50, int(rng.integers(1 << 30)))
                at = rng.choice(50, 20, replace=False)
                mine[at] = known[rng.choice(200, 20, replace=False)]
                hits = reader.lookup(mine)
                if not hits.known or set(np.flatnonzero(hits.have[0]).tolist()) != set(at.tolist()):
                    wrong.append(hits)

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong, wrong[0]


def test_a_forked_child_looks_up_by_itself(server: RedisServer) -> None:
    with a_host(server, "parent") as (store, _), a_reader(server) as reader:
        known = keys(50, 13)
        put(store, known)
        wait_for(lambda: counts(reader.lookup(known)) == {"parent": 50})
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(60)
                reader.lookup(known)  # begins anew; no connection yet
                assert reader.wait_ready(30)
                wait_for(lambda: counts(reader.lookup(known)) == {"parent": 50})
                code = 0
            finally:
                os._exit(code)
        for _ in range(20):
            assert counts(reader.lookup(known)) == {"parent": 50}
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert counts(reader.lookup(known)) == {"parent": 50}
        assert reader.stats().failures == 0


def test_hosts_with_another_secret_see_nothing_of_each_other(server: RedisServer) -> None:
    wanted = keys(30, 14)
    with a_host(server, "ours") as (store, told), a_pool() as other:
        put(store, wanted)
        put(other, wanted)
        endpoint = Endpoint.parse(server.url)
        theirs = Publisher(other.feed(), endpoint, Names(b"another secret"), host_id="ours", address="x:1", ttl_s=TTL_S)
        theirs.start()
        reader = reading.Directory(endpoint, Names(b"another secret"), ttl_s=TTL_S, timeout_s=5.0)
        try:
            wait_for(lambda: counts(reader.lookup(wanted)) == {"ours": 30})
            assert reader.peers()[0].address == "x:1"
            wait_for(lambda: is_settled(store, told, server))
        finally:
            theirs.stop()
            reader.close()


def test_nothing_that_lies_in_the_server_tells_a_key(server: RedisServer) -> None:
    secret_keys = keys(100, 15)
    with a_host(server, "discreet") as (store, told):
        put(store, secret_keys)
        wait_for(lambda: is_settled(store, told, server))
        witness = server.witness()
        all_bytes = b""
        for key in witness.scan_iter("*"):
            kind = witness.type(key)
            all_bytes += key + (b"".join(witness.smembers(key)) if kind == b"set" else witness.get(key))  # type: ignore[operator, arg-type]
        assert len(all_bytes) > 800
        for key in secret_keys:
            assert key[:8].tobytes() not in all_bytes
        assert SECRET not in all_bytes


def test_everything_in_the_server_has_a_time_to_live(server: RedisServer) -> None:
    """Hosts that are gone for good leave nothing behind for ever."""
    with a_host(server, "mortal-2") as (store, told):
        put(store, keys(300, 16))
        wait_for(lambda: is_settled(store, told, server))
        put(store, keys(300, 17))
        wait_for(lambda: is_settled(store, told, server))
        witness = server.witness()
        assert {witness.ttl(key) > 0 for key in witness.scan_iter("*")} == {True}


def test_wrong_keys_are_an_error_and_no_keys_are_not(server: RedisServer) -> None:
    with a_host(server, "exact") as (_, told), a_reader(server) as reader:
        wait_for(lambda: told.stats().reconciled >= BUCKETS and ids(reader))
        with pytest.raises(KeyFormatError):
            reader.lookup([b"short"])
        none = wait_for(lambda: (h := reader.lookup(np.empty((0, 32), np.uint8))).known and h)
        assert none.have.shape == (1, 0)
        assert none.leading().tolist() == [0]
        more = reader.lookup(np.zeros((reading.MAX_KEYS + 5, 32), np.uint8))
        assert more.have.shape == (1, reading.MAX_KEYS + 5)
