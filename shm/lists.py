"""Free slots and slabs: which slab a class cuts its slots from, and which slots of it are free.

Each slab chains its own free slots through their rows; a class chains the slabs that have any; reserved slabs that no
class owns are chained at the header. All of it is derived from slab states and slot words and can be thrown away:
:mod:`kvplug.shm.rebuild` makes it anew. Callers hold the pool lock and have marked the pool dirty.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.atomics import fence, store_release
from kvplug.shm.failpoints import FREED_LISTED, SLAB_CUT, SLAB_OWNED, fail
from kvplug.shm.jit import kernel
from kvplug.shm.layout import (
    CLASS_WORDS,
    FREE,
    GEN_SHIFT,
    H_FREE_SLABS,
    H_O_CLASS,
    H_ROWS_PER_SLAB,
    H_SLAB_BYTES,
    K_HEAD,
    K_SLABS,
    K_STRIDE,
    MAX_CLASSES,
    R_NEXT,
    R_WORD,
    S_CLASS,
    S_FREE_COUNT,
    S_FREE_HEAD,
    S_LISTED,
    S_NEXT,
    S_NSLOTS,
    S_PREV,
    S_ROW_STEP,
    S_STATE,
    S_STRIDE,
    SLAB_FREE,
    STATE_MASK,
)
from kvplug.shm.layout import (
    SLAB_OWNED as STATE_OWNED,
)
from kvplug.shm.local import L_BASE
from kvplug.shm.places import row_at, slab_at


@kernel
def link(T: Any, slab: int) -> None:
    """Put a slab at the head of its class's list of slabs with room."""
    s = slab_at(T, slab)
    if T[s + S_LISTED] == 1:
        return
    k = T[H_O_CLASS] + T[s + S_CLASS] * CLASS_WORDS
    head = T[k + K_HEAD]
    T[s + S_PREV] = 0
    T[s + S_NEXT] = head
    if head != 0:
        T[slab_at(T, head - 1) + S_PREV] = slab + 1
    T[k + K_HEAD] = slab + 1
    T[s + S_LISTED] = 1


@kernel
def unlink(T: Any, slab: int) -> None:
    """Take a slab out of its class's list."""
    s = slab_at(T, slab)
    if T[s + S_LISTED] == 0:
        return
    k = T[H_O_CLASS] + T[s + S_CLASS] * CLASS_WORDS
    before = T[s + S_PREV]
    after = T[s + S_NEXT]
    if before == 0:
        T[k + K_HEAD] = after
    else:
        T[slab_at(T, before - 1) + S_NEXT] = after
    if after != 0:
        T[slab_at(T, after - 1) + S_PREV] = before
    T[s + S_LISTED] = 0


@kernel
def push_free_slot(T: Any, row: int) -> None:
    """Put a FREE slot on its slab's list; the slots of a slab that is not owned stay off every list."""
    slab = row // T[H_ROWS_PER_SLAB]
    s = slab_at(T, slab)
    if T[s + S_STATE] != STATE_OWNED:
        return
    T[row_at(T, row) + R_NEXT] = T[s + S_FREE_HEAD]
    T[s + S_FREE_HEAD] = row + 1
    T[s + S_FREE_COUNT] += 1
    link(T, slab)


@kernel
def pop_free_slot(T: Any, cls: int) -> int:
    """Take a free slot of the class, or -1."""
    head = T[T[H_O_CLASS] + cls * CLASS_WORDS + K_HEAD]
    if head == 0:
        return -1
    slab = head - 1
    s = slab_at(T, slab)
    row = T[s + S_FREE_HEAD] - 1
    T[s + S_FREE_HEAD] = T[row_at(T, row) + R_NEXT]
    T[s + S_FREE_COUNT] -= 1
    if T[s + S_FREE_HEAD] == 0:
        unlink(T, slab)
    return row


@kernel
def set_free(T: Any, L: Any, row: int) -> None:
    """The word first: from here on no reader takes the slot's bytes for its block's."""
    r = row_at(T, row)
    store_release(L[L_BASE] + 8 * (r + R_WORD), (((T[r + R_WORD] >> GEN_SHIFT) + 1) << GEN_SHIFT) | FREE)
    fence()


@kernel
def release_slot(T: Any, L: Any, row: int) -> None:
    """List a slot whose word says FREE already."""
    push_free_slot(T, row)
    fail(L, FREED_LISTED)


@kernel
def class_of(T: Any, stride: int) -> int:
    """The class of this stride, made if there is room for one more; -1 if there is not."""
    base = T[H_O_CLASS]
    empty = -1
    for c in range(MAX_CLASSES):
        k = base + c * CLASS_WORDS
        if T[k + K_STRIDE] == stride:
            return c
        if empty < 0 and T[k + K_SLABS] == 0:
            empty = c
    if empty >= 0:
        k = base + empty * CLASS_WORDS
        T[k + K_STRIDE] = stride
        T[k + K_HEAD] = 0
    return empty


@kernel
def push_free_slab(T: Any, slab: int) -> None:
    """Chain a reserved slab that nobody owns."""
    T[slab_at(T, slab) + S_NEXT] = T[H_FREE_SLABS]
    T[H_FREE_SLABS] = slab + 1


@kernel
def list_slab(T: Any, L: Any, slab: int) -> None:
    """Chain the free slots of an owned slab, lowest first."""
    rps = T[H_ROWS_PER_SLAB]
    s = slab_at(T, slab)
    T[s + S_FREE_HEAD] = 0
    T[s + S_FREE_COUNT] = 0
    step = T[s + S_ROW_STEP]
    for i in range(T[s + S_NSLOTS] - 1, -1, -1):
        row = slab * rps + i * step
        if T[row_at(T, row) + R_WORD] & STATE_MASK == FREE:
            push_free_slot(T, row)


@kernel
def take_free_slab(T: Any, L: Any, cls: int) -> bool:
    """Cut a reserved slab for the class. False if there is none."""
    head = T[H_FREE_SLABS]
    if head == 0:
        return False
    slab = head - 1
    s = slab_at(T, slab)
    T[H_FREE_SLABS] = T[s + S_NEXT]
    k = T[H_O_CLASS] + cls * CLASS_WORDS
    stride = T[k + K_STRIDE]
    nslots = T[H_SLAB_BYTES] // stride
    T[s + S_STRIDE] = stride
    T[s + S_NSLOTS] = nslots
    T[s + S_ROW_STEP] = T[H_ROWS_PER_SLAB] // nslots
    T[s + S_CLASS] = cls
    T[s + S_LISTED] = 0
    fail(L, SLAB_CUT)
    store_release(L[L_BASE] + 8 * (s + S_STATE), STATE_OWNED)
    fail(L, SLAB_OWNED)
    T[k + K_SLABS] += 1
    list_slab(T, L, slab)
    return True


@kernel
def give_back_slab(T: Any, L: Any, slab: int) -> None:
    """Return an empty slab, all of whose slots are FREE and unlisted, to the reserved ones."""
    s = slab_at(T, slab)
    T[T[H_O_CLASS] + T[s + S_CLASS] * CLASS_WORDS + K_SLABS] -= 1
    store_release(L[L_BASE] + 8 * (s + S_STATE), SLAB_FREE)
    push_free_slab(T, slab)
