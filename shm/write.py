"""The sections that change slots: reserve, complete, abort, acknowledge, remove.

FREE → WRITING → SEALED → FREE, or WRITING → QUARANTINED → FREE. The slot's word is the commit of each step: fields go
before it when the slot gains a meaning, the word goes first when it loses one. docs/pool.md has the table of what a
death at each point leaves behind.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import fence_release, load_acquire, now_ns, store_release
from kvplug.shm.codes import BUDGET, EXISTS, IN_PROGRESS, MISSING, OK, PENDING, PINNED, STALE
from kvplug.shm.events import emit
from kvplug.shm.evict import SIBLINGS_A_SECTION, announce_siblings, evict, is_pinned
from kvplug.shm.failpoints import (
    ABORT_UNINDEXED,
    ABORT_WORD,
    ACK_WORD,
    PART_DONE,
    PART_RECORDED,
    RESERVE_FIELDS,
    RESERVE_INDEXED,
    RESERVE_WORD,
    SEALED_WORD,
    fail,
)
from kvplug.shm.index import announce, announce_rows, delete, find, insert
from kvplug.shm.jit import entry, kernel
from kvplug.shm.layout import (
    C_RESERVED,
    CLIENT_WORDS,
    E_CLEARED,
    E_EVICTED,
    E_SEALED,
    GEN_SHIFT,
    H_C_ABORTED,
    H_C_FULL,
    H_C_QUARANTINED,
    H_C_RELEASED,
    H_C_SEALED,
    H_GRACE_NS,
    H_MAX_CLIENTS,
    H_MIN_BLOCK,
    H_N_ROWS,
    H_O_CLIENT,
    H_O_PART,
    MAX_CLASSES,
    PART_NBYTES,
    PART_WORDS,
    PART_XXH3,
    PIN_WORDS,
    QUARANTINED,
    R_DONE,
    R_KEY,
    R_NEXT,
    R_PIN,
    R_SESSION,
    R_SIZE,
    R_TICK,
    R_WORD,
    SEALED,
    SIZE_BITS,
    STATE_MASK,
    WRITING,
)
from kvplug.shm.lists import class_of, pop_free_slot, release_slot, set_free, take_free_slab
from kvplug.shm.local import L_BASE, L_CLIENT, L_RESERVE_BUDGET, L_SESSION, L_TOUCH
from kvplug.shm.lock import clean, dirty, enter, give_way, leave
from kvplug.shm.places import is_slot_of, parts_of, row_at, slot_offset

DONE = -1
"""What :func:`complete`, :func:`abort`, :func:`acknowledge` and pins.unpin leave in their array of rows: an entry was
dealt with. So a caller that was interrupted before it could note that they had run may run them again."""

TOUCH_NONE = 0
TOUCH_HEAD_FIRST = 1
TOUCH_TAIL_FIRST = 2


@kernel
def tick_of(first: int, n: int, i: int, order: int) -> int:
    """Recency of the i-th of n keys of a batch: a later tick is evicted later."""
    if order == TOUCH_TAIL_FIRST:
        return first + n - 1 - i
    return first + i


@kernel
def set_word(T: Any, L: Any, row: int, state: int) -> int:
    """Step the generation and set the state, fields before it visible with it. Returns the new generation."""
    r = row_at(T, row)
    gen = (T[r + R_WORD] >> GEN_SHIFT) + 1
    store_release(L[L_BASE] + 8 * (r + R_WORD), (gen << GEN_SHIFT) | state)
    return gen


@kernel
def owe(T: Any, row: int, by: int) -> None:
    """Count a reservation up or down at the client that made it."""
    owner = T[row_at(T, row) + R_NEXT]
    if 0 <= owner < T[H_MAX_CLIENTS]:
        T[T[H_O_CLIENT] + owner * CLIENT_WORDS + C_RESERVED] += by


@kernel
def take_slot(T: Any, L: Any, cls: int, victims: Any, words: Any, ticks: Any, at: Any, worth: int) -> int:
    """A slot for one block: a free one, one of a fresh slab, or the next victim that still is one; -1 if none.

    A victim dated after ``worth``, the date of what is to be stored, stays: nothing is gained by dropping the middle of
    a prefix for its tail. ``at[0]`` victims have been looked at, and ``at[1]`` of their siblings in this section.
    """
    row = pop_free_slot(T, cls)
    if row >= 0:
        return row
    if take_free_slab(T, L, cls):
        return pop_free_slot(T, cls)
    while at[0] < victims.shape[0]:
        row = victims[at[0]]
        word = words[at[0]]
        tick = ticks[at[0]]
        r = row_at(T, row)
        same = T[r + R_WORD] == word and T[r + R_TICK] == tick and is_slot_of(T, row, cls) and not is_pinned(T, row)
        if same and tick > worth:
            return -1
        at[0] += 1
        if same:
            at[1] += evict(T, L, row, E_EVICTED)
            return row
    return -1


@kernel
def begin_writing(T: Any, L: Any, row: int, keys: Any, i: int, size_word: int, tick: int, part_nbytes: Any) -> int:
    """FREE → WRITING, into the index: a slot on no list becomes that of ``keys[i]``. Its generation."""
    r = row_at(T, row)
    for w in range(4):
        T[r + R_KEY + w] = keys[i, w]
    T[r + R_SIZE] = size_word
    T[r + R_DONE] = 0
    T[r + R_SESSION] = L[L_SESSION]
    T[r + R_TICK] = tick
    for w in range(PIN_WORDS):
        T[r + R_PIN + w] = 0
    T[r + R_NEXT] = L[L_CLIENT]
    p0 = T[H_O_PART] + row * PART_WORDS
    for p in range(part_nbytes.shape[0]):
        T[p0 + p * PART_WORDS + PART_NBYTES] = part_nbytes[p]
        T[p0 + p * PART_WORDS + PART_XXH3] = 0
    fail(L, RESERVE_FIELDS)
    gen = set_word(T, L, row, WRITING)
    fail(L, RESERVE_WORD)
    insert(T, row)
    return gen


@entry("i(I, I, K, i, i, i, i, i, I, I, I, I, I, I8, I, I, I, i, i, i)")
def reserve(
    T: Any, L: Any, keys: Any, begin: int, end: int, stride: int, size: int, siblings: int, part_nbytes: Any,
    victims: Any, words: Any, ticks: Any, at: Any, codes: Any, rows: Any, gens: Any, offsets: Any,
    first: int, total: int, before: int,
) -> int:  # fmt: skip
    """Reserve a slot for each of ``keys[begin:end]``; returns where it stopped, or a negative lock code.

    It stops early at the first key that needs a victim when there is none left, or only ones that are worth more;
    ``at[0]`` victims have been looked at. ``siblings``: see layout.sibling_bits. The keys are dated as those after the
    first ``before`` of a batch of ``total`` that begins at tick ``first``; a batch that comes in pieces goes through a
    pool smaller than itself.
    """
    announce(T, L, keys, begin, end)  # what is in the cache already needs no wait under the lock
    likely = min(at[0] + end - begin, victims.shape[0])
    announce_rows(T, L, victims, at[0], likely)
    announce_siblings(T, L, victims, at[0], likely)
    lock = enter(T, L)
    if lock < 0:
        return lock
    n_parts = part_nbytes.shape[0]
    dirty(T, L)
    cls = class_of(T, stride)
    me = T[H_O_CLIENT] + L[L_CLIENT] * CLIENT_WORDS
    at[1] = 0
    i = begin
    while i < end:
        if at[1] >= SIBLINGS_A_SECTION:
            if give_way(T, L) < 0:
                return i  # the caller asks again, and is told
            cls = class_of(T, stride)
            at[1] = 0
        tick = tick_of(first, total, before + i, L[L_TOUCH])
        worth = tick if total == keys.shape[0] else first + total
        there = find(T, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        rows[i] = -1
        if there >= 0:
            r = row_at(T, there)
            if T[r + R_WORD] & STATE_MASK == SEALED:
                codes[i] = EXISTS
                if L[L_TOUCH] != TOUCH_NONE:
                    T[r + R_TICK] = tick
            else:
                codes[i] = IN_PROGRESS
            i += 1
            continue
        if T[me + C_RESERVED] > 0 and (T[me + C_RESERVED] + 1) * stride > L[L_RESERVE_BUDGET] * T[H_MIN_BLOCK]:
            codes[i] = BUDGET
            i += 1
            continue
        row = take_slot(T, L, cls, victims, words, ticks, at, worth) if 0 <= cls < MAX_CLASSES else -1
        if row < 0:
            break
        gens[i] = begin_writing(T, L, row, keys, i, siblings | (n_parts << SIZE_BITS) | size, tick, part_nbytes)
        T[me + C_RESERVED] += 1
        fail(L, RESERVE_INDEXED)
        codes[i] = OK
        rows[i] = row
        offsets[i] = slot_offset(T, row)
        i += 1
    clean(T, L)
    leave(T, L)
    return i


@entry("v(I, I, i)")
def count_full(T: Any, L: Any, n: int) -> None:
    """Count blocks that found no room. Without the lock: a lost count is harmless."""
    T[H_C_FULL] += n


@entry("i(I, I, I, I, i, I, I8)")
def complete(T: Any, L: Any, rows: Any, gens: Any, part: int, sums: Any, codes: Any) -> int:
    """Record a written part of each slot and seal those that have all. 0 or a lock code. ``rows`` become DONE.

    Marked dirty although no list changes: a rebuild seals what lacks only its word, and starts a new event epoch.
    """
    announce_rows(T, L, rows, 0, rows.shape[0])
    lock = enter(T, L)
    if lock < 0:
        return lock
    dirty(T, L)
    for i in range(rows.shape[0]):
        row = rows[i]
        if row < 0 or row >= T[H_N_ROWS]:
            continue
        rows[i] = DONE
        codes[i] = STALE
        r = row_at(T, row)
        if T[r + R_WORD] != ((gens[i] << GEN_SHIFT) | WRITING):
            continue
        n_parts = parts_of(T, row)
        if part < 0 or part >= n_parts:
            continue
        record_part(T, L, row, part, sums[i])
        codes[i] = seal_if_whole(T, L, row, n_parts)
    clean(T, L)
    leave(T, L)
    return 0


@kernel
def record_part(T: Any, L: Any, row: int, part: int, checksum: int) -> None:
    """Within a section: a part of a slot that is being written is there."""
    T[T[H_O_PART] + (row + part) * PART_WORDS + PART_XXH3] = checksum
    fail(L, PART_RECORDED)
    fence_release()
    T[row_at(T, row) + R_DONE] |= 1 << part


@kernel
def seal_if_whole(T: Any, L: Any, row: int, n_parts: int) -> int:
    """Within a section: WRITING → SEALED, if no part is missing. OK or PENDING."""
    if T[row_at(T, row) + R_DONE] != (1 << n_parts) - 1:
        return PENDING
    fail(L, PART_DONE)
    owe(T, row, -1)
    set_word(T, L, row, SEALED)
    fail(L, SEALED_WORD)
    T[H_C_SEALED] += 1
    emit(T, L, E_SEALED, row)
    return OK


@entry("i(I, I, I, I, b, I8)")
def abort(T: Any, L: Any, rows: Any, gens: Any, writers_done: bool, codes: Any) -> int:
    """Give up slots being written: FREE at once if nobody can write to them any more, else QUARANTINED.

    0 or a lock code. ``rows`` become DONE; ``codes`` of rows that name nothing stay.
    """
    lock = enter(T, L)
    if lock < 0:
        return lock
    dirty(T, L)
    for i in range(rows.shape[0]):
        row = rows[i]
        if row < 0 or row >= T[H_N_ROWS]:
            continue
        rows[i] = DONE
        codes[i] = STALE
        r = row_at(T, row)
        if T[r + R_WORD] != ((gens[i] << GEN_SHIFT) | WRITING):
            continue
        owe(T, row, -1)
        if writers_done:
            set_free(T, L, row)
            fail(L, ABORT_WORD)
            delete(T, L, row)
            fail(L, ABORT_UNINDEXED)
            release_slot(T, L, row)
        else:
            quarantine(T, L, row, 0x7FFFFFFFFFFFFFFF)  # until the session says so, or is gone
        T[H_C_ABORTED] += 1
        codes[i] = OK
    clean(T, L)
    leave(T, L)
    return 0


@kernel
def quarantine(T: Any, L: Any, row: int, until_ns: int) -> None:
    """WRITING → QUARANTINED: no key leads here any more, and nobody gets the slot before ``until_ns``."""
    r = row_at(T, row)
    T[r + R_NEXT] = until_ns
    set_word(T, L, row, QUARANTINED)
    fail(L, ABORT_WORD)
    delete(T, L, row)
    T[H_C_QUARANTINED] += 1


@entry("i(I, I, I, I, I8)")
def acknowledge(T: Any, L: Any, rows: Any, gens: Any, codes: Any) -> int:
    """Free quarantined slots all of whose writers are done. ``gens`` are those of the reservation. As :func:`abort`."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    dirty(T, L)
    for i in range(rows.shape[0]):
        row = rows[i]
        if row < 0 or row >= T[H_N_ROWS]:
            continue
        rows[i] = DONE
        codes[i] = STALE
        if T[row_at(T, row) + R_WORD] == (((gens[i] + 1) << GEN_SHIFT) | QUARANTINED):
            set_free(T, L, row)
            fail(L, ACK_WORD)
            release_slot(T, L, row)
            T[H_C_RELEASED] += 1
            codes[i] = OK
    clean(T, L)
    leave(T, L)
    return 0


@entry("i(I, I, I)")
def release_expired(T: Any, L: Any, rows: Any) -> int:
    """Free those of ``rows`` that are quarantined past their time; their number, or a lock code."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    dirty(T, L)
    now = now_ns()
    n = 0
    for i in range(rows.shape[0]):
        r = row_at(T, rows[i])
        if T[r + R_WORD] & STATE_MASK == QUARANTINED and T[r + R_NEXT] <= now:
            set_free(T, L, rows[i])
            fail(L, ACK_WORD)
            release_slot(T, L, rows[i])
            T[H_C_RELEASED] += 1
            n += 1
    clean(T, L)
    leave(T, L)
    return n


@entry("i(I, I, K, I8)")
def remove(T: Any, L: Any, keys: Any, codes: Any) -> int:
    """Free the sealed, unpinned blocks with these keys. How many keys are done: fewer than given means a lock code."""
    if enter(T, L) < 0:
        return 0
    dirty(T, L)
    looked = 0
    for i in range(keys.shape[0]):
        if looked >= SIBLINGS_A_SECTION:
            if give_way(T, L) < 0:
                return i
            looked = 0
        row = find(T, keys[i, 0], keys[i, 1], keys[i, 2], keys[i, 3])
        if row < 0:
            codes[i] = MISSING
            continue
        if T[row_at(T, row) + R_WORD] & STATE_MASK != SEALED:
            codes[i] = IN_PROGRESS
            continue
        if is_pinned(T, row):
            codes[i] = PINNED
            continue
        looked += evict(T, L, row, E_CLEARED)
        release_slot(T, L, row)
        codes[i] = OK
    clean(T, L)
    leave(T, L)
    return keys.shape[0]


@entry("i(I, I, I, I)")
def drop_corrupt(T: Any, L: Any, rows: Any, words: Any) -> int:
    """Free unpinned blocks whose bytes were found to be wrong, if they are still the same blocks. How many are done."""
    if enter(T, L) < 0:
        return 0
    dirty(T, L)
    looked = 0
    for i in range(rows.shape[0]):
        if looked >= SIBLINGS_A_SECTION:
            if give_way(T, L) < 0:
                return i
            looked = 0
        row = rows[i]
        if row >= 0 and T[row_at(T, row) + R_WORD] == words[i] and not is_pinned(T, row):
            looked += evict(T, L, row, E_CLEARED)
            release_slot(T, L, row)
    clean(T, L)
    leave(T, L)
    return rows.shape[0]


@entry("v(I, I, I, I, B)")
def still_writing(T: Any, L: Any, rows: Any, gens: Any, out: Any) -> None:
    """Whether each reservation still stands. No lock."""
    for i in range(rows.shape[0]):
        row = rows[i]
        out[i] = (
            0 <= row < T[H_N_ROWS]
            and load_acquire(L[L_BASE] + 8 * (row_at(T, row) + R_WORD)) == (gens[i] << GEN_SHIFT) | WRITING
        )


@kernel
def grace_end(T: Any) -> int:
    """When a slot quarantined now, whose writers are all dead, may be used again (a device may still be writing)."""
    return now_ns() + T[H_GRACE_NS]
