"""Slabs move between block sizes, and no generation of a slot ever comes back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from kvplug import KvStore, hostmem
from kvplug.errors import BlockTooLargeError, Code
from kvplug.shm import layout as lay
from kvplug.shm import maintenance
from kvplug.shm.slabs import DRAIN_CALLED_OFF, DRAIN_DONE, DRAIN_GOES_ON, drain_step
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
from tests.stopwatch import LONG_S

SMALL, MIDDLE, LARGE = 16 << 10, 48 << 10, 1 << 20
I64 = np.ndarray


@pytest.fixture
def store(make_store: Callable[..., KvStore]) -> KvStore:
    return quiet(make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S, prefault=False))


def words(store: KvStore) -> I64:
    """The word of every row, used or not."""
    g = pool_of(store).geometry
    rows = pool_of(store).T[g.o_row : g.o_row + g.n_rows * lay.ROW_WORDS].reshape(-1, lay.ROW_WORDS)
    return rows[:, lay.R_WORD].copy()


def generations(store: KvStore) -> I64:
    return words(store) >> lay.GEN_SHIFT


def slab_states(store: KvStore) -> list[int]:
    g = pool_of(store).geometry
    table = pool_of(store).T[g.o_slab : g.o_slab + g.n_slabs * lay.SLAB_WORDS].reshape(-1, lay.SLAB_WORDS)
    return [int(s) for s in table[:, lay.S_STATE]]


def slabs_of(store: KvStore, stride: int) -> list[int]:
    """Slabs that are cut into slots of this stride."""
    g = pool_of(store).geometry
    table = pool_of(store).T[g.o_slab : g.o_slab + g.n_slabs * lay.SLAB_WORDS].reshape(-1, lay.SLAB_WORDS)
    return [
        int(s) for s in np.flatnonzero((table[:, lay.S_STRIDE] == stride) & (table[:, lay.S_STATE] >= lay.SLAB_OWNED))
    ]


def drain(store: KvStore, slab: int, stride: int = LARGE) -> int:
    return int(drain_step(pool_of(store).T, pool_of(store).L, slab, stride))


def test_a_new_size_gets_room_in_a_pool_that_an_old_one_filled(store: KvStore) -> None:
    n = pool_of(store).geometry.n_slabs
    old = fill(store, SMALL, 1)
    assert len(slabs_of(store, SMALL)) == n
    seen = generations(store)
    for round_, size in enumerate((MIDDLE, LARGE, SMALL, LARGE, MIDDLE)):
        for i in range(4 * n):  # stale blocks of the other sizes give way
            mine = keys(2, 100 * round_ + i)
            assert (put(store, mine, size) == 0).all(), size
            check_bytes(store, mine, size)
        assert slabs_of(store, size), "the size in use has got no slab"
        now = generations(store)
        assert (now >= seen).all(), "a slot's generation went back"
        seen = now
        store.check_integrity(deep=True)
    assert store.stats().slab_moves >= 5
    check_bytes(store, old, SMALL, may_miss=True)
    check_nothing_left(store)


def test_a_block_as_large_as_a_slab_fits_and_a_larger_one_is_refused(store: KvStore) -> None:
    slab = pool_of(store).geometry.slab_bytes
    mine = keys(2, 1)
    assert (put(store, mine, slab) == 0).all()
    check_bytes(store, mine, slab)
    with pytest.raises(BlockTooLargeError, match=str(slab)):
        store.put(mine, [np.zeros(slab + 1, np.uint8)] * 2)
    with pytest.raises(BlockTooLargeError):
        store.reserve(mine, slab + 1)
    check_nothing_left(store)


@pytest.mark.parametrize("size", [SMALL, MIDDLE, 20_000, 100_000, 350_000, LARGE])
def test_slots_of_a_size_lie_apart_and_inside_the_pool(store: KvStore, size: int) -> None:
    """Also of sizes that do not divide a slab."""
    g = pool_of(store).geometry
    taken: list[tuple[int, int]] = []
    while True:
        b = store.reserve_batch(keys(4, len(taken) + 9), [size])
        taken += [(int(o), int(o) + size) for o, c in zip(b.offsets, b.codes, strict=True) if c == 0]
        if (b.codes != 0).any():
            break
    taken.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken)), "two slots overlap"
    assert taken[0][0] >= g.data_offset
    assert taken[-1][1] <= g.segment_bytes
    assert all(start % lay.PART_ALIGN_BYTES == 0 for start, _ in taken)


def test_a_drain_is_called_off_by_a_pin_and_its_slots_come_back(store: KvStore) -> None:
    fill(store, SMALL, 1)
    slab = 3
    rps = pool_of(store).geometry.rows_per_slab
    pinned = _pin_in_slab(store, slab)
    sealed = store.stats().sealed_blocks
    assert drain(store, slab) == DRAIN_CALLED_OFF
    assert slab_states(store)[slab] == lay.SLAB_OWNED
    assert pool_of(store).T[lay.H_DRAINING] == 0
    check_bytes(store, pinned[1], SMALL)
    store.check_integrity(deep=True)
    freed = sealed - store.stats().sealed_blocks
    assert 0 < freed < rps
    again = keys(freed, 5)
    evicted = store.stats().evicted_blocks
    assert (put(store, again, SMALL) == 0).all()
    assert store.stats().evicted_blocks == evicted, "what the drain had freed is used before anything is evicted"
    store.unpin(pinned[0])
    assert drain(store, slab) == DRAIN_DONE
    assert slab_states(store)[slab] == lay.SLAB_FREE
    check_nothing_left(store)


def _pin_in_slab(store: KvStore, slab: int) -> tuple[I64, U8]:
    """Pin the block in the middle of a slab; its slot, its key."""
    g = pool_of(store).geometry
    row = slab * g.rows_per_slab + g.rows_per_slab // 2
    at = g.o_row + row * lay.ROW_WORDS + lay.R_KEY
    key = pool_of(store).T[at : at + 4].copy().view(np.uint8).reshape(1, 32)
    b = store.pin_batch(key)
    assert b.slots.tolist() == [row]
    return b.slots.copy(), key


def test_a_drain_is_called_off_by_a_writer(store: KvStore) -> None:
    fill(store, SMALL, 1)
    mine = keys(1, 9)
    b = store.reserve_batch(mine, [SMALL])
    slab = int(b.slots[0]) // pool_of(store).geometry.rows_per_slab
    assert drain(store, slab) == DRAIN_CALLED_OFF
    assert store.still_writing(b.slots, b.gens).all()
    store.check_integrity()
    store.abort_batch(b.slots, b.gens, writers_done=False)
    assert drain(store, slab) == DRAIN_CALLED_OFF, "a slot in quarantine may still be written to"
    store.acknowledge(b.slots, b.gens)
    assert drain(store, slab) == DRAIN_DONE
    check_nothing_left(store)


def test_a_pool_full_of_pins_answers_full_and_counts_it(make_store: Callable[..., KvStore]) -> None:
    store = quiet(make_store("8mib", slab="1mib", pin_budget_share=1.0, prefault=False))
    old = fill(store, SMALL, 1)
    pinned = store.pin_batch(old)
    assert (pinned.codes == 0).all()
    for size in (SMALL, MIDDLE, LARGE):
        assert set(put(store, keys(3, size), size).tolist()) == {Code.FULL}
    assert store.stats().refused_full == 9
    check_bytes(store, old, SMALL)
    store.unpin(pinned.slots, pinned.gens)
    for size in (LARGE, MIDDLE, SMALL):
        assert set(put(store, keys(3, size), size).tolist()) == {Code.OK}
    check_nothing_left(store)


def test_a_drain_of_several_sections_goes_on_with_whoever_comes(make_store: Callable[..., KvStore]) -> None:
    store = quiet(make_store("40mib", slab="8mib", min_block=4096))
    fill(store, 4096, 1)
    other = quiet(another(store))
    assert drain(store, 2) == DRAIN_GOES_ON
    assert slab_states(store)[2] == lay.SLAB_DRAINING
    store.check_integrity()
    assert (put(other, keys(20, 2), 4096) == 0).all(), "others store meanwhile"
    assert drain(other, 0) in (DRAIN_DONE, DRAIN_CALLED_OFF), "the one that was begun goes on, not another one"
    assert slab_states(store)[0] == lay.SLAB_OWNED
    assert pool_of(store).T[lay.H_DRAINING] == 0
    other.close()
    check_nothing_left(store)


@pytest.mark.parametrize("point", ["drain_started", "drain_empty", "evict_word", "slab_cut", "slab_owned"])
def test_generations_do_not_go_back_across_deaths_moves_and_rebuilds(store: KvStore, point: str) -> None:
    fill(store, SMALL, 1)
    seen = generations(store)
    for i in range(3):
        die_at(store, point, lambda own, i=i: put(own, keys(8, 70 + i), LARGE if i % 2 == 0 else MIDDLE))
        put(store, keys(40, 80 + i), SMALL)
        now = generations(store)
        assert (now >= seen).all(), "a slot's generation went back"
        changed = words(store)[now == seen] & lay.STATE_MASK
        assert len(changed)
        seen = now
        settle(store)
        check_nothing_left(store)
    assert store.stats().rebuilds == 3


def test_generations_go_on_when_everybody_left_and_came_back(make_store: Callable[..., KvStore]) -> None:
    store = quiet(make_store("8mib", slab="1mib", prefault=False))
    old = fill(store, SMALL, 1)
    b = store.reserve_batch(keys(4, 5), [SMALL])
    seen = generations(store)
    store.close()
    again = quiet(make_store("8mib", slab="1mib", prefault=False))
    assert (generations(again) >= seen).all()
    check_bytes(again, old, SMALL, may_miss=True)
    assert not again.still_writing(b.slots, b.gens).any()
    assert set(again.complete(b.slots, b.gens, 0, np.zeros(4, np.int64)).tolist()) == {Code.STALE}


def test_the_same_word_is_never_seen_with_two_contents(store: KvStore) -> None:
    """What the readers without a lock stand on: (slot, sealed word) names one key for ever."""
    g = pool_of(store).geometry
    rows = pool_of(store).T[g.o_row : g.o_row + g.n_rows * lay.ROW_WORDS].reshape(-1, lay.ROW_WORDS)
    named: dict[tuple[int, int], bytes] = {}
    rng = np.random.default_rng(1)
    for i in range(40):
        size = int(rng.choice([SMALL, MIDDLE, LARGE // 2]))
        put(store, keys(int(rng.integers(1, 60)), 200 + i), size, batch=8)
        if i % 10 == 5:
            die_at(store, "evict_unindexed", lambda own, i=i: put(own, keys(64, 900 + i), SMALL))
            put(store, keys(4, 2000 + i), SMALL)
        for row in np.flatnonzero(rows[:, lay.R_WORD] & lay.STATE_MASK == lay.SEALED).tolist():
            key = rows[row, lay.R_KEY : lay.R_KEY + 4].tobytes()
            assert named.setdefault((row, int(rows[row, lay.R_WORD])), key) == key
    settle(store)
    check_nothing_left(store)


def test_many_growers_at_once_take_each_slab_once(make_store: Callable[..., KvStore]) -> None:
    store = quiet(make_store("40mib", slab="1mib", prefault=False))
    n = pool_of(store).geometry.n_slabs
    start = time.monotonic() + 0.5

    def body() -> None:
        own = quiet(another(store))
        time.sleep(max(0.0, start - time.monotonic()))
        threads = [threading.Thread(target=_grow_all, args=(own,)) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(20)
        own.close()

    children = [Child(body) for _ in range(4)]
    _grow_all(store)
    for child in children:
        assert child.wait() == 0
    assert int(pool_of(store).T[lay.H_WATERMARK]) == n
    assert sum(s in (lay.SLAB_FREE, lay.SLAB_OWNED) for s in slab_states(store)) == n
    settle(store)
    check_nothing_left(store)
    of = fill(store, SMALL, 3)
    check_bytes(store, of, SMALL)


def _grow_all(store: KvStore) -> None:
    deadline = time.monotonic() + LONG_S
    while int(pool_of(store).T[lay.H_WATERMARK]) < pool_of(store).geometry.n_slabs and time.monotonic() < deadline:
        pool_of(store).grow()


def test_writers_of_several_sizes_at_once_keep_their_bytes(store: KvStore) -> None:
    """Slabs move under readers and writers in four processes."""

    def body(seed: int) -> None:
        own = another(store)
        rng = np.random.default_rng(seed)
        for i in range(60):
            size = int(rng.choice([SMALL, MIDDLE, LARGE // 2]))
            some = keys(4, int(rng.integers(0, 12)) * 10 + (SMALL, MIDDLE, LARGE // 2).index(size))
            codes = set(put(own, some, size).tolist())
            assert codes <= {0, 1, Code.FULL, Code.IN_PROGRESS, Code.TIMEOUT}, codes
            check_bytes(own, some, size, may_miss=True)
            if i % 7 == 0:
                with own.pin(some) as pinned:
                    right = blocks(some, size)
                    for j, view in enumerate(pinned):
                        assert view is None or view == right[j].tobytes()
        own.close()

    children = [Child(lambda i=i: body(i)) for i in range(4)]
    for child in children:
        assert child.wait(60) == 0
    assert store.stats().slab_moves > 0
    settle(store)
    check_nothing_left(store)


# ---- growth ----------------------------------------------------------------------------------------------------------


def _short(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A container's limit that a test moves."""
    limit = {"bytes": 1 << 40}
    plain = hostmem.memory
    monkeypatch.setattr(
        maintenance.hostmem,
        "memory",
        lambda *root: plain(*root)._replace(limit_bytes=limit["bytes"], used_bytes=0),
    )
    return limit


def test_a_pool_that_found_memory_short_grows_again_when_there_is_some(
    make_store: Callable[..., KvStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit = _short(monkeypatch)
    monkeypatch.setattr(maintenance, "RETRY_LEAST_S", 0.01)
    store = make_store("8mib", slab="1mib", prefault=False)
    limit["bytes"] = 1 << 20
    for _ in range(3):
        assert not pool_of(store).grow()
        time.sleep(0.05)
    said = [r.getMessage() for r in caplog.records if "can't grow" in r.getMessage()]
    assert len(said) == 1, said
    for part in ("kvplug: pool", "1 MiB of 7 MiB", "64 MiB", "KVPLUG_SIZE", "tried again"):
        assert part in said[0], (part, said[0])
    limit["bytes"] = 1 << 40
    deadline = time.monotonic() + 30
    while not pool_of(store).grow():
        assert time.monotonic() < deadline, "it does not try again"
        time.sleep(0.01)
    assert any("grows again" in r.getMessage() for r in caplog.records)
    while pool_of(store).grow():
        pass
    assert store.stats().reserved_slabs == pool_of(store).geometry.n_slabs


def test_a_pause_grows_and_ends_with_the_shortage(
    make_store: Callable[..., KvStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = _short(monkeypatch)
    growth = maintenance.Growth(pool_of(make_store("8mib", slab="1mib", prefault=False)).segment)
    limit["bytes"] = 1 << 20
    pauses = []
    for _ in range(8):
        growth._not_before = 0.0
        assert growth.next_slab(1) == -1
        pauses.append(growth._pause_s)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert growth.next_slab(1) == -1, "it was asked within its pause"
    limit["bytes"] = 1 << 40
    assert growth.next_slab(1) == -1, "it was asked within its pause"
    growth._not_before = 0.0
    assert growth.next_slab(1) == 1
    assert growth._pause_s == 0.0


def test_a_block_is_not_refused_for_room_that_another_process_makes_just_then(
    make_store: Callable[..., KvStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last slab is reserved by somebody else between the section that found no room and the look for more."""
    store, other = (make_store("8mib", slab="1mib", prefault=False) for _ in range(2))
    plain = pool_of(store).grow

    def late() -> bool:
        while pool_of(other).grow():
            pass
        return plain()

    monkeypatch.setattr(pool_of(store), "grow", late)
    n = pool_of(store).geometry.n_rows // 2
    batch = store.reserve_batch(keys(n, 5), [16 << 10])
    assert (batch.codes == 0).all(), batch.codes
