"""Slabs on the move: reserving memory behind the watermark, and draining one class's slab for another.

OWNED → DRAINING → FREE. A drain frees a slab's sealed, unpinned blocks in sections of bounded length; anyone may go
on with one that was begun; one that meets a pin or a writer is called off and its free slots are listed again.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import store_release
from kvplug.shm.evict import evict, is_pinned
from kvplug.shm.failpoints import DRAIN_EMPTY, DRAIN_STARTED, WATERMARK, fail
from kvplug.shm.jit import entry
from kvplug.shm.layout import (
    E_EVICTED,
    FREE,
    H_C_SLAB_MOVES,
    H_DRAINING,
    H_N_SLABS,
    H_ROWS_PER_SLAB,
    H_WATERMARK,
    R_WORD,
    S_NSLOTS,
    S_ROW_STEP,
    S_STATE,
    S_STRIDE,
    SEALED,
    SLAB_DRAINING,
    SLAB_FREE,
    SLAB_OWNED,
    STATE_MASK,
)
from kvplug.shm.lists import give_back_slab, list_slab, push_free_slab, unlink
from kvplug.shm.local import L_BASE
from kvplug.shm.lock import clean, dirty, enter, leave
from kvplug.shm.places import row_at, slab_at

DRAIN_SLOTS_A_SECTION = 1024
NOT_BEGUN = -1
DRAIN_DONE = 1
DRAIN_GOES_ON = 2
DRAIN_CALLED_OFF = 3


@entry("i(I, I, i)")
def raise_watermark(T: Any, L: Any, slab: int) -> int:
    """The memory of ``slab`` is reserved: hand it out. No effect if somebody else was faster. 0 or a lock code."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    fail(L, WATERMARK)
    if T[H_WATERMARK] == slab and slab < T[H_N_SLABS]:
        dirty(T, L)
        store_release(L[L_BASE] + 8 * (slab_at(T, slab) + S_STATE), SLAB_FREE)
        T[H_WATERMARK] = slab + 1
        push_free_slab(T, slab)
        clean(T, L)
    leave(T, L)
    return 0


@entry("i(I, I, i, i)")
def drain_step(T: Any, L: Any, wanted: int, stride: int) -> int:
    """Begin to drain slab ``wanted`` (or go on with the one that is being drained); DRAIN_* or a lock code.

    ``stride`` is that of the class in need: a slab of that stride is not drained. ``wanted`` NOT_BEGUN only goes on.
    """
    lock = enter(T, L)
    if lock < 0:
        return lock
    dirty(T, L)
    slab = T[H_DRAINING] - 1
    if slab < 0:
        s = slab_at(T, max(wanted, 0))
        if wanted < 0 or T[s + S_STATE] != SLAB_OWNED or T[s + S_STRIDE] == stride:
            clean(T, L)
            leave(T, L)
            return DRAIN_CALLED_OFF
        slab = wanted
        unlink(T, slab)
        store_release(L[L_BASE] + 8 * (s + S_STATE), SLAB_DRAINING)
        T[H_DRAINING] = slab + 1
        fail(L, DRAIN_STARTED)
    s = slab_at(T, slab)
    rps = T[H_ROWS_PER_SLAB]
    result = DRAIN_DONE
    evicted = 0
    for i in range(T[s + S_NSLOTS]):
        row = slab * rps + i * T[s + S_ROW_STEP]
        state = T[row_at(T, row) + R_WORD] & STATE_MASK
        if state == FREE:
            continue
        if state != SEALED or is_pinned(T, row):
            result = DRAIN_CALLED_OFF
            break
        if evicted >= DRAIN_SLOTS_A_SECTION:
            result = DRAIN_GOES_ON
            break
        evicted += 1 + evict(T, L, row, E_EVICTED)
    if result == DRAIN_DONE:
        fail(L, DRAIN_EMPTY)
        T[H_DRAINING] = 0
        give_back_slab(T, L, slab)
        T[H_C_SLAB_MOVES] += 1
    elif result == DRAIN_CALLED_OFF:
        T[H_DRAINING] = 0
        store_release(L[L_BASE] + 8 * (s + S_STATE), SLAB_OWNED)
        list_slab(T, L, slab)
    clean(T, L)
    leave(T, L)
    return result
