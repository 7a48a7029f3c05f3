"""A process may die anywhere: one test per named instant, and some at instants nobody chose.

After each death another process goes on at once, finds every block right or missing, and what the dead one held comes
back: no slot stays in writing, no pin stays, the tables are whole.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.shm import failpoints
from kvplug.shm import layout as lay
from kvplug.shm.slabs import drain_step
from tests.inside import pool_of
from tests.pool.children import (
    GRACE_S,
    U8,
    Child,
    another,
    blocks,
    check_bytes,
    check_nothing_left,
    die_at,
    fill,
    keys,
    put,
    quiet,
    settle,
)
from tests.stopwatch import LONG_S, Stopwatch

SMALL, LARGE = 16 << 10, 64 << 10
NEW = keys(8, 77)
"""What the dying process stores."""
PARTS = (10_000, 6_000)
Operation = Callable[[KvStore], object]


def _put(store: KvStore) -> None:
    put(store, NEW, SMALL)


def _put_large(store: KvStore) -> None:
    put(store, NEW, LARGE)


def _two_parts(store: KvStore) -> None:
    b = store.reserve_batch(NEW[:1], PARTS)
    assert (b.codes == 0).all()
    starts = store.part_offsets(PARTS)
    data = blocks(NEW[:1], SMALL)[0]
    for part, nbytes in enumerate(PARTS):
        at = int(b.offsets[0] + starts[part])
        store.mapping[at : at + nbytes] = data[:nbytes]
        store.complete(b.slots, b.gens, part, _sum(data[:nbytes]))


def _sum(data: U8) -> np.ndarray:
    from kvplug.shm import copy

    out = np.empty(1, np.int64)
    copy.hash_batch(np.array([data.ctypes.data], np.int64), np.array([data.nbytes], np.int64), out)
    return out


def _abort(store: KvStore) -> None:
    b = store.reserve_batch(NEW, [SMALL])
    store.abort_batch(b.slots, b.gens, writers_done=True)


def _abort_quarantined(store: KvStore) -> None:
    b = store.reserve_batch(NEW, [SMALL])
    store.abort_batch(b.slots, b.gens, writers_done=False)


def _acknowledge(store: KvStore) -> None:
    b = store.reserve_batch(NEW, [SMALL])
    store.abort_batch(b.slots, b.gens, writers_done=False)
    store.acknowledge(b.slots, b.gens)


def _pin(store: KvStore) -> None:
    store.pin_batch(keys(64, 1))


def _pin_unpin(store: KvStore) -> None:
    b = store.pin_batch(keys(64, 1))
    store.unpin(b.slots, b.gens)


def _remove_all(store: KvStore) -> None:
    store.remove(fill_keys(store))


def _set_dirty(store: KvStore) -> None:
    pool_of(store).T[lay.H_DIRTY] = 1
    put(store, NEW, SMALL)


def _reap(store: KvStore) -> None:
    pool_of(store).reap()


def _attach(store: KvStore) -> None:
    os.environ[failpoints.ENV] = "attach_locked"
    another(store)


def _grow(store: KvStore) -> None:
    while pool_of(store).grow():
        pass


def fill_keys(store: KvStore) -> U8:
    """The keys that the test fills a pool with."""
    g = pool_of(store).geometry
    return keys(g.n_rows * g.min_block // SMALL, 1)


@dataclasses.dataclass(frozen=True)
class Death:
    """How to get a process to this instant, and what it leaves behind."""

    operation: Operation
    full: bool = False
    """The pool is full of small blocks before, else it holds 64 of them."""
    dirty: bool = True
    """The dirty mark is set at this instant: exactly one rebuild follows."""
    loses: bool = False
    """Older blocks may go: the operation evicts or removes."""
    skip: int = 0
    sealed: bool = False
    """The block in writing is whole and sealed after recovery."""
    before: Operation | None = None
    """Done by a second process, which is killed before the operation."""


_taken: list[object] = []


def _hold(store: KvStore) -> None:
    _taken.append(store.pin_batch(keys(64, 1)[:16]))  # a batch that nobody reads is given back when it is gone
    _taken.append(store.reserve_batch(keys(4, 78), [SMALL]))


DEATHS = {
    "locked": Death(_put, dirty=False),
    "unlocking": Death(_put, dirty=False),
    "reserve_fields": Death(_put, skip=3),
    "reserve_word": Death(_put, skip=3),
    "reserve_indexed": Death(_put, skip=3),
    "evict_word": Death(_put, full=True, loses=True, skip=3),
    "evict_unindexed": Death(_put, full=True, loses=True, skip=3),
    "write_copy": Death(_put, dirty=False),
    "part_recorded": Death(_two_parts, skip=1),
    "part_done": Death(_two_parts, sealed=True),
    "sealed_word": Death(_two_parts, sealed=True),
    "abort_word": Death(_abort, skip=3),
    "abort_unindexed": Death(_abort, skip=3),
    "freed_listed": Death(_abort, skip=3),
    "pinned_bit": Death(_pin, skip=9),
    "unpinned_bit": Death(_pin_unpin, skip=9),
    "slab_cut": Death(_put_large),
    "slab_owned": Death(_put_large),
    "drain_started": Death(_put_large, full=True, loses=True),
    "drain_empty": Death(_put_large, full=True, loses=True),
    "rebuild_cleared": Death(_set_dirty),
    "rebuild_half": Death(_set_dirty),
    "reap_half": Death(_reap, before=_hold),
    "attach_locked": Death(_attach, dirty=False),
    "index_shift": Death(_remove_all, full=True, loses=True, skip=20),
    "ack_word": Death(_acknowledge, skip=3),
    "watermark": Death(_grow, dirty=False),
}


def a_pool(make_store: Callable[..., KvStore], *, full: bool) -> tuple[KvStore, U8]:
    """A quiet pool of 8 MiB in slabs of 1 MiB that holds 64 small blocks, or as many as it can; their keys."""
    store = quiet(make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S, prefault=False))
    if full:
        return store, fill(store, SMALL, 1)
    put(store, keys(64, 1), SMALL)
    return store, keys(64, 1)


def kill_at(store: KvStore, name: str, death: Death) -> None:
    """Let a child die at ``name``; with another killed before it where the operation is about the dead."""
    if death.before is None:
        die_at(store, name, death.operation, skip=death.skip)
        return
    before = death.before

    def body() -> None:
        # The one that will reap is attached before the other dies: attaching reaps as well.
        reaper = quiet(another(store))
        with Child(lambda: (before(quiet(another(store))), os.kill(os.getpid(), signal.SIGKILL))) as held:
            assert held.wait() == -signal.SIGKILL
        failpoints.arm(pool_of(reaper).L, name, skip=death.skip)
        death.operation(reaper)

    assert Child(body).wait() == -signal.SIGKILL


def test_every_instant_has_its_death() -> None:
    assert set(DEATHS) == set(failpoints.NAMES)


@pytest.mark.parametrize("name", sorted(failpoints.NAMES))
def test_death_at(name: str, make_store: Callable[..., KvStore]) -> None:
    death = DEATHS[name]
    store, old = a_pool(make_store, full=death.full)
    before = store.stats()
    kill_at(store, name, death)

    assert bool(pool_of(store).T[lay.H_DIRTY]) == death.dirty
    reads_alone = check_bytes(store, old, SMALL, may_miss=death.loses or name.startswith("rebuild"))
    watch = Stopwatch()
    others = keys(8, 5)
    codes = put(store, others, SMALL)
    assert watch.took_s() < 1.0
    assert (codes == 0).all(), codes.tolist()
    assert store.stats().rebuilds - before.rebuilds == int(death.dirty)
    assert not pool_of(store).T[lay.H_DIRTY]
    check_bytes(store, others, SMALL)
    hits = check_bytes(store, old, SMALL, may_miss=death.loses)
    assert hits > 0
    assert hits >= reads_alone - len(others) or not death.loses

    settle(store)
    check_nothing_left(store)
    if death.sealed:
        at = store.part_offsets(PARTS)
        with store.pin(NEW[:1]) as pinned:
            assert pinned.codes.tolist() == [0]
            data, right = np.frombuffer(pinned[0], np.uint8), blocks(NEW[:1], SMALL)[0]
            for start, nbytes in zip(at.tolist(), PARTS, strict=True):
                assert (data[start : start + nbytes] == right[:nbytes]).all()
            del data
        assert store.remove(NEW[:1]).tolist() == [0]
    else:
        assert not store.exists(NEW).any(), "a half-written block is found"
    # Every slot is to be had again, under either size, and old generations did no harm.
    assert (put(store, NEW, SMALL) == 0).all()
    check_bytes(store, NEW, SMALL)
    refilled = fill(store, SMALL, 6)
    check_bytes(store, refilled, SMALL, may_miss=True)
    assert store.stats().sealed_blocks >= len(fill_keys(store)) - pool_of(store).geometry.rows_per_slab
    check_nothing_left(store)


@pytest.mark.parametrize("skip", [0, 7])
def test_death_while_giving_up_to_quarantine(skip: int, make_store: Callable[..., KvStore]) -> None:
    store, old = a_pool(make_store, full=False)
    die_at(store, "abort_word", _abort_quarantined, skip=skip)
    settle(store)
    check_bytes(store, old, SMALL)
    assert not store.exists(NEW).any()
    check_nothing_left(store)
    assert (put(store, NEW, SMALL) == 0).all()


def test_death_in_a_rebuild_after_a_death_in_a_rebuild(make_store: Callable[..., KvStore]) -> None:
    store, old = a_pool(make_store, full=True)
    before = store.stats().rebuilds
    die_at(store, "evict_word", _put)
    for name in ("rebuild_cleared", "rebuild_half", "rebuild_half", "rebuild_cleared"):
        # Attaching enters the lock first: the rebuild begins there, with what the environment armed.
        def body(name: str = name) -> None:
            os.environ[failpoints.ENV] = name
            another(store)

        assert Child(body).wait() == -signal.SIGKILL
    assert (put(store, keys(8, 5), SMALL) == 0).all()
    assert store.stats().rebuilds == before + 1
    settle(store)
    assert check_bytes(store, old, SMALL, may_miss=True) >= len(old) - 9 - 8
    check_nothing_left(store)


def test_a_dead_process_of_a_living_session_leaves_tables_that_pass(make_store: Callable[..., KvStore]) -> None:
    """Its pins stay for the others of its session; what it half counted is no finding."""
    store, old = a_pool(make_store, full=False)
    scheduler = another(store)

    def body() -> None:
        worker = quiet(KvStore.join(scheduler.token, config=store.config))
        failpoints.arm(pool_of(worker).L, "pinned_bit", skip=5)
        worker.pin_batch(old)

    assert Child(body).wait() == -signal.SIGKILL
    pool_of(store).reap()
    assert store.stats().pinned_slots == 6
    store.check_integrity()
    scheduler.close()
    settle(store)
    check_nothing_left(store)


def test_slots_of_the_dead_are_kept_for_the_grace(make_store: Callable[..., KvStore]) -> None:
    """A device may still be writing to what a dead process had reserved."""
    store = quiet(make_store("8mib", slab="1mib", quarantine_grace_s=0.5, prefault=False))
    die_at(store, "write_copy", _put)
    began = time.monotonic()
    watch = Stopwatch()
    pool_of(store).reap()
    while pool_of(store).release_expired() == 0:
        assert watch.took_s() < 5
        assert store.stats().quarantined_slots == len(NEW)
        time.sleep(0.01)
    assert time.monotonic() - began >= 0.5
    check_nothing_left(store)


def _work_until_killed(store: KvStore, seed: int) -> None:
    rng = random.Random(seed)
    own = another(store)
    while True:
        some = keys(rng.randrange(1, 40), rng.randrange(30))
        size = rng.choice((SMALL, LARGE))
        match rng.randrange(5):
            case 0 | 1:
                put(own, some, size)
            case 2:
                with own.pin(some):
                    codes = own.get_into(some, [np.empty(size, np.uint8) for _ in some])
                    assert set(codes.tolist()) <= {0, -1, -6}
            case 3:
                own.remove(some[:2])
            case 4:
                own.reserve(some[:4], size).abort()


def test_kills_at_random_instants(make_store: Callable[..., KvStore]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    store, _ = a_pool(make_store, full=True)
    for i in range(20):
        with Child(lambda i=i: _work_until_killed(store, seed + i)) as child:
            deadline = time.monotonic() + LONG_S
            while store.stats().clients < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.001, 0.03))
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        mine = keys(4, 1000 + i)
        assert (put(store, mine, SMALL) == 0).all()
        check_bytes(store, mine, SMALL)
        settle(store, GRACE_S)
        check_nothing_left(store)
        for s in range(30):
            some = keys(40, s)
            for size in (SMALL, LARGE):
                out = np.zeros((len(some), size), np.uint8)
                hit = store.get_into(some, list(out)) == 0
                assert (out[hit] == blocks(some[hit], size)).all()


def test_a_slab_half_drained_by_a_dead_process_is_drained_to_the_end(make_store: Callable[..., KvStore]) -> None:
    store = quiet(make_store("40mib", slab="8mib", min_block=4096, quarantine_grace_s=GRACE_S))
    old = fill(store, 4096, 1)
    moves = store.stats().slab_moves

    def body() -> None:
        own = quiet(another(store))
        assert int(drain_step(pool_of(own).T, pool_of(own).L, 1, LARGE)) == 2, "one section was to drain but a part"
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(body).wait() == -signal.SIGKILL
    assert int(pool_of(store).T[lay.H_DRAINING]) == 2
    store.check_integrity()
    for _ in range(8):
        pool_of(store).maintain()
    assert int(pool_of(store).T[lay.H_DRAINING]) == 0
    assert store.stats().slab_moves == moves + 1
    assert (put(store, NEW, LARGE) == 0).all(), "the slab is there for another size"
    check_bytes(store, NEW, LARGE)
    check_bytes(store, old, 4096, may_miss=True)
    settle(store)
    check_nothing_left(store)
