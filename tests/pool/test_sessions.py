"""Sessions: the processes of one engine stand in for each other; what they hold goes when the last of them is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.errors import Code, ConfigError, PoolError, PoolNotFoundError
from kvplug.shm import copy as copies
from kvplug.shm import layout as lay
from tests.inside import pool_of
from tests.pool.children import (
    GRACE_S,
    U8,
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
from tests.stopwatch import LONG_S

SIZE = 16 << 10
PARTS = (8 << 10, 4 << 10, 4 << 10)
OLD, NEW = keys(32, 1), keys(6, 2)
Slots = tuple[list[int], list[int], list[int]]
"""(slots, generations, offsets) as they go through a pipe."""


@pytest.fixture
def store(make_store: Callable[..., KvStore]) -> KvStore:
    """An onlooker with a session of its own."""
    store = quiet(make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S, prefault=False))
    assert (put(store, OLD, SIZE) == 0).all()
    return store


# ---- what processes of a session do -------------------------------------------------------------------------------


def reserve(store: KvStore, of: U8) -> Slots:
    b = store.reserve_batch(of, PARTS)
    assert (b.codes == 0).all(), b.codes
    return b.slots.tolist(), b.gens.tolist(), b.offsets.tolist()


def write(store: KvStore, of: U8, where: Slots, part: int) -> list[int]:
    """Write one part of each block and say so."""
    slots, gens, offsets = where
    start = sum(PARTS[:part])
    data = np.ascontiguousarray(blocks(of, SIZE)[:, start : start + PARTS[part]])
    assert store.still_writing(np.array(slots), np.array(gens)).all()
    at = np.array(offsets) + store.part_offsets(PARTS)[part]
    sums = np.empty(len(slots), np.int64)
    for i, to in enumerate(at.tolist()):
        store.mapping[to : to + PARTS[part]] = data[i]
    copies.hash_batch(store.base_address + at, np.full(len(slots), PARTS[part], np.int64), sums)
    return store.complete(np.array(slots), np.array(gens), part, sums).tolist()


_pinned: list[object] = []


def pin(store: KvStore, of: U8) -> int:
    b = store.pin_batch(of)
    _pinned.append(b)  # a batch that nobody reads is given back when it is gone
    return int((b.codes == 0).sum())


def token(store: KvStore) -> str:
    return store.token


def give_up(store: KvStore, where: Slots) -> list[int]:
    return store.abort_batch(np.array(where[0]), np.array(where[1]), writers_done=False).tolist()


def joined(store: KvStore, of: str) -> KvStore:
    return KvStore.join(of, config=store.config)


def parts_of(store: KvStore, of: U8) -> None:
    """Each part of these blocks has the right bytes."""
    with store.pin(of) as pinned:
        assert (pinned.codes == 0).all(), pinned.codes
        starts = store.part_offsets(PARTS)
        for i, right in enumerate(blocks(of, SIZE)):
            got = bytes(pinned[i])
            at = 0
            for start, nbytes in zip(starts.tolist(), PARTS, strict=True):
                assert got[start : start + nbytes] == right[at : at + nbytes].tobytes()
                at += nbytes


# ---- deaths within a session --------------------------------------------------------------------------------------


def test_a_worker_outlives_its_scheduler_and_its_part_seals(store: KvStore) -> None:
    with Peer(lambda: another(store)) as scheduler:
        of = scheduler.call(token)
        with Peer(lambda: joined(store, of)) as worker:
            assert worker.session_id == scheduler.session_id != store.session_id
            where = scheduler.call(reserve, NEW)
            assert scheduler.call(write, NEW, where, 0) == [Code.PENDING] * len(NEW)
            assert scheduler.call(pin, OLD) == len(OLD)
            scheduler.kill()
            settle(store)  # another process reaps, and the grace goes by
            s = store.stats()
            assert (s.writing_slots, s.quarantined_slots, s.pinned_slots) == (len(NEW), 0, len(OLD))
            assert worker.call(write, NEW, where, 2) == [Code.PENDING] * len(NEW)
            assert worker.call(write, NEW, where, 1) == [Code.OK] * len(NEW)
            parts_of(store, NEW)
            assert set(store.remove(OLD[:4]).tolist()) == {Code.PINNED}, "the dead scheduler's pins stay"
            store.check_integrity()
            worker.kill()
            settle(store)
            check_nothing_left(store)
            parts_of(store, NEW)
            check_bytes(store, OLD, SIZE)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_everything_goes_with_the_last_of_a_session_whoever_that_is(store: KvStore, first: int) -> None:
    with Peer(lambda: another(store)) as a:
        of = a.call(token)
        with Peer(lambda: joined(store, of)) as b, Peer(lambda: joined(store, of)) as c:
            members = [a, b, c]
            for i, one in enumerate(members):
                one.call(pin, OLD[i * 8 : i * 8 + 8])
                one.call(reserve, NEW[i * 2 : i * 2 + 2])
            for one in (members[first:] + members[:first])[:2]:
                one.kill()
                settle(store)
                s = store.stats()
                assert (s.writing_slots, s.quarantined_slots, s.pinned_slots) == (6, 0, 24)
                assert s.sessions == 2
            members[(first + 2) % 3].kill()
            assert pool_of(store).reap() == 3
            s = store.stats()
            assert (s.writing_slots, s.quarantined_slots, s.pinned_slots) == (0, 6, 0)
            settle(store)
            check_nothing_left(store)
            assert (put(store, NEW, SIZE) == 0).all()


def test_an_orderly_end_is_like_a_death_for_its_session(store: KvStore) -> None:
    scheduler = quiet(another(store))
    worker = quiet(joined(store, scheduler.token))
    where = reserve(worker, NEW)
    write(worker, NEW, where, 0)
    worker.close()
    assert store.stats().writing_slots == len(NEW)
    write(scheduler, NEW, where, 1)
    assert write(scheduler, NEW, where, 2) == [Code.OK] * len(NEW)
    scheduler.close()
    settle(store)
    parts_of(store, NEW)
    check_nothing_left(store)


def test_quarantine_without_acknowledgement_ends_with_its_session(store: KvStore) -> None:
    with Peer(lambda: another(store)) as scheduler:
        where = scheduler.call(reserve, NEW)
        assert scheduler.call(give_up, where) == [Code.OK] * len(NEW)
        settle(store)
        assert store.stats().quarantined_slots == len(NEW), "freed while a writer of its session may still write"
        assert (store.acknowledge(np.array(where[0][:2]), np.array(where[1][:2])) == 0).all()
        assert store.stats().quarantined_slots == len(NEW) - 2
        scheduler.kill()
        settle(store)
        check_nothing_left(store)


# ---- joining ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_session_cannot_be_joined(store: KvStore, reaped: bool) -> None:
    with Peer(lambda: another(store)) as scheduler:
        of = scheduler.call(token)
        scheduler.kill()
    if reaped:
        pool_of(store).reap()
    with pytest.raises(PoolError, match="no living process"):
        joined(store, of)
    settle(store)
    check_nothing_left(store)


def test_a_session_of_a_pool_that_was_made_anew_cannot_be_joined(make_store: Callable[..., KvStore]) -> None:
    from kvplug.shm import segment

    store = make_store("8mib", slab="1mib")
    of = store.token
    store.close()
    segment.remove_pool(store.pool_name)
    with pytest.raises(PoolNotFoundError):
        joined(store, of)
    make_store("8mib", slab="1mib")
    with pytest.raises(PoolError, match="another one"):
        joined(store, of)


@pytest.mark.parametrize("text", ["", "pool", "pool:zz:1", "pool:00:x", "a:b"])
def test_a_malformed_token_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        KvStore.join(text)


def test_session_numbers_are_never_used_again(store: KvStore) -> None:
    seen = {store.session_id}
    for _ in range(4):
        own = quiet(another(store))
        assert own.session_id not in seen
        seen.add(own.session_id)
        own.close()
        with Peer(lambda: another(store)) as peer:
            assert peer.session_id not in seen
            seen.add(peer.session_id)
            peer.kill()
        pool_of(store).T[lay.H_DIRTY] = 1  # nor after a rebuild
        pool_of(store).reap()
    assert sorted(seen) == list(range(min(seen), min(seen) + len(seen)))


def test_a_client_row_goes_to_others_without_its_pins(store: KvStore) -> None:
    with Peer(lambda: another(store)) as first:
        first.call(pin, OLD)
        (row,) = (c for c, _, session in clients_of(store) if session == first.session_id)
        first.kill()
    with Peer(lambda: another(store)) as second:  # who attaches reaps
        assert [c for c, _, session in clients_of(store) if session == second.session_id] != []
        pool_of(store).reap()
        assert store.stats().pinned_slots == 0
        with Peer(lambda: another(store)) as third:
            rows = {c for c, _, session in clients_of(store) if session in (second.session_id, third.session_id)}
            assert row in rows, "the dead client's row is not used again"
    settle(store)
    check_nothing_left(store)


# ---- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_whoever_writes_the_last_part_seals(store: KvStore, order: tuple[int, ...]) -> None:
    with Peer(lambda: another(store)) as scheduler:
        of = scheduler.call(token)
        where = scheduler.call(reserve, NEW)
        with Peer(lambda: joined(store, of)) as one, Peer(lambda: joined(store, of)) as two:
            writers = {0: scheduler, 1: one, 2: two}
            for part in order:
                assert not store.exists(NEW).any()
                codes = writers[part].call(write, NEW, where, part)
                assert set(codes) == {Code.OK if part == order[-1] else Code.PENDING}
            parts_of(store, NEW)
            assert set(scheduler.call(complete_again, where)) == {Code.STALE}
    settle(store)
    check_nothing_left(store)


def complete_again(store: KvStore, where: Slots) -> list[int]:
    return store.complete(np.array(where[0]), np.array(where[1]), 0, np.zeros(len(where[0]), np.int64)).tolist()


def test_a_part_that_is_recorded_twice_counts_once(store: KvStore) -> None:
    where = reserve(store, NEW)
    for _ in range(3):
        assert set(write(store, NEW, where, 0)) == {Code.PENDING}
    assert set(write(store, NEW, where, 1)) == {Code.PENDING}
    assert set(write(store, NEW, where, 2)) == {Code.OK}
    parts_of(store, NEW)


def test_workers_of_one_session_seal_at_once(store: KvStore) -> None:
    """Two that complete the same blocks at the same time: each block is sealed once."""
    with Peer(lambda: another(store)) as scheduler:
        of = scheduler.call(token)
        with Peer(lambda: joined(store, of)) as one, Peer(lambda: joined(store, of)) as two:
            sealed = store.stats().stored_blocks
            for i in range(10):
                mine = keys(6, 50 + i)
                where = scheduler.call(reserve, mine)
                for part, who in enumerate((scheduler, one, two)):
                    who.begin(write, mine, where, part)
                codes = np.array([scheduler.end(), one.end(), two.end()])
                assert ((codes == Code.OK).sum(axis=0) == 1).all()
                assert ((codes == Code.PENDING).sum(axis=0) == 2).all()
                parts_of(store, mine)
            assert store.stats().stored_blocks == sealed + 60
    settle(store)
    check_nothing_left(store)


# ---- generations --------------------------------------------------------------------------------------------------


def test_a_stale_generation_is_refused_everywhere(store: KvStore) -> None:
    """Also when the slot was given to somebody else meanwhile: its bytes and its state stay theirs."""
    where = reserve(store, NEW)
    slots, gens = np.array(where[0]), np.array(where[1])
    store.abort_batch(slots, gens, writers_done=True)
    others = keys(len(NEW), 3)
    again = reserve(store, others)
    assert sorted(again[0]) == sorted(where[0]), "the freed slots are used again first"
    sums = np.zeros(len(NEW), np.int64)
    for wrong in (gens, gens + 1, gens - 1, gens + 5, -gens):
        assert not store.still_writing(slots, wrong).any()
        assert set(store.complete(slots, wrong, 0, sums).tolist()) == {Code.STALE}
        assert set(store.abort_batch(slots, wrong, writers_done=True).tolist()) == {Code.STALE}
        assert set(store.abort_batch(slots, wrong, writers_done=False).tolist()) == {Code.STALE}
        assert set(store.acknowledge(slots, wrong).tolist()) == {Code.STALE}
        assert set(store.verify_parts(slots, wrong, 0).tolist()) == {Code.STALE}
    for part in range(3):
        write(store, others, again, part)
    parts_of(store, others)
    for part in range(3):
        assert set(store.complete(np.array(again[0]), np.array(again[1]), part, sums).tolist()) == {Code.STALE}
    parts_of(store, others)


def test_a_writer_whose_reservation_was_reclaimed_is_told(store: KvStore) -> None:
    """The slot of a session that was taken for dead and reaped is not the writer's any more."""
    with Peer(lambda: another(store)) as scheduler:
        where = scheduler.call(reserve, NEW)
        scheduler.kill()
    settle(store)
    assert not store.still_writing(np.array(where[0]), np.array(where[1])).any()
    assert set(complete_again(store, where)) == {Code.STALE}
    assert set(give_up(store, where)) == {Code.STALE}
    check_nothing_left(store)


def test_acknowledging_twice_or_what_was_never_given_up_is_stale(store: KvStore) -> None:
    where = reserve(store, NEW)
    slots, gens = np.array(where[0]), np.array(where[1])
    assert set(store.acknowledge(slots, gens).tolist()) == {Code.STALE}
    assert set(store.abort_batch(slots, gens, writers_done=False).tolist()) == {Code.OK}
    assert set(store.acknowledge(slots, gens).tolist()) == {Code.OK}
    assert set(store.acknowledge(slots, gens).tolist()) == {Code.STALE}
    check_nothing_left(store)


@pytest.mark.parametrize("slot", [-1, -(1 << 40), 1 << 31, 1 << 40])
def test_slots_out_of_range_are_stale(store: KvStore, slot: int) -> None:
    slots, gens = np.array([slot]), np.array([1])
    assert store.complete(slots, gens, 0, np.zeros(1, np.int64)).tolist() == [Code.STALE]
    assert store.abort_batch(slots, gens, writers_done=True).tolist() == [Code.STALE]
    assert store.acknowledge(slots, gens).tolist() == [Code.STALE]
    assert store.still_writing(slots, gens).tolist() == [False]
    store.check_integrity()


def test_the_maintenance_of_a_living_process_reaps_the_dead_by_itself(make_store: Callable[..., KvStore]) -> None:
    store = make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S)
    put(store, OLD, SIZE)

    def body() -> None:
        own = quiet(another(store))
        pin(own, OLD)
        reserve(own, NEW)
        os.kill(os.getpid(), signal.SIGKILL)

    Child(body).wait()
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        s = store.stats()
        if (s.writing_slots, s.quarantined_slots, s.pinned_slots) == (0, 0, 0):
            break
        time.sleep(0.02)
    check_nothing_left(store)
