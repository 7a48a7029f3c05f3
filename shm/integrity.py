"""check_integrity(): every invariant of the tables, looked at under the lock.

For tests, the stress run and `kvplug doctor`. It holds the lock for as long as it takes (milliseconds for a large
pool), so it is not for a busy host's hot path.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code, IntegrityError, LockTimeoutError, PoolError
from kvplug.shm import jit
from kvplug.shm.index import find
from kvplug.shm.jit import entry, kernel
from kvplug.shm.layout import (
    C_PINS,
    C_SESSION,
    C_STATE,
    CLIENT_FREE,
    CLIENT_WORDS,
    FREE,
    H_DRAINING,
    H_FREE_SLABS,
    H_INDEX_CAP,
    H_MAX_CLIENTS,
    H_N_ROWS,
    H_N_SLABS,
    H_O_CLIENT,
    H_O_INDEX,
    H_ROWS_PER_SLAB,
    H_WATERMARK,
    PIN_WORDS,
    QUARANTINED,
    R_DONE,
    R_KEY,
    R_NEXT,
    R_PIN,
    R_SESSION,
    R_SIZE,
    R_WORD,
    S_FREE_COUNT,
    S_FREE_HEAD,
    S_LISTED,
    S_NEXT,
    S_NSLOTS,
    S_ROW_STEP,
    S_STATE,
    SEALED,
    SIBLING_BITS,
    SIBLING_MASK,
    SIBLING_SHIFT,
    SIZE_MASK,
    SLAB_DRAINING,
    SLAB_FREE,
    SLAB_OWNED,
    SLAB_UNRESERVED,
    STATE_MASK,
    WRITING,
)
from kvplug.shm.local import L_BASE
from kvplug.shm.lock import enter, leave
from kvplug.shm.places import parts_of, row_at, slab_at, slot_offset
from kvplug.shm.read import bytes_match

FINDINGS = {
    1: "a sealed or writing slot is not found under its key",
    2: "an index entry names a slot that is free, quarantined or out of range",
    3: "two index entries name one slot",
    4: "a pin bit of a client that is not attached",
    5: "a pin bit on a slot that is not sealed",
    6: "a slot in writing belongs to no known session",
    7: "a sealed slot lacks parts",
    8: "a slab's free list has a slot that is not free or not its own, or loops",
    9: "a free slot of an owned slab is on no list",
    10: "a slab's free count is wrong",
    11: "the list of free slabs has one that is owned or not reserved, or loops",
    12: "a reserved slab without owner is on no list",
    13: "a slab below the watermark is not reserved, or one above it is",
    14: "a slab is being drained that the header does not name",
    15: "a slot in a slab without owner is not free",
    16: "a client's number of pins is not the number of its bits",
    17: "a sealed block's bytes do not match its checksum",
    18: "a slot lies outside the segment",
    19: "a block is numbered past its siblings",
}


@kernel
def _note(found: Any, n: int, what: int, where: int) -> int:
    if n < found.shape[0]:
        found[n, 0] = what
        found[n, 1] = where
    return n + 1


@kernel
def _check_slot(T: Any, L: Any, row: int, deep: bool, pins: Any, found: Any, n: int) -> int:
    r = row_at(T, row)
    state = T[r + R_WORD] & STATE_MASK
    if state == SEALED or state == WRITING:
        if find(T, T[r + R_KEY], T[r + R_KEY + 1], T[r + R_KEY + 2], T[r + R_KEY + 3]) != row:
            n = _note(found, n, 1, row)
        if slot_offset(T, row) < 0:
            n = _note(found, n, 18, row)
    if state == SEALED and T[r + R_DONE] != (1 << parts_of(T, row)) - 1:
        n = _note(found, n, 7, row)
    which = T[r + R_SIZE] >> SIBLING_SHIFT
    if state != FREE and (which & SIBLING_MASK) > (which >> SIBLING_BITS):
        n = _note(found, n, 19, row)
    size = T[r + R_SIZE] & SIZE_MASK
    if state == SEALED and deep and not bytes_match(T, row, L[L_BASE] + slot_offset(T, row), size):
        n = _note(found, n, 17, row)
    if state == WRITING or state == QUARANTINED:
        known = state == QUARANTINED
        for c in range(T[H_MAX_CLIENTS]):
            at = T[H_O_CLIENT] + c * CLIENT_WORDS
            if T[at + C_STATE] != CLIENT_FREE and T[at + C_SESSION] == T[r + R_SESSION]:
                known = True
        if not known:
            n = _note(found, n, 6, row)
    for w in range(PIN_WORDS):
        if T[r + R_PIN + w] == 0:
            continue
        if state != SEALED and state != FREE:
            n = _note(found, n, 5, row)
        for c in range(64):
            if (T[r + R_PIN + w] >> c) & 1 == 0:
                continue
            client = w * 64 + c
            if client >= T[H_MAX_CLIENTS] or T[T[H_O_CLIENT] + client * CLIENT_WORDS + C_STATE] == CLIENT_FREE:
                n = _note(found, n, 4, row)
            else:
                pins[client] += 1
    return n


@kernel
def _check_slab(T: Any, L: Any, slab: int, deep: bool, pins: Any, seen: Any, found: Any, n: int) -> int:
    rps = T[H_ROWS_PER_SLAB]
    s = slab_at(T, slab)
    state = T[s + S_STATE]
    if (slab < T[H_WATERMARK]) != (state != SLAB_UNRESERVED):
        n = _note(found, n, 13, slab)
    if state == SLAB_DRAINING and T[H_DRAINING] != slab + 1:
        n = _note(found, n, 14, slab)
    if state == SLAB_FREE or state == SLAB_UNRESERVED:
        for row in range(slab * rps, (slab + 1) * rps):
            if T[row_at(T, row) + R_WORD] & STATE_MASK != FREE:
                n = _note(found, n, 15, row)
        return n
    free = 0
    row = T[s + S_FREE_HEAD] - 1
    if state == SLAB_OWNED:
        while row >= 0:
            if row // rps != slab or T[row_at(T, row) + R_WORD] & STATE_MASK != FREE or free > T[s + S_NSLOTS]:
                n = _note(found, n, 8, slab)
                break
            seen[row] = 1
            free += 1
            row = T[row_at(T, row) + R_NEXT] - 1
        if free != T[s + S_FREE_COUNT]:
            n = _note(found, n, 10, slab)
        if (free > 0) != (T[s + S_LISTED] == 1):
            n = _note(found, n, 9, slab)
    for i in range(T[s + S_NSLOTS]):
        row = slab * rps + i * T[s + S_ROW_STEP]
        if state == SLAB_OWNED and T[row_at(T, row) + R_WORD] & STATE_MASK == FREE and seen[row] == 0:
            n = _note(found, n, 9, row)
        n = _check_slot(T, L, row, deep, pins, found, n)
    return n


@entry("i(I, I, b, I, I8, K)", late=True)
def check(T: Any, L: Any, deep: bool, pins: Any, seen: Any, found: Any) -> int:
    """Fill ``found`` (M, 2) with (finding, where); their number (may be more than M), or a lock code."""
    lock = enter(T, L)
    if lock < 0:
        return lock
    n = 0
    for slab in range(T[H_N_SLABS]):
        n = _check_slab(T, L, slab, deep, pins, seen, found, n)
    for c in range(T[H_MAX_CLIENTS]):
        if T[T[H_O_CLIENT] + c * CLIENT_WORDS + C_PINS] != pins[c]:
            n = _note(found, n, 16, c)
    for i in range(T[H_N_ROWS]):
        seen[i] = 0
    for i in range(T[H_INDEX_CAP]):
        e = T[T[H_O_INDEX] + i]
        if e == 0:
            continue
        row = (e & 0xFFFFFFFF) - 1
        if row < 0 or row >= T[H_N_ROWS]:
            n = _note(found, n, 2, i)
            continue
        state = T[row_at(T, row) + R_WORD] & STATE_MASK
        if state != SEALED and state != WRITING:
            n = _note(found, n, 2, row)
        if seen[row] == 1:
            n = _note(found, n, 3, row)
        seen[row] = 1
    slab = T[H_FREE_SLABS] - 1
    steps = 0
    while slab >= 0:
        steps += 1
        if steps > T[H_N_SLABS] or T[slab_at(T, slab) + S_STATE] != SLAB_FREE:
            n = _note(found, n, 11, slab)
            break
        slab = T[slab_at(T, slab) + S_NEXT] - 1
    free_slabs = 0
    for slab in range(T[H_N_SLABS]):
        if T[slab_at(T, slab) + S_STATE] == SLAB_FREE:
            free_slabs += 1
    if steps != free_slabs:
        n = _note(found, n, 12, free_slabs - steps)
    leave(T, L)
    return n


def prepare() -> None:
    """Compile or load the check, which no ordinary call needs, before anybody waits for it."""
    jit.prepare(check)


def raise_findings(pool: str, answer: int, sentences: list[str], lock_timeout_s: float) -> None:
    """What :func:`findings` answered, as an error: IntegrityError, LockTimeoutError or PoolError."""
    if answer == Code.TIMEOUT:
        raise LockTimeoutError(f"the lock of pool {pool!r} was not to be had within {lock_timeout_s} s")
    if answer < 0:
        raise PoolError(f"pool {pool!r} was removed")
    if answer:
        raise IntegrityError(f"pool {pool!r} has {answer} finding(s): " + "; ".join(sentences))


def findings(
    T: npt.NDArray[np.int64], L: npt.NDArray[np.int64], *, deep: bool, max_findings: int = 64
) -> tuple[int, list[str]]:
    """(lock code or number of findings, the first of them as sentences)."""
    pins = np.zeros(int(T[H_MAX_CLIENTS]), np.int64)
    seen = np.zeros(int(T[H_N_ROWS]), np.int8)
    found = np.zeros((max_findings, 2), np.int64)
    n = int(check(T, L, deep, pins, seen, found))
    return n, [f"{FINDINGS[int(what)]} ({int(where)})" for what, where in found[: max(0, min(n, max_findings))]]
