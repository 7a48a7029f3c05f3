"""What came into reserved slots from elsewhere: all parts of a batch checked in one call, and sealed in one section."""

from __future__ import annotations

from typing import Any

from kvplug.shm.codes import CORRUPT, OK, STALE
from kvplug.shm.index import announce_rows
from kvplug.shm.jit import entry
from kvplug.shm.layout import GEN_SHIFT, H_N_ROWS, R_WORD, WRITING
from kvplug.shm.local import L_BASE
from kvplug.shm.lock import clean, dirty, enter, leave
from kvplug.shm.places import parts_of, row_at
from kvplug.shm.write import DONE, record_part, seal_if_whole
from kvplug.shm.xxh3 import xxh3_64


@entry("v(I, I, I, I, I8)")
def check_parts(L: Any, offsets: Any, nbytes: Any, sums: Any, codes: Any) -> None:
    """OK or CORRUPT for N blocks of P parts, int64[N * P]: whether every part has its checksum. Without any lock.

    offsets: of the parts, from the segment's start; sums: XXH3's bits.
    """
    n = codes.shape[0]
    parts = len(sums) // max(n, 1)
    for i in range(n):
        codes[i] = OK
        for p in range(i * parts, (i + 1) * parts):
            if xxh3_64(L[L_BASE] + offsets[p], nbytes[p]) != sums[p]:
                codes[i] = CORRUPT
                break


@entry("i(I, I, I, I, I, I8)")
def complete_whole(T: Any, L: Any, rows: Any, gens: Any, sums: Any, codes: Any) -> int:
    """Record all P parts of each slot, with checksums int64[N * P], and seal it: OK or STALE. 0 or a lock code.

    ``rows`` become DONE, as by write.complete.
    """
    n = rows.shape[0]
    parts = len(sums) // max(n, 1)
    announce_rows(T, L, rows, 0, n)
    lock = enter(T, L)
    if lock < 0:
        return lock
    dirty(T, L)
    for i in range(n):
        row = rows[i]
        if row < 0 or row >= T[H_N_ROWS]:
            continue
        rows[i] = DONE
        codes[i] = STALE
        if T[row_at(T, row) + R_WORD] != ((gens[i] << GEN_SHIFT) | WRITING) or parts_of(T, row) != parts:
            continue
        for part in range(parts):
            record_part(T, L, row, part, sums[i * parts + part])
        codes[i] = seal_if_whole(T, L, row, parts)
    clean(T, L)
    leave(T, L)
    return 0
