"""Leaving, forking and removing: what a store gives back, and what it must not touch.

A store may be closed, dropped, copied by a fork, or find its pool removed; views may outlive it. Whatever happens,
nobody else's slot, pin or lock is touched, and nothing stays behind.
"""

from __future__ import annotations

import gc
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvplug import KvStore, hostmem
from kvplug.config import Config
from kvplug.errors import PoolError, PoolFormatError, StoreClosedError
from kvplug.shm import layout as lay
from kvplug.shm import maintenance, segment
from kvplug.shm.local import L_SHUT, L_THREAD
from kvplug.shm.slabs import DRAIN_CALLED_OFF, NOT_BEGUN, drain_step
from tests.inside import pool_of
from tests.pool.children import DEADLINE_S, Child, another, blocks, check_bytes, check_nothing_left, keys, put, quiet

SIZE = 16 << 10
Make = Callable[..., KvStore]


def until(what: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    """Wait for something that must come about."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def overwrite(store: KvStore, word: int, value: int) -> None:
    fd = os.open(segment.segment_path(store.pool_name), os.O_RDWR)
    os.pwrite(fd, struct.pack("<q", value), word * 8)
    os.close(fd)


# ---- views and handles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_of_view", [lambda v: v, lambda v: v[10:20], lambda v: np.frombuffer(v, np.uint8)[4:]])
def test_what_is_made_of_a_view_keeps_its_pin_until_it_is_gone(make_store: Make, made_of_view: Callable) -> None:
    store, other, of = make_store(), make_store(), keys(3, 1)
    put(store, of, SIZE)
    with store.pin(of) as views:
        kept = made_of_view(views[1])
        if isinstance(kept, memoryview) and len(kept) == SIZE:
            kept = memoryview(kept)
    assert store.stats().pinned_slots == 1
    assert other.remove(of).tolist() == [0, -10, 0]
    del kept
    store.unpin(np.empty(0, np.int64))
    assert store.stats().pinned_slots == 0
    assert other.remove(of[1:2]).tolist() == [0]


def test_a_view_outlives_close_and_keeps_its_pin(make_store: Make) -> None:
    store, other, of = make_store(), make_store(), keys(2, 2)
    put(store, of, SIZE)
    held = store.pin(of)
    array = np.frombuffer(held[0], np.uint8)
    store.close()
    with pytest.raises(StoreClosedError):
        store.exists(of)
    assert other.remove(of).tolist() == [-10, 0], "the block in use stays, the one that nobody looks at does not"
    assert (array == blocks(of, SIZE)[0]).all()
    held.release()
    assert other.remove(of[:1]).tolist() == [-10]
    del array, held
    until(lambda: pool_of(other).reap() >= 0 and other.remove(of[:1]).tolist() == [0])
    check_nothing_left(other)


def test_handles_of_a_closed_store_end_quietly(make_store: Make) -> None:
    store, other, of = make_store(), make_store(), keys(3, 3)
    put(store, of[:2], SIZE)
    reservation = store.reserve(of[2:], SIZE)
    with store.pin(of[:2]):
        store.close()
    reservation.abort()
    until(lambda: other.stats().quarantined_slots == 0 and other.stats().pinned_slots == 0)
    check_nothing_left(other)


def test_a_store_that_was_dropped_is_no_client_any_more(make_store: Make) -> None:
    store, of = make_store(), keys(2, 4)
    dropped = another(store)
    put(dropped, of, SIZE)
    dropped.pin_batch(of)
    assert store.stats().clients == 2
    del dropped
    gc.collect()
    until(lambda: pool_of(store).reap() >= 0 and store.stats().clients == 1)
    check_nothing_left(store)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_a_call_that_waited_for_a_thread_that_closed_is_told_so(make_store: Make) -> None:
    store, of = make_store(lock_timeout_s=5.0), keys(2, 5)
    put(store, of, SIZE)
    answers: list[object] = []

    def call() -> None:
        try:
            answers.append(store.pin_batch(of).codes.tolist())
        except StoreClosedError as e:
            answers.append(type(e))

    pool_of(store)._maintenance.stop()
    words = pool_of(store).L
    words[L_THREAD] = 1  # as a thread that is in a section
    waiting = threading.Thread(target=call)
    waiting.start()
    while not pool_of(store)._holdings.all:  # it is about to wait, or waits
        time.sleep(0.001)
    words[L_SHUT] = 1  # as the thread that closes, whose turn comes first
    words[L_THREAD] = 0
    waiting.join(DEADLINE_S)
    assert answers == [StoreClosedError]
    store.close()
    make_store().check_integrity()


def test_calls_go_on_while_memory_is_being_reserved(make_store: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, of = quiet(make_store(size="64mib", slab="8mib")), keys(4, 6)
    put(store, of, SIZE)
    began, go_on = threading.Event(), threading.Event()

    def slow(fd: int, offset: int, nbytes: int) -> None:
        began.set()
        assert go_on.wait(DEADLINE_S)
        os.posix_fallocate(fd, offset, nbytes)

    monkeypatch.setattr(maintenance.segment, "reserve", slow)
    watermark = store.stats().reserved_slabs
    growing = threading.Thread(target=pool_of(store).grow)
    growing.start()
    assert began.wait(DEADLINE_S)
    pinned = store.pin_batch(of)
    assert (pinned.codes == 0).all()
    store.unpin(pinned.slots)
    go_on.set()
    growing.join(DEADLINE_S)
    assert store.stats().reserved_slabs == watermark + 1


def test_upkeep_of_a_drain_waits_for_the_stores_other_threads(make_store: Make) -> None:
    store = quiet(make_store(lock_timeout_s=0.02))
    put(store, keys(4, 7), SIZE)
    slab = 0
    at = pool_of(store).geometry.o_slab + slab * lay.SLAB_WORDS + lay.S_STATE
    pool_of(store).T[at], pool_of(store).T[lay.H_DRAINING] = lay.SLAB_DRAINING, slab + 1
    pool_of(store).L[L_THREAD] = 1  # as a thread that is in a section
    upkeep = threading.Thread(target=pool_of(store).maintain)
    upkeep.start()
    upkeep.join(DEADLINE_S)
    assert int(pool_of(store).T[lay.H_DRAINING]) == slab + 1
    pool_of(store).L[L_THREAD] = 0
    pool_of(store).maintain()
    assert int(pool_of(store).T[lay.H_DRAINING]) == 0


def test_upkeep_begins_no_drain_of_its_own(make_store: Make) -> None:
    store, of = quiet(make_store()), keys(4, 8)
    put(store, of, SIZE)
    assert drain_step(pool_of(store).T, pool_of(store).L, NOT_BEGUN, -1) == DRAIN_CALLED_OFF
    assert store.exists(of).all()
    store.check_integrity()


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_copies_of_handles_in_a_forked_child_do_nothing(make_store: Make) -> None:
    store, of = make_store(), keys(4, 9)
    put(store, of[:2], SIZE)
    held = store.pin(of[:2])
    reservation = store.reserve(of[2:3], SIZE)

    def child() -> None:
        nonlocal held, reservation
        own = store.pin(of[:2])  # attaches anew
        del held, reservation
        gc.collect()
        put(store, of[3:], SIZE)  # runs what finalisers queued
        assert store.stats().pinned_slots == 2
        del own
        store.close()

    with Child(child) as forked:
        assert forked.wait() == 0
    pool_of(store).reap()
    assert store.stats().pinned_slots == 2
    assert reservation.views[0] is not None
    reservation.views[0][:] = blocks(of[2:3], SIZE)[0].tobytes()
    assert reservation.seal().tolist() == [0]
    check_bytes(store, of, SIZE)
    held.release()
    check_nothing_left(store)


def test_a_child_forked_while_another_thread_held_the_name_lock_does_not_keep_it(pool_name: str) -> None:
    forked: list[Child] = []
    with segment.name_lock(pool_name):
        forked.append(Child(lambda: time.sleep(DEADLINE_S)))
    with forked[0], segment.name_lock(pool_name, timeout_s=1.0):
        pass


# ---- sessions and removal --------------------------------------------------------------------------------------------


def test_a_session_whose_processes_are_all_dead_cannot_be_joined(make_store: Make) -> None:
    store = quiet(make_store())
    read, write = os.pipe()

    def child() -> None:
        own = quiet(another(store))
        os.write(write, own.token.encode())
        time.sleep(DEADLINE_S)

    with Child(child):
        token = os.read(read, 500).decode()
    os.close(read)
    os.close(write)
    with pytest.raises(PoolError, match="no living process"):
        KvStore.join(token, config=store.config)
    assert store.stats().clients == 1


def test_a_removed_pool_answers_retired_and_queues_nothing(make_store: Make) -> None:
    store, of = make_store(), keys(4, 10)
    put(store, of, SIZE)
    pinned = store.pin_batch(of[:2])
    reserved = store.reserve_batch(keys(1, 11), [SIZE])
    segment.remove_pool(store.pool_name, force=True)
    for _ in range(3):
        store.unpin(pinned.slots)
    assert store.put(of, list(blocks(of, SIZE))).tolist() == [-9] * 4
    assert store.pin_batch(of).codes.tolist() == [-9] * 4
    assert store.remove(of).tolist() == [-9] * 4
    assert store.complete(reserved.slots, reserved.gens, 0, np.zeros(1, np.uint64)).tolist() == [-9]
    assert store.abort_batch(reserved.slots, reserved.gens, True).tolist() == [-9]
    assert not pool_of(store)._due
    assert check_bytes(store, of, SIZE) == 4, "what is still mapped is still right"
    made_anew = make_store()
    assert made_anew.token.split(":")[1] != store.token.split(":")[1]
    assert not made_anew.exists(of).any()
    with pytest.raises(PoolError, match="made anew"):
        KvStore.join(store.token, config=store.config)


# ---- what lies under a pool's name -----------------------------------------------------------------------------------


def problem_of(pool: str) -> str:
    return next(info.problem for info in segment.list_pools() if info.name == pool)


def test_pools_are_listed_and_removed_past_an_absurd_header(make_store: Make) -> None:
    store = make_store()
    store.close()
    overwrite(store, lay.P_LIVE_OFFSET, -5)
    assert "client table is not where" in problem_of(store.pool_name)
    with pytest.raises(PoolFormatError):
        make_store()
    segment.remove_pool(store.pool_name)
    assert not os.path.exists(segment.segment_path(store.pool_name))


def test_a_pool_of_another_format_is_not_removed_under_its_clients(make_store: Make) -> None:
    store = make_store()
    overwrite(store, lay.P_FORMAT, lay.FORMAT + 1)
    info = next(i for i in segment.list_pools() if i.name == store.pool_name)
    assert not info.usable
    assert info.clients_alive == 1
    with pytest.raises(PoolError, match="1 process attached"):
        segment.remove_pool(store.pool_name)
    store.close()
    segment.remove_pool(store.pool_name)


@pytest.fixture
def folder(pool_name: str) -> Iterator[str]:
    path = segment.segment_path(pool_name)
    os.mkdir(path, 0o600)
    yield path
    os.rmdir(path)


def test_a_folder_under_the_name_is_refused_by_name(folder: str, pool_name: str) -> None:
    with pytest.raises(PoolError, match=pool_name):
        KvStore(config=Config(pool=pool_name, size="32mib"))
    assert problem_of(pool_name)
    with pytest.raises(PoolError, match="cannot remove"):
        segment.remove_pool(pool_name)
    assert os.path.isdir(folder)
    assert not [n for n in os.listdir(hostmem.DEV_SHM) if n.startswith(f"kvplug.{pool_name}.new")]


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_a_corrupt_block_is_dropped_by_the_multi_buffer_call_too(make_store: Make) -> None:
    store, of = make_store(verify="always"), keys(2, 12)
    put(store, of, SIZE)
    found = store.pin_batch(of)
    store.unpin(found.slots)
    store.mapping[int(found.offsets[0]) + 5] ^= 1
    out = np.zeros((2, SIZE), np.uint8)
    store.register_buffer(out.ctypes.data, out.nbytes)
    names = [k.tobytes() for k in of]
    addrs = [[row.ctypes.data] for row in out]
    assert store.batch_get_into_multi_buffers(names, addrs, [[SIZE]] * 2) == [-5, SIZE]
    assert store.exists(of).tolist() == [False, True]
    assert store.stats().corrupt_blocks == 1
    assert store.put(of[:1], list(blocks(of[:1], SIZE))).tolist() == [0]
    check_bytes(store, of, SIZE)
