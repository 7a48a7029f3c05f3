"""Where a slab's entry, a row and a slot's bytes lie: arithmetic, which changes nothing."""

from __future__ import annotations

from typing import Any

from kvplug.shm.jit import kernel
from kvplug.shm.layout import (
    H_DATA_OFFSET,
    H_N_SLABS,
    H_O_ROW,
    H_O_SLAB,
    H_ROWS_PER_SLAB,
    H_SLAB_BYTES,
    PARTS_MASK,
    R_SIZE,
    ROW_WORDS,
    S_CLASS,
    S_NSLOTS,
    S_ROW_STEP,
    S_STATE,
    S_STRIDE,
    SIZE_BITS,
    SLAB_OWNED,
    SLAB_WORDS,
)


@kernel
def slab_at(T: Any, slab: int) -> int:
    """Word offset of a slab's entry."""
    return T[H_O_SLAB] + slab * SLAB_WORDS


@kernel
def row_at(T: Any, row: int) -> int:
    """Word offset of a slot's row."""
    return T[H_O_ROW] + row * ROW_WORDS


@kernel
def parts_of(T: Any, row: int) -> int:
    """Number of parts of the slot's block."""
    return (T[row_at(T, row) + R_SIZE] >> SIZE_BITS) & PARTS_MASK


@kernel
def slot_offset(T: Any, row: int) -> int:
    """Byte offset of a slot's payload from the start of the segment, or -1 if its slab is not cut."""
    rps = T[H_ROWS_PER_SLAB]
    slab = row // rps
    s = slab_at(T, slab)
    step = T[s + S_ROW_STEP]
    stride = T[s + S_STRIDE]
    if step <= 0 or stride <= 0:
        return -1
    at = (row - slab * rps) // step * stride
    if at + stride > T[H_SLAB_BYTES]:
        return -1
    return T[H_DATA_OFFSET] + slab * T[H_SLAB_BYTES] + at


@kernel
def is_slot_of(T: Any, row: int, cls: int) -> bool:
    """Whether the row is a slot of an owned slab of this class: the slab may have been cut anew during a scan."""
    rps = T[H_ROWS_PER_SLAB]
    slab = row // rps
    if row < 0 or slab >= T[H_N_SLABS]:
        return False
    s = slab_at(T, slab)
    step = T[s + S_ROW_STEP]
    if T[s + S_STATE] != SLAB_OWNED or T[s + S_CLASS] != cls or step <= 0:
        return False
    at = row - slab * rps
    return at % step == 0 and at // step < T[s + S_NSLOTS]
