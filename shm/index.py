"""Key → row: open addressing with linear probing and backward-shift deletion, in one table of 8-byte entries.

No tombstones: a table that has turned over many times looks a miss up as fast as a fresh one. An entry is the row
plus one in its low half and 31 bits of the key's hash in its high half; a key is compared in its row. Changes happen
under the pool lock between "dirty" marks. Readers need no lock: an entry is one aligned word, a row says itself
whether it is sealed, and while a deletion moves entries ``H_INDEX_SEQ`` is odd, so that a reader that missed knows to
look again.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import fence_acquire, load_acquire, prefetch, store_release
from kvplug.shm.failpoints import INDEX_SHIFT, fail
from kvplug.shm.jit import entry, kernel
from kvplug.shm.layout import (
    H_INDEX_CAP,
    H_INDEX_SEQ,
    H_N_ROWS,
    H_O_INDEX,
    H_O_PART,
    H_O_ROW,
    PART_WORDS,
    R_KEY,
    R_WORD,
    ROW_WORDS,
    SEALED,
    STATE_MASK,
)
from kvplug.shm.local import L_BASE
from kvplug.shm.xxh3 import wrap_add, wrap_mul

MISS_RETRIES = 3
ANNOUNCE_KEYS = 64
"""Keys that are looked up together: more cache misses under way at once than a core can have."""
ANNOUNCE_PROBES = 8


@entry("i(i, i, i, i)", late=True)
def key_hash(k0: int, k1: int, k2: int, k3: int) -> int:
    """Mix a key's four words into 63 bits. Keys are digests, but a caller may bring any 32 bytes."""
    # Multiplied and added modulo 2**64 on purpose: numba's own signed operators promise LLVM that nothing overflows.
    h = wrap_add(wrap_mul(k0, -7046029254386353131), wrap_mul(k1, -4417276706812531889))
    h = wrap_add(h ^ ((h >> 32) & 0xFFFFFFFF), wrap_mul(k2, -5435081209227447693))
    h = wrap_add(h, wrap_mul(k3, 1609587929392839161))
    h = wrap_mul(h ^ ((h >> 29) & 0x7FFFFFFFF), -4658895280553007687)
    h = wrap_mul(h ^ ((h >> 32) & 0xFFFFFFFF), -7723592293110705685)
    return (h ^ ((h >> 29) & 0x7FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF


@kernel
def find(T: Any, k0: int, k1: int, k2: int, k3: int) -> int:
    """Row that the index names for this key, or -1. What the row's state is, the caller looks at."""
    mask = T[H_INDEX_CAP] - 1
    base = T[H_O_INDEX]
    rows = T[H_O_ROW]
    n_rows = T[H_N_ROWS]
    h = key_hash(k0, k1, k2, k3)
    tag = h >> 32
    i = h & mask
    for _ in range(mask + 1):
        e = T[base + i]
        if e == 0:
            return -1
        if (e >> 32) == tag:
            row = (e & 0xFFFFFFFF) - 1
            if 0 <= row < n_rows:
                k = rows + row * ROW_WORDS + R_KEY
                if T[k] == k0 and T[k + 1] == k1 and T[k + 2] == k2 and T[k + 3] == k3:
                    return row
        i = (i + 1) & mask
    return -1


@kernel
def announce(T: Any, L: Any, keys: Any, begin: int, end: int) -> None:
    """Send for the index entries and rows of ``keys[begin:end]``, all at once, for the look-ups that follow.

    A cold look-up is two misses one after the other; those of different keys need not wait for each other. Pure hint.
    """
    base = L[L_BASE]
    mask = T[H_INDEX_CAP] - 1
    index = T[H_O_INDEX]
    rows = T[H_O_ROW]
    n_rows = T[H_N_ROWS]
    for i in range(begin, end):
        h = key_hash(keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        prefetch(base + 8 * (index + (h & mask)))
    for i in range(begin, end):
        h = key_hash(keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        tag = h >> 32
        at = h & mask
        for _ in range(ANNOUNCE_PROBES):
            e = T[index + at]
            if e == 0:
                break
            row = (e & 0xFFFFFFFF) - 1
            if (e >> 32) == tag and 0 <= row < n_rows:
                prefetch(base + 8 * (rows + row * ROW_WORDS))
                prefetch(base + 8 * (rows + row * ROW_WORDS + ROW_WORDS - 1))
                break
            at = (at + 1) & mask


@kernel
def announce_rows(T: Any, L: Any, slots: Any, begin: int, end: int) -> None:
    """The same for known rows: with their part entries and, once the rows are here, their index entries."""
    base = L[L_BASE]
    mask = T[H_INDEX_CAP] - 1
    index = T[H_O_INDEX]
    rows = T[H_O_ROW]
    parts = T[H_O_PART]
    n_rows = T[H_N_ROWS]
    for i in range(begin, end):
        if 0 <= slots[i] < n_rows:
            prefetch(base + 8 * (rows + slots[i] * ROW_WORDS))
            prefetch(base + 8 * (rows + slots[i] * ROW_WORDS + ROW_WORDS - 1))
            prefetch(base + 8 * (parts + slots[i] * PART_WORDS))
    for i in range(begin, end):
        if 0 <= slots[i] < n_rows:
            k = rows + slots[i] * ROW_WORDS + R_KEY
            prefetch(base + 8 * (index + (key_hash(T[k], T[k + 1], T[k + 2], T[k + 3]) & mask)))


@kernel
def find_sealed(T: Any, L: Any, k0: int, k1: int, k2: int, k3: int) -> Any:
    """(row, word) of the sealed block with this key, or (-1, 0). Needs no lock.

    The word is what the caller compares with after it has used the row: as long as it is the same, the slot is.
    """
    base = L[L_BASE]
    seq_at = base + 8 * H_INDEX_SEQ
    for _ in range(MISS_RETRIES):
        seq = load_acquire(seq_at)
        row = find(T, k0, k1, k2, k3)
        if row >= 0:
            r = T[H_O_ROW] + row * ROW_WORDS
            word = load_acquire(base + 8 * (r + R_WORD))
            if word & STATE_MASK == SEALED:
                k = r + R_KEY
                same = T[k] == k0 and T[k + 1] == k1 and T[k + 2] == k2 and T[k + 3] == k3
                fence_acquire()
                if same and load_acquire(base + 8 * (r + R_WORD)) == word:
                    return row, word
        fence_acquire()
        if seq & 1 == 0 and load_acquire(seq_at) == seq:
            break
    return -1, 0


@kernel
def insert(T: Any, row: int) -> bool:
    """Let the index name ``row`` for the key in it. False if it names another row for that key already."""
    r = T[H_O_ROW] + row * ROW_WORDS + R_KEY
    k0, k1, k2, k3 = T[r], T[r + 1], T[r + 2], T[r + 3]
    mask = T[H_INDEX_CAP] - 1
    base = T[H_O_INDEX]
    rows = T[H_O_ROW]
    h = key_hash(k0, k1, k2, k3)
    tag = h >> 32
    i = h & mask
    while True:  # ends: the table has at least a third more places than there are rows
        e = T[base + i]
        if e == 0:
            T[base + i] = (tag << 32) | (row + 1)
            return True
        if (e >> 32) == tag:
            k = rows + ((e & 0xFFFFFFFF) - 1) * ROW_WORDS + R_KEY
            if T[k] == k0 and T[k + 1] == k1 and T[k + 2] == k2 and T[k + 3] == k3:
                return False
        i = (i + 1) & mask


@kernel
def delete(T: Any, L: Any, row: int) -> bool:
    """Take ``row`` out of the index; its key must still be in it. False if the index did not name it."""
    mask = T[H_INDEX_CAP] - 1
    base = T[H_O_INDEX]
    rows = T[H_O_ROW]
    r = rows + row * ROW_WORDS + R_KEY
    h = key_hash(T[r], T[r + 1], T[r + 2], T[r + 3])
    i = h & mask
    want = ((h >> 32) << 32) | (row + 1)
    for _ in range(mask + 1):
        e = T[base + i]
        if e == want:
            break
        if e == 0:
            return False
        i = (i + 1) & mask
    seq_at = L[L_BASE] + 8 * H_INDEX_SEQ
    seq = T[H_INDEX_SEQ]
    store_release(seq_at, seq + 1)
    j = i
    while True:
        j = (j + 1) & mask
        e = T[base + j]
        if e == 0:
            break
        k = rows + ((e & 0xFFFFFFFF) - 1) * ROW_WORDS + R_KEY
        home = key_hash(T[k], T[k + 1], T[k + 2], T[k + 3]) & mask
        if ((j - home) & mask) >= ((j - i) & mask):
            T[base + i] = e
            fail(L, INDEX_SHIFT)
            i = j
    T[base + i] = 0
    store_release(seq_at, seq + 2)
    return True
