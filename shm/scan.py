"""Looking for victims, without the lock: what is found is a proposal, checked again under the lock when it is used.

A scan reads rows while others change them. It collects (row, word, tick) of unpinned sealed slots in a window of rows
that a rotating hand moves on; a victim counts later only if its word and tick are still the same and it has no pin.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.jit import entry
from kvplug.shm.layout import (
    CLASS_WORDS,
    FREE,
    H_N_SLABS,
    H_O_CLASS,
    H_ROWS_PER_SLAB,
    K_STRIDE,
    MAX_CLASSES,
    PIN_WORDS,
    QUARANTINED,
    R_NEXT,
    R_PIN,
    R_SIZE,
    R_TICK,
    R_WORD,
    S_NSLOTS,
    S_ROW_STEP,
    S_STATE,
    S_STRIDE,
    SEALED,
    SIZE_MASK,
    SLAB_OWNED,
    STATE_MASK,
)
from kvplug.shm.places import row_at, slab_at


@entry("ii(I, i, i, i, I, I, I, I)")
def candidates(T: Any, stride: int, hand: int, max_rows: int, rows: Any, words: Any, ticks: Any, sizes: Any) -> Any:
    """(found, next hand): unpinned sealed slots of this stride in slabs from ``hand`` on; ``max_rows`` are seen."""
    n_slabs = T[H_N_SLABS]
    rps = T[H_ROWS_PER_SLAB]
    found = 0
    seen = 0
    slab = hand % n_slabs
    for _ in range(n_slabs):
        s = slab_at(T, slab)
        if T[s + S_STATE] == SLAB_OWNED and T[s + S_STRIDE] == stride:
            nslots = T[s + S_NSLOTS]
            step = T[s + S_ROW_STEP]
            if found + nslots > rows.shape[0]:
                break
            seen += nslots
            for i in range(nslots):
                row = slab * rps + i * step
                r = row_at(T, row)
                word = T[r + R_WORD]
                if word & STATE_MASK != SEALED:
                    continue
                pins = 0
                for w in range(PIN_WORDS):
                    pins |= T[r + R_PIN + w]
                if pins == 0:
                    rows[found] = row
                    words[found] = word
                    ticks[found] = T[r + R_TICK]
                    sizes[found] = T[r + R_SIZE] & SIZE_MASK
                    found += 1
        slab = (slab + 1) % n_slabs
        if seen >= max_rows:
            break
    return found, slab


@entry("v(I, i, I)")
def slab_worth(T: Any, stride: int, worth: Any) -> None:
    """For each slab of *other* strides: mean tick of its blocks, 0 if it is empty, -1 if it must not be drained."""
    rps = T[H_ROWS_PER_SLAB]
    for slab in range(T[H_N_SLABS]):
        s = slab_at(T, slab)
        worth[slab] = -1
        if T[s + S_STATE] != SLAB_OWNED or T[s + S_STRIDE] == stride:
            continue
        total = 0
        sealed = 0
        busy = False
        for i in range(T[s + S_NSLOTS]):
            r = row_at(T, slab * rps + i * T[s + S_ROW_STEP])
            state = T[r + R_WORD] & STATE_MASK
            if state == FREE:
                continue
            if state != SEALED:
                busy = True
                break
            for w in range(PIN_WORDS):
                if T[r + R_PIN + w] != 0:
                    busy = True
            if busy:
                break
            total += T[r + R_TICK]
            sealed += 1
        if not busy:
            worth[slab] = total // sealed if sealed > 0 else 0


@entry("i(I, i, i, i, I)")
def expired_rows(T: Any, now: int, begin: int, end: int, out: Any) -> int:
    """Quarantined slots past their time among slabs ``begin … end``; their number."""
    rps = T[H_ROWS_PER_SLAB]
    n = 0
    for slab in range(begin, end):
        s = slab_at(T, slab)
        if T[s + S_STATE] == 0 or T[s + S_ROW_STEP] <= 0:
            continue
        for i in range(T[s + S_NSLOTS]):
            row = slab * rps + i * T[s + S_ROW_STEP]
            r = row_at(T, row)
            if T[r + R_WORD] & STATE_MASK == QUARANTINED and T[r + R_NEXT] <= now and n < out.shape[0]:
                out[n] = row
                n += 1
    return n


@entry("i(I, I, I, K)")
def tally(T: Any, states: Any, class_live: Any, per_class: Any) -> int:
    """Count slots by state, pinned slots (returned), and per class [stride, slabs, sealed, bytes sealed]. No lock."""
    rps = T[H_ROWS_PER_SLAB]
    pinned = 0
    for c in range(MAX_CLASSES):
        per_class[c, 0] = T[T[H_O_CLASS] + c * CLASS_WORDS + K_STRIDE]
        class_live[c] = 0
    for slab in range(T[H_N_SLABS]):
        s = slab_at(T, slab)
        if T[s + S_STATE] < SLAB_OWNED or T[s + S_ROW_STEP] <= 0:
            continue
        c = 0
        while c < MAX_CLASSES - 1 and per_class[c, 0] != T[s + S_STRIDE]:
            c += 1
        class_live[c] = 1
        per_class[c, 1] += 1
        for i in range(T[s + S_NSLOTS]):
            r = row_at(T, slab * rps + i * T[s + S_ROW_STEP])
            state = T[r + R_WORD] & STATE_MASK
            states[state & 3] += 1
            if state == SEALED:
                per_class[c, 2] += 1
                per_class[c, 3] += T[r + R_SIZE] & SIZE_MASK
            any_pin = 0
            for w in range(PIN_WORDS):
                any_pin |= T[r + R_PIN + w]
            if any_pin != 0:
                pinned += 1
    return pinned
