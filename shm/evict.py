"""SEALED → FREE: a block leaves the pool, and its siblings leave with it.

A block may be one of several that are worth nothing without each other: the same span of tokens, as each rank of an
engine has stored it. Its row says how many there are and which one it is. A sibling's key is the same key with the last
two bytes XORed with both numbers (kvplug.keys.fold puts the shard there), so that siblings are found through the index
and need no table of their own.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import prefetch
from kvplug.shm.events import emit
from kvplug.shm.failpoints import EVICT_UNINDEXED, EVICT_WORD, fail
from kvplug.shm.index import delete, find, key_hash
from kvplug.shm.jit import kernel
from kvplug.shm.layout import (
    E_EVICTED,
    H_C_EVICTED,
    H_C_REMOVED,
    H_INDEX_CAP,
    H_N_ROWS,
    H_O_INDEX,
    PIN_WORDS,
    R_KEY,
    R_PIN,
    R_SIZE,
    R_WORD,
    SEALED,
    SIBLING_BITS,
    SIBLING_KEY_SHIFT,
    SIBLING_MASK,
    SIBLING_SHIFT,
    STATE_MASK,
)
from kvplug.shm.lists import release_slot, set_free
from kvplug.shm.local import L_BASE
from kvplug.shm.places import row_at

SIBLINGS_A_SECTION = 1024
"""Siblings looked up before a section lets others in: a victim may have 127 of them."""


@kernel
def is_pinned(T: Any, row: int) -> bool:
    """Whether any client holds a pin on the slot."""
    r = row_at(T, row)
    for w in range(PIN_WORDS):
        if T[r + R_PIN + w] != 0:
            return True
    return False


@kernel
def _next_sibling(T: Any, row: int, other: int) -> Any:
    """(number, row) of the first sibling from number ``other`` on that is sealed and unpinned; row -1: none."""
    r = row_at(T, row)
    which = T[r + R_SIZE] >> SIBLING_SHIFT
    last = which >> SIBLING_BITS
    index = which & SIBLING_MASK
    while other <= last:
        if other != index:
            k3 = T[r + R_KEY + 3] ^ ((index ^ other) << SIBLING_KEY_SHIFT)
            sibling = find(T, T[r + R_KEY], T[r + R_KEY + 1], T[r + R_KEY + 2], k3)
            if sibling >= 0:
                s = row_at(T, sibling)
                named = T[s + R_SIZE] >> SIBLING_SHIFT == (last << SIBLING_BITS) | other
                if named and T[s + R_WORD] & STATE_MASK == SEALED and not is_pinned(T, sibling):
                    return other, sibling
        other += 1
    return other, -1


@kernel
def evict(T: Any, L: Any, row: int, kind: int) -> int:
    """SEALED → FREE, out of the index, on no list; then those of its siblings that are sealed and unpinned, listed.

    The caller has checked the block's own pins and marked the pool dirty. Returns how many siblings were looked up.
    """
    which = T[row_at(T, row) + R_SIZE] >> SIBLING_SHIFT
    victim = row
    other = -1
    while True:  # one body for all: a second call of it would be inlined nowhere
        emit(T, L, kind, victim)
        set_free(T, L, victim)
        fail(L, EVICT_WORD)
        delete(T, L, victim)
        fail(L, EVICT_UNINDEXED)
        T[H_C_EVICTED if kind == E_EVICTED else H_C_REMOVED] += 1
        if which == 0:
            return 0
        if victim != row:
            release_slot(T, L, victim)
        other, victim = _next_sibling(T, row, other + 1)
        if victim < 0:
            return which >> SIBLING_BITS


@kernel
def announce_siblings(T: Any, L: Any, slots: Any, begin: int, end: int) -> None:
    """Send for the index entries of these slots' siblings, before the lock is taken. Pure hint."""
    base = L[L_BASE]
    mask = T[H_INDEX_CAP] - 1
    index_at = T[H_O_INDEX]
    n_rows = T[H_N_ROWS]
    for i in range(begin, end):
        if not 0 <= slots[i] < n_rows:
            continue
        r = row_at(T, slots[i])
        which = T[r + R_SIZE] >> SIBLING_SHIFT
        if which == 0:
            continue
        index = which & SIBLING_MASK
        for other in range((which >> SIBLING_BITS) + 1):
            if other != index:
                k3 = T[r + R_KEY + 3] ^ ((index ^ other) << SIBLING_KEY_SHIFT)
                h = key_hash(T[r + R_KEY], T[r + R_KEY + 1], T[r + R_KEY + 2], k3)
                prefetch(base + 8 * (index_at + (h & mask)))
