"""Everything derived, made anew from slab states and slot words after a process died inside a section.

What a death can leave behind is listed in docs/pool.md. The slot words and slab states are commits: each is one aligned
store, so each says what was or what is, never something in between. Index, free lists, class lists and counters are
derived from them. Running this twice, or dying in it, changes nothing: the dirty mark stays until it is complete.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import store_release
from kvplug.shm.failpoints import REBUILD_CLEARED, REBUILD_HALF, fail
from kvplug.shm.index import insert
from kvplug.shm.jit import kernel
from kvplug.shm.layout import (
    C_PINS,
    C_RESERVED,
    CLASS_WORDS,
    CLIENT_WORDS,
    FREE,
    GEN_SHIFT,
    H_C_REBUILDS,
    H_DRAINING,
    H_EPOCH,
    H_FREE_SLABS,
    H_INDEX_CAP,
    H_INDEX_SEQ,
    H_MAX_CLIENTS,
    H_N_SLABS,
    H_O_CLASS,
    H_O_CLIENT,
    H_O_INDEX,
    H_ROWS_PER_SLAB,
    H_SLAB_BYTES,
    H_WATERMARK,
    K_HEAD,
    K_SLABS,
    K_STRIDE,
    MAX_CLASSES,
    PIN_WORDS,
    R_DONE,
    R_NEXT,
    R_PIN,
    R_WORD,
    S_CLASS,
    S_FREE_COUNT,
    S_FREE_HEAD,
    S_LISTED,
    S_NSLOTS,
    S_ROW_STEP,
    S_STATE,
    S_STRIDE,
    SEALED,
    SLAB_DRAINING,
    SLAB_FREE,
    SLAB_OWNED,
    SLAB_UNRESERVED,
    STATE_MASK,
    WRITING,
)
from kvplug.shm.lists import class_of, push_free_slab, push_free_slot, set_free
from kvplug.shm.local import L_BASE
from kvplug.shm.places import parts_of, row_at, slab_at


@kernel
def _rebuild_slot(T: Any, L: Any, row: int) -> None:
    r = row_at(T, row)
    state = T[r + R_WORD] & STATE_MASK
    if state == WRITING:
        n_parts = parts_of(T, row)
        if n_parts > 0 and T[r + R_DONE] == (1 << n_parts) - 1:
            # Every part and checksum is in place; only the seal is missing.
            store_release(L[L_BASE] + 8 * (r + R_WORD), (((T[r + R_WORD] >> GEN_SHIFT) + 1) << GEN_SHIFT) | SEALED)
            state = SEALED
        else:
            owner = T[r + R_NEXT]
            if 0 <= owner < T[H_MAX_CLIENTS]:
                T[T[H_O_CLIENT] + owner * CLIENT_WORDS + C_RESERVED] += 1
    if (state == WRITING or state == SEALED) and not insert(T, row):
        set_free(T, L, row)  # another row has the key: this one was on its way out
        state = FREE
    if state == FREE:
        for w in range(PIN_WORDS):
            T[r + R_PIN + w] = 0
        push_free_slot(T, row)
        return
    for w in range(PIN_WORDS):
        bits = T[r + R_PIN + w]
        c = 0
        while bits != 0 and c < 64:
            if bits & 1:
                T[T[H_O_CLIENT] + (w * 64 + c) * CLIENT_WORDS + C_PINS] += 1
            bits = (bits >> 1) & 0x7FFFFFFFFFFFFFFF
            c += 1


@kernel
def rebuild(T: Any, L: Any) -> None:
    """Make index, lists and counters anew. The caller holds the lock and has found the pool dirty."""
    rps = T[H_ROWS_PER_SLAB]
    n_slabs = T[H_N_SLABS]
    T[H_INDEX_SEQ] |= 1
    base = T[H_O_INDEX]
    for i in range(T[H_INDEX_CAP]):
        T[base + i] = 0
    fail(L, REBUILD_CLEARED)
    for c in range(MAX_CLASSES):
        k = T[H_O_CLASS] + c * CLASS_WORDS
        T[k + K_STRIDE] = 0
        T[k + K_HEAD] = 0
        T[k + K_SLABS] = 0
    for c in range(T[H_MAX_CLIENTS]):
        T[T[H_O_CLIENT] + c * CLIENT_WORDS + C_PINS] = 0
        T[T[H_O_CLIENT] + c * CLIENT_WORDS + C_RESERVED] = 0
    T[H_FREE_SLABS] = 0
    T[H_DRAINING] = 0
    for slab in range(n_slabs - 1, -1, -1):
        if slab == n_slabs // 2:
            fail(L, REBUILD_HALF)
        s = slab_at(T, slab)
        state = T[s + S_STATE]
        if state == SLAB_FREE and slab >= T[H_WATERMARK]:  # a death before the watermark was raised over it
            state = SLAB_UNRESERVED
            T[s + S_STATE] = state
        T[s + S_LISTED] = 0
        T[s + S_FREE_HEAD] = 0
        T[s + S_FREE_COUNT] = 0
        if state == SLAB_UNRESERVED:
            if slab < T[H_WATERMARK]:
                T[s + S_STATE] = SLAB_FREE
                push_free_slab(T, slab)
            continue
        if state == SLAB_FREE:
            push_free_slab(T, slab)
            continue
        if state == SLAB_DRAINING:  # a drain that died is undone; whoever needs the slab starts it again
            T[s + S_STATE] = SLAB_OWNED
        cls = class_of(T, T[s + S_STRIDE])
        T[s + S_CLASS] = cls
        T[T[H_O_CLASS] + cls * CLASS_WORDS + K_SLABS] += 1
        T[s + S_NSLOTS] = T[H_SLAB_BYTES] // T[s + S_STRIDE]
        T[s + S_ROW_STEP] = rps // T[s + S_NSLOTS]
        for i in range(T[s + S_NSLOTS] - 1, -1, -1):
            _rebuild_slot(T, L, slab * rps + i * T[s + S_ROW_STEP])
    T[H_EPOCH] += 1
    T[H_C_REBUILDS] += 1
    T[H_INDEX_SEQ] += 1
