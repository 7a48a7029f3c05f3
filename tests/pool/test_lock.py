"""The pool lock: nobody waits past the deadline for a holder that was stopped, and nobody takes it from it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.errors import Code, LockTimeoutError
from kvplug.shm import layout as lay
from kvplug.shm.local import L_DOWN, L_TIMEOUTS
from tests.inside import pool_of
from tests.pool.children import (
    GRACE_S,
    Child,
    another,
    blocks,
    check_bytes,
    check_nothing_left,
    die_at,
    keys,
    put,
    quiet,
    settle,
)
from tests.stopwatch import LONG_S, Stopwatch

SIZE = 16 << 10
TIMEOUT_S = 0.1
MARGIN_S = 0.4
"""For a busy machine; a wait for the holder itself would be endless."""
OLD, NEW, THEIRS = keys(64, 1), keys(8, 2), keys(8, 3)


def checksums(of: np.ndarray) -> np.ndarray:
    from kvplug.shm import copy

    data = blocks(of, SIZE)
    out = np.empty(len(of), np.int64)
    copy.hash_batch(np.array([row.ctypes.data for row in data], np.int64), np.full(len(of), SIZE, np.int64), out)
    return out


@pytest.fixture
def store(make_store: Callable[..., KvStore]) -> KvStore:
    store = quiet(make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S, lock_timeout_s=TIMEOUT_S, prefault=False))
    assert (put(store, OLD, SIZE) == 0).all()
    return store


@pytest.fixture(params=["locked", "reserve_word", "unlocking"])
def point(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stopped(store: KvStore, point: str) -> Iterator[Child]:
    """A process that was stopped inside a section of its put, and goes on when it is told to."""
    child = die_at(store, point, lambda own: (put(own, THEIRS, SIZE), own.close()), sig=signal.SIGSTOP)
    with child:
        yield child


def timed(call: Callable[[], object]) -> tuple[object, float]:
    watch = Stopwatch()
    answer = call()
    return answer, watch.took_s()


def test_others_answer_in_time_and_fail_fast_until_it_goes_on(store: KvStore, stopped: Child) -> None:
    assert int(pool_of(store).T[lay.H_HOLDER]) == stopped.pid
    watch = Stopwatch()
    codes = put(store, NEW, SIZE)
    assert set(codes.tolist()) == {Code.TIMEOUT}
    assert watch.wall_s() >= TIMEOUT_S * 0.9
    assert watch.took_s() <= TIMEOUT_S + MARGIN_S
    assert pool_of(store).L[L_DOWN] == 1

    watch = Stopwatch()
    for _ in range(50):
        assert set(store.pin(OLD[:4]).codes.tolist()) == {Code.TIMEOUT}
        assert set(store.remove(OLD[:4]).tolist()) == {Code.TIMEOUT}
        assert set(store.reserve(NEW, SIZE).codes.tolist()) == {Code.TIMEOUT}
    assert watch.took_s() < 50 * 3 * TIMEOUT_S / 5, "calls after the first time-out wait again"
    assert int(pool_of(store).L[L_TIMEOUTS]) >= 151
    with pytest.raises(LockTimeoutError):
        store.check_integrity()

    stopped.signal(signal.SIGCONT)
    assert stopped.wait() == 0, "the holder goes on as if nothing had been"
    assert (put(store, NEW, SIZE) == 0).all(), "the first call that finds the lock free goes through"
    assert pool_of(store).L[L_DOWN] == 0
    for of in (OLD, NEW, THEIRS):
        check_bytes(store, of, SIZE)
    assert store.stats().rebuilds == 0, "a section that was only late left nothing half-done"
    settle(store)
    check_nothing_left(store)


def test_reads_go_on_while_it_is_stopped(store: KvStore, stopped: Child) -> None:
    fastest = 1.0
    for _ in range(5):
        hits, took = timed(lambda: check_bytes(store, OLD, SIZE))
        assert hits == len(OLD)
        fastest = min(fastest, took)
    assert fastest < TIMEOUT_S / 2, "reads wait for the lock"
    assert pool_of(store).L[L_TIMEOUTS] == pool_of(store).L[L_DOWN] == 0, "reads try to take the lock"
    assert store.exists(OLD).all()
    assert store.match_prefix(OLD) == len(OLD)
    assert not store.exists(THEIRS).any()
    stopped.signal(signal.SIGCONT)
    assert stopped.wait() == 0
    check_bytes(store, THEIRS, SIZE)


@pytest.mark.parametrize("point", ["locked"], indirect=True)
def test_a_fresh_process_is_refused_in_time(store: KvStore, stopped: Child) -> None:
    watch = Stopwatch()
    with pytest.raises(LockTimeoutError, match=str(stopped.pid)):
        another(store)
    assert watch.took_s() < TIMEOUT_S + 1
    stopped.signal(signal.SIGCONT)
    assert stopped.wait() == 0
    another(store).close()


def test_what_must_happen_is_queued_and_done_when_it_goes_on(store: KvStore, point: str) -> None:
    """Releasing pins, sealing, aborting and acknowledging never get lost."""
    pinned = store.pin_batch(OLD[:8])
    to_seal = store.reserve_batch(NEW[:2], [SIZE])
    to_abort = store.reserve_batch(NEW[2:4], [SIZE])
    to_acknowledge = store.reserve_batch(NEW[4:6], [SIZE])
    store.abort_batch(to_acknowledge.slots, to_acknowledge.gens, writers_done=False)
    for i, data in enumerate(blocks(NEW[:2], SIZE)):
        at = int(to_seal.offsets[i])
        store.mapping[at : at + SIZE] = data
    assert (pinned.codes == 0).all()
    assert (to_seal.codes == 0).all()

    with die_at(store, point, lambda own: (put(own, THEIRS, SIZE), own.close()), sig=signal.SIGSTOP) as holder:
        _, took = timed(lambda: store.unpin(pinned.slots, pinned.gens))
        assert took <= TIMEOUT_S + MARGIN_S
        watch = Stopwatch()
        assert set(store.complete(to_seal.slots, to_seal.gens, 0, checksums(NEW[:2])).tolist()) == {Code.TIMEOUT}
        assert set(store.abort_batch(to_abort.slots, to_abort.gens, writers_done=True).tolist()) == {Code.TIMEOUT}
        assert set(store.acknowledge(to_acknowledge.slots, to_acknowledge.gens).tolist()) == {Code.TIMEOUT}
        assert watch.took_s() < 1.0
        s = store.stats()
        assert s.pinned_slots == 8
        assert s.writing_slots >= 4
        assert s.quarantined_slots == 2
        assert not store.exists(NEW).any()
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0

    pool_of(store).maintain()
    assert store.exists(NEW[:2]).all(), "the queued seal was done"
    check_bytes(store, NEW[:2], SIZE)
    assert not store.exists(NEW[2:]).any()
    settle(store)
    check_nothing_left(store)


def test_the_maintenance_thread_does_what_was_queued(make_store: Callable[..., KvStore]) -> None:
    """Also in a process that calls nothing any more."""
    store = make_store("8mib", slab="1mib", lock_timeout_s=TIMEOUT_S)
    put(store, OLD, SIZE)
    pinned = store.pin_batch(OLD)
    with die_at(store, "locked", lambda own: (put(own, THEIRS, SIZE), own.close()), sig=signal.SIGSTOP) as holder:
        store.unpin(pinned.slots, pinned.gens)
        assert store.stats().pinned_slots == len(OLD)
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0
    deadline = time.monotonic() + LONG_S
    while store.stats().pinned_slots and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.stats().pinned_slots == 0


def test_a_stopped_holder_that_is_killed_frees_the_lock(store: KvStore, stopped: Child, point: str) -> None:
    assert set(put(store, NEW, SIZE).tolist()) == {Code.TIMEOUT}
    stopped.kill()
    assert (put(store, NEW, SIZE) == 0).all()
    assert store.stats().rebuilds == int(point == "reserve_word")
    settle(store)
    check_bytes(store, OLD, SIZE)
    check_bytes(store, NEW, SIZE)
    check_nothing_left(store)


def test_close_does_not_wait_for_a_stopped_holder(store: KvStore) -> None:
    leaving = quiet(another(store))
    assert (leaving.pin_batch(OLD[:4]).codes == 0).all()
    with die_at(store, "locked", lambda own: (put(own, NEW, SIZE), own.close()), sig=signal.SIGSTOP) as holder:
        _, took = timed(leaving.close)
        assert took < 1.0
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0
    settle(store)
    check_nothing_left(store)


def test_threads_of_one_store_take_turns(store: KvStore) -> None:
    """flock knows no threads: two of one store must not be inside at once."""
    wrong: list[str] = []

    def work(seed: int) -> None:
        mine = keys(40, 100 + seed)
        for _ in range(10):
            codes = put(store, mine, SIZE)
            if not set(codes.tolist()) <= {0, 1, Code.TIMEOUT}:
                wrong.append(str(codes.tolist()))
            with store.pin(mine):
                pass
            store.remove(mine[:10])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    assert not wrong, wrong[0]
    assert store.stats().rebuilds == 0
    check_nothing_left(store)


def test_two_processes_take_turns(store: KvStore) -> None:
    def body() -> None:
        own = another(store)
        for i in range(30):
            put(own, keys(20, 500 + i), SIZE)
            own.remove(keys(10, 500 + i))
        os._exit(0)

    with Child(body) as one, Child(body) as two:
        for i in range(30):
            put(store, keys(20, 900 + i), SIZE)
        assert one.wait() == two.wait() == 0
    assert store.stats().rebuilds == 0
    settle(store)
    check_nothing_left(store)
