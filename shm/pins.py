"""Pins: a sealed slot under a pin stays where it is until the pin is released or its session is gone.

Each client has one bit in every slot. How often this process has pinned a slot is counted in its own memory
(``counts``); the shared bit changes only between none and some, under the lock. A batch is looked up once without the
lock, which brings its lines into the cache, and then looked up again under it: the section is short also for 2048
cold keys.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import load_acquire
from kvplug.shm.bits import bit_of, word_of
from kvplug.shm.codes import BUDGET, MISSING, OK
from kvplug.shm.failpoints import PINNED_BIT, UNPINNED_BIT, fail
from kvplug.shm.index import ANNOUNCE_KEYS, announce, announce_rows, find, find_sealed
from kvplug.shm.jit import entry
from kvplug.shm.layout import (
    C_PINS,
    CLIENT_WORDS,
    GEN_SHIFT,
    H_N_ROWS,
    H_O_CLIENT,
    H_ROWS_PER_SLAB,
    H_TICK,
    R_PIN,
    R_SIZE,
    R_TICK,
    R_WORD,
    S_ROW_STEP,
    SEALED,
    SIZE_MASK,
    STATE_MASK,
)
from kvplug.shm.local import L_BASE, L_CLIENT, L_PIN_BUDGET, L_TOUCH
from kvplug.shm.lock import clean, dirty, enter, leave
from kvplug.shm.places import row_at, slab_at, slot_offset
from kvplug.shm.write import DONE, TOUCH_NONE, tick_of

SECTION_KEYS = 512


@entry("i(I, I, I32, K, b, b, I8, I, I, I, I)")
def pin(
    T: Any, L: Any, counts: Any, keys: Any, prefix: bool, touch: bool,
    codes: Any, rows: Any, gens: Any, offsets: Any, nbytes: Any,
) -> int:  # fmt: skip
    """Pin the sealed blocks with these keys (``prefix``: only up to the first miss). Leading hits, or a lock code.

    ``touch``: this is a use of them, which dates them. After a lock code, keys before the first one whose ``rows``
    entry is negative are pinned: the caller releases them.
    """
    n = keys.shape[0]
    warm = n
    for i in range(n):
        codes[i] = MISSING
        rows[i] = -1
        if i % ANNOUNCE_KEYS == 0:
            announce(T, L, keys, i, min(i + ANNOUNCE_KEYS, n))
        row, _ = find_sealed(T, L, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        if row < 0 and prefix:
            warm = i
            break
    bit = bit_of(L[L_CLIENT])
    w = R_PIN + word_of(L[L_CLIENT])
    mine = T[H_O_CLIENT] + L[L_CLIENT] * CLIENT_WORDS + C_PINS
    first = T[H_TICK] + 1
    T[H_TICK] += n
    leading = -1
    begin = 0
    while begin < warm:
        end = min(begin + SECTION_KEYS, warm)
        lock = enter(T, L)
        if lock < 0:
            return lock
        dirty(T, L)  # for the client's count of pins, which a rebuild takes from the bits
        for i in range(begin, end):
            row = find(T, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
            r = row_at(T, row)
            if row < 0 or T[r + R_WORD] & STATE_MASK != SEALED:
                if leading < 0:
                    leading = i
                if prefix:
                    break
                continue
            if counts[row] == 0:
                step = T[slab_at(T, row // T[H_ROWS_PER_SLAB]) + S_ROW_STEP]
                if T[mine] > 0 and (T[mine] + 1) * step > L[L_PIN_BUDGET]:
                    codes[i] = BUDGET
                    if leading < 0:
                        leading = i
                    if prefix:
                        break
                    continue
                T[r + w] |= bit
                fail(L, PINNED_BIT)
                T[mine] += 1
            counts[row] += 1
            if touch and L[L_TOUCH] != TOUCH_NONE:
                T[r + R_TICK] = tick_of(first, n, i, L[L_TOUCH])
            codes[i] = OK
            rows[i] = row
            gens[i] = T[r + R_WORD] >> GEN_SHIFT
            offsets[i] = slot_offset(T, row)
            nbytes[i] = T[r + R_SIZE] & SIZE_MASK
        clean(T, L)
        leave(T, L)
        if prefix and leading >= 0:
            break
        begin = end
    return leading if leading >= 0 else warm


@entry("i(I, I, I32, I, B)")
def unpin(T: Any, L: Any, counts: Any, rows: Any, which: Any) -> int:
    """Release a pin of each of ``rows`` that is not negative, where ``which`` says so, in as many sections as it takes.

    0 or a lock code. Those that were released are DONE, so that none is released twice.
    """
    n = rows.shape[0]
    bit = bit_of(L[L_CLIENT])
    w = R_PIN + word_of(L[L_CLIENT])
    mine = T[H_O_CLIENT] + L[L_CLIENT] * CLIENT_WORDS + C_PINS
    begin = 0
    while begin < n:
        end = min(begin + SECTION_KEYS, n)
        announce_rows(T, L, rows, begin, end)
        lock = enter(T, L)
        if lock < 0:
            return lock
        dirty(T, L)
        for i in range(begin, end):
            row = rows[i]
            if row < 0 or row >= T[H_N_ROWS] or not which[i]:
                continue
            rows[i] = DONE
            if counts[row] == 0:
                continue
            counts[row] -= 1
            if counts[row] == 0:
                T[row_at(T, row) + w] &= ~bit
                fail(L, UNPINNED_BIT)
                T[mine] -= 1
        clean(T, L)
        leave(T, L)
        begin = end
    return 0


@entry("v(I, I, I, I, B)")
def still_sealed(T: Any, L: Any, rows: Any, gens: Any, out: Any) -> None:
    """Whether each (slot, generation) is still the sealed block that it was. No lock."""
    for i in range(rows.shape[0]):
        row = rows[i]
        out[i] = (
            0 <= row < T[H_N_ROWS]
            and load_acquire(L[L_BASE] + 8 * (row_at(T, row) + R_WORD)) == (gens[i] << GEN_SHIFT) | SEALED
        )
