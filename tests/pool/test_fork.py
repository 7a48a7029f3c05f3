"""Forked children: what a child inherits belongs to its parent, and what it does is its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.errors import Code
from kvplug.shm import segment
from kvplug.shm.layout import P_LIVE_OFFSET
from kvplug.shm.liveness import is_locked
from tests.inside import pool_of
from tests.pool.children import (
    GRACE_S,
    Child,
    Peer,
    another,
    blocks,
    check_bytes,
    check_nothing_left,
    clients_of,
    keys,
    put,
    quiet,
    settle,
)
from tests.stopwatch import LONG_S, Stopwatch

SIZE = 16 << 10
OLD, NEW = keys(32, 1), keys(8, 2)


@pytest.fixture
def store(make_store: Callable[..., KvStore]) -> KvStore:
    store = quiet(make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S, prefault=False))
    assert (put(store, OLD, SIZE) == 0).all()
    return store


class Orphan:
    """A process that dies and leaves a forked child behind, which lives until :meth:`end`."""

    def __init__(self, body: Callable[[], None]) -> None:
        up_read, up_write = os.pipe()
        hold_read, self._hold = os.pipe()

        def parent() -> None:
            body()
            if os.fork() == 0:
                os.close(self._hold)
                os.write(up_write, os.getpid().to_bytes(8, "little"))
                os.read(hold_read, 1)  # until the test closes its end, or ends
                os._exit(0)
            signal.pause()

        self.parent = Child(parent)
        self.pid = int.from_bytes(os.read(up_read, 8), "little")
        for fd in (up_read, up_write, hold_read):
            os.close(fd)
        self.parent.kill()

    def lives(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        os.close(self._hold)


def test_a_child_that_outlives_its_parent_keeps_neither_its_liveness_nor_its_pins(store: KvStore) -> None:
    kept: list[object] = []

    def body() -> None:
        own = quiet(another(store))
        kept.extend((own, own.pin_batch(OLD), own.reserve_batch(NEW, [SIZE])))  # the child inherits it, alive

    orphan = Orphan(body)
    try:
        assert orphan.lives()
        assert store.stats().pinned_slots == len(OLD)
        settle(store)
        assert orphan.lives()
        check_nothing_left(store)
    finally:
        orphan.end()


def test_a_child_that_outlives_its_parent_does_not_keep_its_lock(store: KvStore) -> None:
    """The parent dies inside a section while another thread of it has forked: the lock is free."""
    from kvplug.shm.failpoints import arm

    up_read, up_write = os.pipe()
    hold_read, hold = os.pipe()

    def parent() -> None:
        own = quiet(another(store))
        arm(pool_of(own).L, "reserve_word", sig=signal.SIGSTOP)

        def fork_when_inside() -> None:
            # SIGSTOP stops this thread too: the child is forked after SIGCONT, while the section is held up again.
            while not pool_of(store).T[66]:
                pass
            if os.fork() == 0:
                os.close(hold)
                os.write(up_write, b"x")
                os.read(hold_read, 1)
                os._exit(0)

        forker = threading.Thread(target=fork_when_inside)
        forker.start()
        while True:
            put(own, NEW, SIZE)
            own.remove(NEW)

    with Child(parent) as child:
        child.wait_stopped()
        child.signal(signal.SIGCONT)
        assert os.read(up_read, 1) == b"x"
        child.kill()
    try:
        watch = Stopwatch()
        assert (put(store, keys(8, 9), SIZE) == 0).all()
        assert watch.took_s() < 1.0
        settle(store)
        check_nothing_left(store)
    finally:
        for fd in (up_read, up_write, hold_read, hold):
            os.close(fd)


def test_a_store_used_after_a_fork_is_a_client_of_its_own(store: KvStore) -> None:
    mine = (store.session_id, pool_of(store).client)
    held = store.pin_batch(OLD[:3])

    def session(own: KvStore) -> tuple[int, int, int]:
        check_bytes(own, OLD, SIZE)
        return own.session_id, pool_of(own).client, len(clients_of(own))

    def body() -> None:
        check_bytes(store, OLD, SIZE)
        assert (put(store, NEW, SIZE) == 0).all()
        assert store.session_id != mine[0]
        assert pool_of(store).client != mine[1]
        assert pool_of(store).L is not None
        with store.pin(OLD) as pinned:
            assert (pinned.codes == 0).all()
        assert store.stats().pinned_slots == len(held), "its unpin took the parent's pins"
        store.close()

    assert Child(body).wait() == 0
    assert (store.session_id, pool_of(store).client) == mine
    check_bytes(store, NEW, SIZE)
    assert store.stats().pinned_slots == 3
    store.unpin(held.slots, held.gens)
    settle(store)
    check_nothing_left(store)


@pytest.mark.parametrize("how", ["exit", "close", "kill", "exception"])
def test_the_end_of_a_child_does_not_hurt_its_parent(store: KvStore, how: str) -> None:
    pinned = store.pin(OLD)
    reservation = store.reserve(NEW, SIZE)
    assert (reservation.codes == 0).all()

    def body() -> None:
        if how == "close":
            store.close()
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "exception":
            os._exit(3)

    Child(body).wait()
    pool_of(store).reap()
    assert store.stats().pinned_slots == len(OLD)
    assert store.stats().writing_slots == len(NEW)
    for view, data in zip(reservation.views, blocks(NEW, SIZE), strict=True):
        assert view is not None
        view[:] = data.tobytes()
    del view
    assert (reservation.seal() == 0).all()
    check_bytes(store, NEW, SIZE)
    pinned.release()
    settle(store)
    check_nothing_left(store)


def test_handles_that_a_child_inherits_are_its_parents(store: KvStore) -> None:
    """Releasing or forgetting them there, after the store was used there, changes nothing for anybody."""
    pinned = [store.pin(OLD[:4])]
    reservation = [store.reserve(NEW[:4], SIZE)]
    to_abort = [store.reserve(NEW[4:], SIZE)]

    def body() -> None:
        check_bytes(store, OLD, SIZE)  # attaches anew
        own = store.pin_batch(OLD[:4])
        assert (own.codes == 0).all()
        pinned.pop().release()
        to_abort[0].abort()
        del to_abort[:]
        del reservation[:]
        pool_of(store).maintain()
        me = pool_of(store).client
        bits = [int(pool_of(store).T[pool_of(store).geometry.o_row + int(s) * 12 + 9]) >> me & 1 for s in own.slots]
        assert bits == [1, 1, 1, 1], "releasing the parent's handle released this process's own pins"
        store.close()

    assert Child(body).wait() == 0
    pool_of(store).reap()
    s = store.stats()
    assert (s.writing_slots, s.quarantined_slots, s.pinned_slots) == (8, 0, 4)
    for view, data in zip(reservation[0].views, blocks(NEW[:4], SIZE), strict=True):
        assert view is not None
        view[:] = data.tobytes()
    del view
    assert (reservation[0].seal() == 0).all()
    to_abort[0].abort()
    pinned[0].release()
    check_bytes(store, NEW[:4], SIZE)
    check_nothing_left(store)


def test_fork_while_another_thread_is_inside_sections(store: KvStore) -> None:
    stop = threading.Event()

    def work() -> None:
        i = 0
        while not stop.is_set():
            put(store, keys(16, 100 + i % 20), SIZE)
            with store.pin(OLD):
                pass
            i += 1

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for i in range(12):
            mine = keys(4, 500 + i)

            def body(mine: np.ndarray = mine) -> None:
                codes = put(store, mine, SIZE)
                assert set(codes.tolist()) <= {0, Code.TIMEOUT}, codes.tolist()
                check_bytes(store, mine, SIZE, may_miss=True)
                store.close()

            assert Child(body).wait() == 0
    finally:
        stop.set()
        for t in threads:
            t.join(30)
    assert store.stats().rebuilds == 0, "a fork left a section half-done"
    settle(store)
    check_nothing_left(store)


def test_threads_that_use_a_store_first_after_a_fork_become_one_client(store: KvStore) -> None:
    def body() -> None:
        start = threading.Barrier(6)
        wrong: list[object] = []

        def work() -> None:
            start.wait(LONG_S)
            try:
                check_bytes(store, OLD, SIZE)
                with store.pin(OLD) as pinned:
                    assert (pinned.codes == 0).all()
            except BaseException as e:  # noqa: BLE001
                wrong.append(e)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(20)
        assert not wrong, wrong
        assert len(clients_of(store)) == 2, clients_of(store)
        assert store.stats().pinned_slots == 0
        store.close()

    assert Child(body).wait() == 0
    settle(store)
    check_nothing_left(store)


def test_fork_while_another_thread_attaches(store: KvStore) -> None:
    """A child takes no description with it that was just being opened: neither a name's lock nor a liveness byte."""
    stop = threading.Event()
    short: list[int] = []

    def work() -> None:
        while not stop.is_set():
            own = another(store)
            short.append(pool_of(own).client)
            own.close()

    thread = threading.Thread(target=work)
    thread.start()
    children = []
    try:
        for _ in range(25):
            children.append(Child(signal.pause))
            time.sleep(0.003)
    finally:
        stop.set()
        thread.join(30)
    try:
        assert len(short) > 3
        offset = int(pool_of(store).T[P_LIVE_OFFSET])
        end = time.monotonic() + LONG_S  # the last child may not have run yet
        own, fd = pool_of(store).client, pool_of(store).lock_fd
        while held := [c for c in range(16) if c != own and is_locked(fd, offset + c)]:
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        assert held == [], f"liveness bytes {held} are kept by children that never attached"
        with segment.name_lock(store.pool_name, timeout_s=1.0):
            pass
    finally:
        for child in children:
            child.kill()
    settle(store)
    check_nothing_left(store)


def test_a_store_that_was_dropped_unclosed_is_not_kept_by_a_child(store: KvStore) -> None:
    forgotten = quiet(another(store))
    client = pool_of(forgotten).client
    del forgotten
    offset = int(pool_of(store).T[P_LIVE_OFFSET])
    with Child(signal.pause):
        deadline = time.monotonic() + LONG_S
        while is_locked(pool_of(store).lock_fd, offset + client) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_locked(pool_of(store).lock_fd, offset + client)
        settle(store)
        check_nothing_left(store)


def test_peers_forked_from_a_user_of_the_pool_share_it(store: KvStore) -> None:
    with Peer(lambda: another(store)) as one, Peer(lambda: store) as two:
        assert len({store.session_id, one.session_id, two.session_id}) >= 2
        assert one.call(check_bytes, OLD, SIZE) == len(OLD)
        assert (two.call(put, NEW, SIZE) == 0).all()
        assert one.call(check_bytes, NEW, SIZE) == len(NEW)
        one.kill()
        two.kill()
    settle(store)
    check_nothing_left(store)
