"""The SDK in place: views, reservations, checksums, and the end of a store."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvplug import errors
from kvplug.errors import Code
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.pool.sample import BLOCK, MakeStore, flip_a_byte, some_blocks, some_keys

# ---- in place ------------------------------------------------------------------------------------------------------


def pinned(store: KvStore) -> int:
    """Slots under a pin, after queued releases were done."""
    gc.collect()
    pool_of(store).maintain()
    return store.stats().pinned_slots


def test_views_show_the_block_in_place_and_can_not_be_written(make_store: MakeStore) -> None:
    store = make_store()
    keys, blocks = some_keys(2), some_blocks(2)
    store.put(keys[:1], blocks[:1])
    with store.pin(keys) as views:
        assert views.codes.tolist() == [Code.OK, Code.MISSING]
        assert views[1] is None
        view = views[0]
        assert view is not None
        assert view.readonly
        assert bytes(view) == bytes(blocks[0])
        with pytest.raises(TypeError):
            view[0] = 1
        array = np.frombuffer(view, np.uint8)
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        assert np.shares_memory(array, store.mapping)
        assert store.stats().pinned_slots == 1
        assert store.remove(keys[:1]).tolist() == [Code.PINNED]
        del array, view
    assert store.stats().pinned_slots == 0
    with pytest.raises(errors.PoolError, match="released"):
        views[0]
    assert store.remove(keys[:1]).tolist() == [Code.OK]


DERIVED: dict[str, Callable[[memoryview], Any]] = {
    "the view": lambda v: v,
    "a slice": lambda v: v[10:20],
    "a numpy array": lambda v: np.frombuffer(v, np.uint8),
    "a part of an array": lambda v: np.asarray(v)[5:9].view(np.uint16),
    "a tensor": lambda v: torch.frombuffer(v, dtype=torch.uint8)[3:],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", DERIVED)
@pytest.mark.parametrize("forgotten", [False, True], ids=["released", "forgotten"])
def test_a_view_in_use_keeps_its_pin_and_no_other(make_store: MakeStore, how: str, forgotten: bool) -> None:
    store = make_store(size="8mib")
    keys, blocks = some_keys(3), some_blocks(3)
    store.put(keys, blocks)
    views = store.pin(keys)
    kept = DERIVED[how](views[1])
    shown = bytes(memoryview(kept)) if how != "a tensor" else kept.numpy().tobytes()
    assert all(view is not None for view in (views[0], views[2]))
    if not forgotten:
        assert views.release() == 1
    del views
    assert pinned(store) == 1
    assert store.remove(keys).tolist() == [Code.OK, Code.PINNED, Code.OK]
    store.put(some_keys(600, seed=9), some_blocks(600, seed=9))  # turns the pool over
    assert (bytes(memoryview(kept)) if how != "a tensor" else kept.numpy().tobytes()) == shown
    del kept
    assert pinned(store) == 0
    assert store.remove(keys[1:2]).tolist() == [Code.OK]


def test_pins_that_were_forgotten_are_released(make_store: MakeStore) -> None:
    store = make_store()
    keys = some_keys(3)
    store.put(keys, some_blocks(3))
    store.pin(keys)
    assert pinned(store) == 0


def test_a_reservation_is_invisible_until_sealed(make_store: MakeStore) -> None:
    store, other = make_store(), make_store()
    keys, blocks = some_keys(3), some_blocks(3)
    store.put(keys[:1], blocks[:1])
    r = store.reserve(keys, BLOCK)
    assert r.codes.tolist() == [Code.EXISTS, Code.OK, Code.OK]
    assert r.views[0] is None
    assert other.reserve(keys, BLOCK).codes.tolist() == [Code.EXISTS, Code.IN_PROGRESS, Code.IN_PROGRESS]
    assert other.put(keys, blocks).tolist() == [Code.EXISTS, Code.IN_PROGRESS, Code.IN_PROGRESS]
    assert other.remove(keys[1:]).tolist() == [Code.IN_PROGRESS] * 2
    for i in (1, 2):
        r.views[i][:] = blocks[i].tobytes()
    assert other.exists(keys).tolist() == [True, False, False]
    assert r.seal().tolist() == [Code.EXISTS, Code.OK, Code.OK]
    out = np.zeros_like(blocks)
    assert (other.get_into(keys, out) == Code.OK).all()
    assert (out == blocks).all()
    with pytest.raises(ValueError, match="released"):
        r.views[1][0] = 1
    store.check_integrity()


@pytest.mark.parametrize("forgotten", [False, True], ids=["aborted", "forgotten"])
def test_a_reservation_given_up_is_free_once_nobody_can_write_to_it(make_store: MakeStore, forgotten: bool) -> None:
    store = make_store()
    keys = some_keys(2)
    r = store.reserve(keys, BLOCK)
    kept = r.views[1][5:10]
    if not forgotten:
        r.abort()
        r.abort()
    del r
    gc.collect()
    pool_of(store).maintain()
    assert store.stats().quarantined_slots == 1
    kept[:] = b"stray"  # into a slot that nobody else has
    del kept
    pool_of(store).maintain()
    stats = store.stats()
    assert (stats.quarantined_slots, stats.writing_slots, stats.sealed_blocks) == (0, 0, 0)
    assert (store.put(keys, some_blocks(2)) == Code.OK).all()
    store.check_integrity()


def test_parts_seal_when_the_last_is_done_and_stale_names_do_nothing(make_store: MakeStore) -> None:
    store = make_store()
    keys = some_keys(2)
    b = store.reserve_batch(keys, [100, 200])
    zeros = np.zeros(2, np.uint64)
    assert store.still_writing(b.slots, b.gens).all()
    assert (store.complete(b.slots, b.gens, 0, zeros) == Code.PENDING).all()
    assert not store.exists(keys).any()
    assert (store.complete(b.slots[:1], b.gens[:1], 1, zeros[:1]) == Code.OK).all()
    assert store.exists(keys).tolist() == [True, False]
    assert store.abort_batch(b.slots, b.gens, True).tolist() == [Code.STALE, Code.OK]
    assert (store.complete(b.slots, b.gens, 1, zeros) == Code.STALE).all()
    assert not store.still_writing(b.slots, b.gens).any()
    assert (store.acknowledge(b.slots, b.gens) == Code.STALE).all()
    store.check_integrity(deep=False)


def test_pinning_a_prefix_stops_at_the_first_gap(make_store: MakeStore) -> None:
    store = make_store()
    keys = some_keys(5)
    store.put(keys[[0, 1, 3, 4]], some_blocks(4))
    b = store.pin_batch(keys, prefix=True)
    assert b.codes.tolist() == [Code.OK, Code.OK, Code.MISSING, Code.MISSING, Code.MISSING]
    assert store.stats().pinned_slots == 2
    store.unpin(b.slots)
    assert store.stats().pinned_slots == 0


# ---- checksums -----------------------------------------------------------------------------------------------------


def test_verify_always_drops_a_damaged_block_and_it_can_be_stored_anew(make_store: MakeStore) -> None:
    store = make_store(verify="always")
    keys, blocks = some_keys(3), some_blocks(3)
    store.put(keys, blocks)
    flip_a_byte(store, keys[1])
    out = np.zeros_like(blocks)
    assert store.get_into(keys, out).tolist() == [Code.OK, Code.CORRUPT, Code.OK]
    assert store.exists(keys).tolist() == [True, False, True]
    assert store.stats().corrupt_blocks == 1
    assert store.put(keys, blocks).tolist() == [Code.EXISTS, Code.OK, Code.EXISTS]
    assert (store.get_into(keys, out) == Code.OK).all()
    assert (out == blocks).all()
    store.check_integrity()


def test_verify_never_returns_the_damage_so_the_check_is_what_finds_it(make_store: MakeStore) -> None:
    store = make_store(verify="never")
    keys, blocks = some_keys(1), some_blocks(1)
    store.put(keys, blocks)
    flip_a_byte(store, keys[0], at=777)
    out = np.zeros_like(blocks)
    assert store.get_into(keys, out).tolist() == [Code.OK]
    assert np.flatnonzero(out[0] != blocks[0]).tolist() == [777]
    b = store.pin_batch(keys)
    assert store.verify_parts(b.slots, b.gens, 0).tolist() == [Code.CORRUPT]
    store.unpin(b.slots)
    with pytest.raises(errors.IntegrityError):
        store.check_integrity()
    store.remove(keys)


# ---- the end -------------------------------------------------------------------------------------------------------


def test_after_close_every_call_says_so_and_the_pool_is_still_there(make_store: MakeStore) -> None:
    first, second = make_store(), make_store()
    keys, blocks = some_keys(2), some_blocks(2)
    first.put(keys, blocks)
    held = first.pin_batch(keys)
    assert second.remove(keys).tolist() == [Code.PINNED] * 2
    first.close()
    first.close()
    for call in (
        lambda: first.put(keys, blocks),
        lambda: first.get_into(keys, np.zeros_like(blocks)),
        lambda: first.exists(keys),
        lambda: first.match_prefix(keys),
        lambda: first.pin(keys),
        lambda: first.reserve(keys, 10),
        lambda: first.remove(keys),
        lambda: first.touch(keys),
        lambda: first.unpin(held.slots),
    ):
        with pytest.raises(errors.StoreClosedError):
            call()
    assert second.stats().clients == 1
    assert second.remove(keys).tolist() == [Code.OK] * 2


def test_stats_add_up(make_store: MakeStore) -> None:
    store = make_store()
    keys, blocks = some_keys(10), some_blocks(10)
    store.put(keys, blocks)
    store.remove(keys[:3])
    r = store.reserve(some_keys(2, seed=4), 100)
    s = store.stats()
    assert (s.sealed_blocks, s.sealed_bytes, s.stored_blocks, s.removed_blocks) == (7, 7 * BLOCK, 10, 3)
    assert (s.writing_slots, s.written_bytes, s.clients, s.sessions) == (2, 10 * BLOCK, 1, 1)
    assert s.size_bytes <= 32 << 20
    assert s.slabs * s.slab_bytes + s.table_bytes == s.size_bytes
    r.abort()
