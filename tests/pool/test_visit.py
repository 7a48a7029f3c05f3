"""Looking at a pool takes no place in it: stat, doctor and rm work while all places are taken, and say so."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pytest

from kvplug import doctor, threads
from kvplug.cli.app import run
from kvplug.errors import ClientLimitError, PoolFormatError, PoolNotFoundError
from kvplug.shm import layout as lay
from kvplug.shm import segment
from kvplug.shm.reap import find_dead
from kvplug.shm.visit import visit
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.pool.children import quiet
from tests.pool.conftest import leave_nothing

SIZE: Final = "16mib"
WAIT_S: Final = 60.0
NAME: Final = f"t-visit-{os.getpid()}"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[KvStore]:
    monkeypatch.setenv("KVPLUG_POOL", NAME)
    monkeypatch.setenv("KVPLUG_LOCK_TIMEOUT_S", "10")
    for counts in ("_errors", "_dead"):  # what other tests of this process have made go wrong is not this pool's
        monkeypatch.setattr(threads, counts, Counter())
    with KvStore(NAME, SIZE) as made:
        made.put([bytes(32)], [np.ones(5000, np.uint8)])
        yield made
    leave_nothing(NAME)


@pytest.fixture
def full(store: KvStore) -> Iterator[KvStore]:
    """All places are taken, as 127 other processes would take them: a row and its lock each."""
    table, offset = pool_of(store).T, int(pool_of(store).T[lay.P_LIVE_OFFSET])
    from kvplug.shm.liveness import byte_lock_path_fd, close_private, try_lock_byte

    fds = []
    for client in range(lay.MAX_CLIENTS):
        at = pool_of(store).geometry.o_client + client * lay.CLIENT_WORDS
        if client != pool_of(store).client:
            fds.append(byte_lock_path_fd(pool_of(store).segment.path))
            assert try_lock_byte(fds[-1], offset + client)
            table[at + lay.C_PID], table[at + lay.C_SESSION] = os.getpid(), 1000 + client
            table[at + lay.C_STATE] = lay.CLIENT_LIVE
    with pytest.raises(ClientLimitError):
        KvStore(NAME, create=False)
    yield store
    for client in range(lay.MAX_CLIENTS):
        if client != pool_of(store).client:
            table[pool_of(store).geometry.o_client + client * lay.CLIENT_WORDS + lay.C_STATE] = lay.CLIENT_FREE
    for fd in fds:
        close_private(fd)


class Ran(NamedTuple):
    """What a command has left."""

    status: object
    stdout: str
    stderr: str


def command(*arguments: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run(arguments)
    return Ran(end.value.code, out.getvalue(), err.getvalue())


def findings() -> list[doctor.Finding]:
    return [found for found in doctor.examine() if found.name == "pools" and NAME in found.found]


def test_stat_works_while_all_places_are_taken(full: KvStore) -> None:
    ran = command("stat", "--json")
    assert ran.status == 0, ran.stderr
    figures = json.loads(ran.stdout)
    assert figures["clients"] == lay.MAX_CLIENTS
    assert figures["sealed_blocks"] == 1
    assert command("stat").status == 0


def test_doctor_says_that_all_places_are_taken(full: KvStore) -> None:
    (found,) = findings()
    assert found.status is doctor.Status.FAULT
    assert "no room for another one (128 at most)" in found.found
    assert "KVPLUG_POOL" in found.fix


def test_rm_says_who_is_attached_and_force_removes(full: KvStore) -> None:
    ran = command("rm")
    assert ran.status == 1
    assert "128 processes attached" in ran.stderr
    assert command("rm", "--force").status == 0
    assert not Path(segment.segment_path(NAME)).exists()


def test_who_looks_is_not_counted_and_changes_nothing(store: KvStore) -> None:
    before = pool_of(store).T[: lay.HEADER_WORDS].copy(), os.stat(pool_of(store).segment.path).st_mtime_ns
    with visit(NAME) as seen:
        assert (seen.stats().clients, seen.stats().sessions) == (1, 1)
        assert not seen.is_full
        assert seen.stats().sealed_bytes == 5000
        store.put([b"\x01" * 32], [np.ones(5000, np.uint8)])
        assert seen.stats().sealed_blocks == 2, "what is seen is the pool as it is, not a copy of it"
        seen.T[lay.H_RETIRED] = 1
    assert not int(pool_of(store).T[lay.H_RETIRED]), "and nothing of what is written there gets into it"
    assert (pool_of(store).T[lay.P_MAGIC], len(before)) == (before[0][lay.P_MAGIC], 2)
    (found,) = findings()
    assert found.status is doctor.Status.OK


def test_the_dead_are_not_counted(store: KvStore) -> None:
    at = pool_of(store).geometry.o_client + (lay.MAX_CLIENTS - 1) * lay.CLIENT_WORDS
    quiet(store)  # its own thread does not reap meanwhile
    pool_of(store).T[at + lay.C_STATE] = lay.CLIENT_LIVE
    with visit(NAME) as seen:
        assert seen.stats().clients == 1
    pool_of(store).T[at + lay.C_STATE] = lay.CLIENT_FREE


def test_errors_in_threads_are_shown(store: KvStore) -> None:
    at = pool_of(store).geometry.o_client + pool_of(store).client * lay.CLIENT_WORDS
    quiet(store)  # its own thread does not count anew meanwhile
    pool_of(store).T[at + lay.C_THREAD_ERRORS] = 3
    figures = json.loads(command("stat", "--json").stdout)
    assert (figures["thread_errors"], figures["dead_threads"]) == (3, 0)
    assert "an error in thread" in command("stat").stderr
    (found,) = findings()
    assert found.status is doctor.Status.WARNING
    assert "3 errors of its own" in found.found


@pytest.mark.parametrize("counts", [(3, 0), (0, 3)])
def test_no_process_hides_the_errors_of_another_with_its_pid(store: KvStore, counts: tuple[int, int]) -> None:
    """In containers most engines are process 1."""
    with KvStore(NAME, create=False) as other:
        for one, n in zip((pool_of(store), pool_of(other)), counts, strict=True):
            one._maintenance.stop(WAIT_S)
            one.T[one.geometry.o_client + one.client * lay.CLIENT_WORDS + lay.C_THREAD_ERRORS] = n
        assert store.stats().thread_errors == 3


def test_no_client_is_looked_for_behind_the_table_of_clients(store: KvStore) -> None:
    """Whatever becomes of the header under a client."""
    store.put([bytes([i]) * 32 for i in range(1, 64)], [np.ones(5000, np.uint8)] * 63)
    pool = pool_of(store)
    pool._maintenance.stop(WAIT_S)
    dead, started = np.empty((2, lay.MAX_CLIENTS), np.int64)
    pool.T[lay.H_MAX_CLIENTS] = 8 * lay.MAX_CLIENTS
    try:
        assert find_dead(pool.T, pool.L, pool.geometry.o_client * 8, pool.client, dead, started) == 0
    finally:
        pool.T[lay.H_MAX_CLIENTS] = lay.MAX_CLIENTS


def test_a_maintenance_that_could_not_be_started_is_shown(store: KvStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "kvplug-maintenance":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        without = KvStore(NAME, create=False)
    try:
        with visit(NAME) as seen:
            at = seen.geometry.o_client + pool_of(without).client * lay.CLIENT_WORDS
            assert int(seen.T[at + lay.C_DEAD_THREADS]) == 1
            assert seen.stats().dead_threads == 1
        (found,) = findings()
        assert "1 could not be started" in found.found
    finally:
        without.close()
        threads._dead.pop("kvplug-maintenance")


def test_a_pool_that_evicts_in_an_unknown_way_is_no_pool_of_this_version(store: KvStore) -> None:
    before = int(pool_of(store).T[lay.H_POLICY])
    pool_of(store).T[lay.H_POLICY] = 77
    try:
        with pytest.raises(PoolFormatError, match="eviction policy number 77"), visit(NAME):
            pass
        with pytest.raises(PoolFormatError, match="eviction policy number 77"):
            KvStore(NAME, create=False)
        (found,) = findings()
        assert found.status is doctor.Status.FAULT
        assert "eviction policy number 77" in found.found
    finally:
        pool_of(store).T[lay.H_POLICY] = before


def test_what_is_not_there_or_no_pool_is_refused(store: KvStore) -> None:
    with pytest.raises(PoolNotFoundError), visit(NAME + "-none"):
        pass
    assert not Path(segment.lock_path(NAME + "-none")).exists()
    with open(pool_of(store).segment.path, "r+b") as file:
        file.write(b"X")
    try:
        with pytest.raises(PoolFormatError), visit(NAME):
            pass
    finally:
        with open(pool_of(store).segment.path, "r+b") as file:
            file.write(lay.MAGIC)
