"""What happens between two steps of one call: others' work there, put in by hand, must do no harm.

Each test stands for an instant of a few instructions that no kill and no scheduler can be relied on to hit.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable

import numpy as np

from kvplug import KvStore
from kvplug.errors import Code
from kvplug.shm import layout as lay
from kvplug.shm.victims import VictimFinder, Victims
from tests.inside import pool_of
from tests.pool.children import Child, another, blocks, check_bytes, fill, keys, put, quiet

SMALL, LARGE = 16 << 10, 64 << 10
PROT_NONE = 0


def rows_of(store: KvStore) -> np.ndarray:
    """The slot rows, (rows, ROW_WORDS)."""
    g = pool_of(store).geometry
    return pool_of(store).T[g.o_row : g.o_row + g.n_rows * lay.ROW_WORDS].reshape(-1, lay.ROW_WORDS)


def slabs_of(store: KvStore) -> np.ndarray:
    """The slab entries, (slabs, SLAB_WORDS)."""
    g = pool_of(store).geometry
    return pool_of(store).T[g.o_slab : g.o_slab + g.n_slabs * lay.SLAB_WORDS].reshape(-1, lay.SLAB_WORDS)


def test_a_victim_whose_slab_was_cut_anew_during_the_scan_is_not_taken(make_store: Callable[..., KvStore]) -> None:
    """A scan of large blocks that met a slab of small ones: their words are current, their slots too small."""
    store = quiet(make_store())
    large = fill(store, LARGE, 1)
    small = keys(24, 2)
    assert (put(store, small, SMALL) == 0).all()  # takes a slab from the large ones
    small = small[store.exists(small)]
    rows = rows_of(store)
    slabs = slabs_of(store)
    rps = pool_of(store).geometry.rows_per_slab
    sealed = np.flatnonzero(rows[:, lay.R_WORD] & lay.STATE_MASK == lay.SEALED)
    foreign = sealed[slabs[sealed // rps, lay.S_STRIDE] == SMALL]
    assert len(foreign) == len(small) > 0
    finder = VictimFinder(pool_of(store).T, pool_of(store).L, pool_of(store).geometry, pool_of(store).policy)
    pool_of(store)._finders[threading.get_ident()] = finder
    finder._by_stride[LARGE] = Victims(
        foreign, rows[foreign, lay.R_WORD].copy(), rows[foreign, lay.R_TICK].copy(), np.zeros(1, np.int64)
    )
    new = keys(12, 3)
    put(store, new, LARGE)
    check_bytes(store, small, SMALL, may_miss=True)
    check_bytes(store, new, LARGE, may_miss=True)
    check_bytes(store, large, LARGE, may_miss=True)
    assert store.exists(small).all(), "a block of another class was evicted for one that does not fit its slot"
    store.check_integrity(deep=True)


def test_a_checked_read_of_a_slot_in_reuse_stays_inside_the_callers_buffer(make_store: Callable[..., KvStore]) -> None:
    """The next block's parts are written over this one's while it is being read: they may be larger."""
    store = quiet(make_store(verify="always"))
    key = keys(1, 4)
    assert put(store, key, SMALL)[0] == 0
    g = pool_of(store).geometry
    row = int(np.flatnonzero(rows_of(store)[:, lay.R_WORD] & lay.STATE_MASK == lay.SEALED)[0])

    def body() -> None:
        own = another(store)
        page = mmap.mmap(-1, SMALL + mmap.PAGESIZE)
        buffer = np.frombuffer(page, np.uint8)
        end = ctypes.c_void_p(int(buffer.ctypes.data) + SMALL)
        assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, PROT_NONE) == 0
        pool_of(own).T[g.o_part + row * lay.PART_WORDS] = 8 * SMALL
        assert own.get_into(key, [buffer[:SMALL]])[0] == Code.CORRUPT

    assert Child(body).wait() == 0, "it read past the buffer"


def test_a_death_between_a_slabs_state_and_the_watermark_hands_the_slab_out_once(
    make_store: Callable[..., KvStore],
) -> None:
    """Both orders that the two words can be found in after a death."""
    for raised in (False, True):
        store = quiet(make_store(prefault=False, pool=f"{make_store().pool_name}-{int(raised)}"))
        T = pool_of(store).T
        slab = int(T[lay.H_WATERMARK])
        if raised:
            T[lay.H_WATERMARK] = slab + 1
        else:
            slabs_of(store)[slab, lay.S_STATE] = lay.SLAB_FREE
        T[lay.H_DIRTY] = 1
        store.check_integrity()  # rebuilds
        while pool_of(store).grow():
            store.check_integrity()
        kept = fill(store, SMALL, 5)
        assert store.exists(kept).all()
        assert check_bytes(store, kept, SMALL) == len(kept)
        store.check_integrity(deep=True)
        store.close()


def test_blocks_right() -> None:
    """The content that these tests compare with differs from key to key."""
    a, b = blocks(keys(2, 9), SMALL)
    assert (a != b).mean() > 0.9
