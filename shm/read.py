"""Reading without the lock: exists, match_prefix, get_into.

A reader notes the slot's word, uses the slot, and looks at the word again behind an acquire fence. Every change of a
slot steps its generation *before* anything in it changes, so the same word twice means that the slot held that sealed
block all along; another word means a miss. Readers therefore never wait, for nobody: not for a busy lock, nor for a
stopped holder.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import fence_acquire, load_acquire
from kvplug.shm.codes import CORRUPT, MISSING, OK, SIZE, STALE
from kvplug.shm.copy import STREAM_BYTES, copy_out, sum_of
from kvplug.shm.index import ANNOUNCE_KEYS, announce, find_sealed
from kvplug.shm.jit import entry, kernel
from kvplug.shm.layout import (
    C_CORRUPT,
    C_HITS,
    C_MISSES,
    C_READ_BYTES,
    CLIENT_WORDS,
    GEN_SHIFT,
    H_N_ROWS,
    H_O_CLIENT,
    H_O_PART,
    H_SEGMENT_BYTES,
    H_TICK,
    PART_ALIGN_BYTES,
    PART_NBYTES,
    PART_WORDS,
    PART_XXH3,
    R_SIZE,
    R_TICK,
    R_WORD,
    SEALED,
    SIZE_MASK,
)
from kvplug.shm.local import L_BASE, L_CLIENT, L_TOUCH, L_VERIFY
from kvplug.shm.places import parts_of, row_at, slot_offset
from kvplug.shm.write import TOUCH_NONE, tick_of
from kvplug.shm.xxh3 import xxh3_64


@entry("v(I, I, K, B)")
def exists(T: Any, L: Any, keys: Any, out: Any) -> None:
    """Whether a sealed block with each key is there."""
    for i in range(keys.shape[0]):
        if i % ANNOUNCE_KEYS == 0:
            announce(T, L, keys, i, min(i + ANNOUNCE_KEYS, keys.shape[0]))
        row, _ = find_sealed(T, L, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        out[i] = row >= 0


@entry("i(I, I, K)")
def match_prefix(T: Any, L: Any, keys: Any) -> int:
    """Number of leading keys that have a sealed block."""
    for i in range(keys.shape[0]):
        if i % ANNOUNCE_KEYS == 0:
            announce(T, L, keys, i, min(i + ANNOUNCE_KEYS, keys.shape[0]))
        row, _ = find_sealed(T, L, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        if row < 0:
            return i
    return keys.shape[0]


@entry("v(I, I, K)")
def touch(T: Any, L: Any, keys: Any) -> None:
    """Make the blocks with these keys, head of a prefix first, the most recently used."""
    n = keys.shape[0]
    first = T[H_TICK] + 1
    T[H_TICK] += n
    for i in range(n):
        if i % ANNOUNCE_KEYS == 0:
            announce(T, L, keys, i, min(i + ANNOUNCE_KEYS, n))
        row, _ = find_sealed(T, L, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        if row >= 0 and L[L_TOUCH] != TOUCH_NONE:
            T[row_at(T, row) + R_TICK] = tick_of(first, n, i, L[L_TOUCH])


@kernel
def bytes_match(T: Any, row: int, addr: int, size: int) -> bool:
    """Whether the ``size`` bytes at ``addr``, the payload, have the checksums of the slot's parts.

    Without the lock the slot may be another block's meanwhile, with larger parts: nothing past ``size`` is read.
    """
    n_parts = parts_of(T, row)
    p0 = T[H_O_PART] + row * PART_WORDS
    at = 0
    for p in range(n_parts):
        nbytes = T[p0 + p * PART_WORDS + PART_NBYTES]
        if nbytes < 0 or at + nbytes > size:
            return False
        if xxh3_64(addr + at, nbytes) != T[p0 + p * PART_WORDS + PART_XXH3]:
            return False
        at += (nbytes + PART_ALIGN_BYTES - 1) // PART_ALIGN_BYTES * PART_ALIGN_BYTES
    return True


@kernel
def _scatter(
    src: int, size: int, dst_addrs: Any, dst_nbytes: Any, begin: int, end: int, after: int, stream: bool
) -> None:
    """Copy ``size`` bytes to fragments ``begin`` … ``end`` - 1, as far as they reach; ``after``: what is read next."""
    last = src + size
    for f in range(begin, end):
        until = min(src + dst_nbytes[f], last)
        copy_out(dst_addrs[f], src, until - src, until if until < last else after, stream)
        src = until


@entry("i(I, I, K, I, I, I, i, I8, I, I, I)")
def get_into(
    T: Any,
    L: Any,
    keys: Any,
    offsets: Any,
    dst_addrs: Any,
    dst_nbytes: Any,
    exact: int,
    codes: Any,
    rows: Any,
    words: Any,
    copied: Any,
) -> int:
    """Copy each key's block to its fragments ``offsets[i] … offsets[i+1]-1``, one after another; the number of hits.

    ``exact``: 0: fragments may have more room than the block has bytes; what is behind these stays as it is.
    ``rows``/``words`` name the block that was read, for the caller to drop one whose code says CORRUPT; ``copied`` is
    its length. A destination's content counts only where the code is OK.
    """
    n = keys.shape[0]
    base = L[L_BASE]
    me = T[H_O_CLIENT] + L[L_CLIENT] * CLIENT_WORDS
    first = T[H_TICK] + 1
    T[H_TICK] += n
    stream = sum_of(dst_nbytes, 0, len(dst_nbytes)) >= STREAM_BYTES
    hits, total = 0, 0
    for i in range(n):
        if i % ANNOUNCE_KEYS == 0:
            looked_up = min(i + ANNOUNCE_KEYS, n)
            announce(T, L, keys, i, looked_up)
            for j in range(i, looked_up):
                rows[j], words[j] = find_sealed(T, L, keys[j, 0], keys[j, 1], keys[j, 2], keys[j, 3])
        codes[i] = MISSING
        row, word = rows[i], words[i]
        if row < 0:
            continue
        r = row_at(T, row)
        size = T[r + R_SIZE] & SIZE_MASK
        offset = slot_offset(T, row)
        after = slot_offset(T, rows[i + 1]) if i + 1 < looked_up and rows[i + 1] >= 0 else offset
        room = 0
        for f in range(offsets[i], offsets[i + 1]):
            room += dst_nbytes[f]
        ok = True
        fits = size == room or (exact == 0 and size < room)
        fits = fits and offset > 0 and offset + size <= T[H_SEGMENT_BYTES]
        if fits:
            _scatter(base + offset, size, dst_addrs, dst_nbytes, offsets[i], offsets[i + 1], base + after, stream)
            if L[L_VERIFY] != 0:  # after the copy: what is wrong in the copy was wrong in the slot, and still is
                ok = bytes_match(T, row, base + offset, size)
        fence_acquire()
        if load_acquire(base + 8 * (r + R_WORD)) != word:
            continue
        if not fits:
            codes[i] = SIZE
        elif not ok:
            codes[i] = CORRUPT
            T[me + C_CORRUPT] += 1
        else:
            codes[i] = OK
            copied[i] = size
            hits += 1
            total += size
            if L[L_TOUCH] != TOUCH_NONE:
                T[r + R_TICK] = tick_of(first, n, i, L[L_TOUCH])
    T[me + C_HITS] += hits
    T[me + C_MISSES] += n - hits
    T[me + C_READ_BYTES] += total
    return hits


@entry("v(I, I, I, I, i, I8)")
def verify_part(T: Any, L: Any, rows: Any, gens: Any, part: int, codes: Any) -> None:
    """Check one part of each pinned block in place: OK, CORRUPT or STALE."""
    base = L[L_BASE]
    for i in range(rows.shape[0]):
        row = rows[i]
        codes[i] = STALE
        if row < 0 or row >= T[H_N_ROWS]:
            continue
        r = row_at(T, row)
        word = load_acquire(base + 8 * (r + R_WORD))
        if word != (gens[i] << GEN_SHIFT) | SEALED:
            continue
        n_parts = parts_of(T, row)
        if part < 0 or part >= n_parts:
            continue
        p0 = T[H_O_PART] + row * PART_WORDS
        at = slot_offset(T, row)
        for p in range(part):
            at += (T[p0 + p * PART_WORDS + PART_NBYTES] + PART_ALIGN_BYTES - 1) // PART_ALIGN_BYTES * PART_ALIGN_BYTES
        nbytes = T[p0 + part * PART_WORDS + PART_NBYTES]
        if at <= 0 or at + nbytes > T[H_SEGMENT_BYTES]:
            continue
        same = xxh3_64(base + at, nbytes) == T[p0 + part * PART_WORDS + PART_XXH3]
        fence_acquire()
        if load_acquire(base + 8 * (r + R_WORD)) == word:
            codes[i] = OK if same else CORRUPT
