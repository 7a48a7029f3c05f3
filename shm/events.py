"""The event ring: which blocks were sealed, evicted or cleared, in order, for readers that may lag.

Written inside sections, sequence number last, so that a torn entry is never taken for a whole one. The ring does not
wait for readers: one that was lapped is told so, scans the slot table, and replays from the number that it noted
first. A rebuild starts a new epoch, since what the dead holder had not yet reported is lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug.shm.atomics import fence_acquire, fence_release, load_acquire, store_release
from kvplug.shm.jit import entry, kernel
from kvplug.shm.layout import (
    EVENT_WORDS,
    GEN_SHIFT,
    H_EPOCH,
    H_EVENT_CAP,
    H_EVENT_SEQ,
    H_O_EVENT,
    H_O_ROW,
    R_KEY,
    R_WORD,
    ROW_WORDS,
)
from kvplug.shm.local import L_BASE


@kernel
def emit(T: Any, L: Any, kind: int, row: int) -> None:
    """Append an event for the block in ``row``. The caller holds the lock; the row's key is still the block's."""
    seq = T[H_EVENT_SEQ] + 1
    e = T[H_O_EVENT] + (seq & (T[H_EVENT_CAP] - 1)) * EVENT_WORDS
    at = L[L_BASE] + 8 * e
    store_release(at, 0)
    fence_release()
    r = T[H_O_ROW] + row * ROW_WORDS
    T[e + 1] = kind
    T[e + 2] = row
    T[e + 3] = T[r + R_WORD] >> GEN_SHIFT
    for i in range(4):
        T[e + 4 + i] = T[r + R_KEY + i]
    store_release(at, seq)
    store_release(L[L_BASE] + 8 * H_EVENT_SEQ, seq)


@entry("i(I, I, i, K)")
def read_events(T: Any, L: Any, after: int, out: Any) -> int:
    """Copy events ``after + 1 …`` into ``out`` (M, 8); their number, or -1 if the reader was lapped. No lock."""
    cap = T[H_EVENT_CAP]
    last = load_acquire(L[L_BASE] + 8 * H_EVENT_SEQ)
    if last - after > cap:
        return -1
    n = 0
    for seq in range(after + 1, last + 1):
        if n >= out.shape[0]:
            break
        e = T[H_O_EVENT] + (seq & (cap - 1)) * EVENT_WORDS
        at = L[L_BASE] + 8 * e
        if load_acquire(at) != seq:
            return -1
        for i in range(EVENT_WORDS):
            out[n, i] = T[e + i]
        fence_acquire()
        if load_acquire(at) != seq:
            return -1
        n += 1
    return n


@dataclasses.dataclass(frozen=True, slots=True)
class EventBatch:
    """Events in order. ``lapped``: some were lost, read the slot table; then go on from ``next_after``."""

    kinds: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    gens: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint8]  # (M, 32)
    next_after: int
    lapped: bool


class EventReader:
    """A cursor over one pool's ring; reading takes no lock and is never waited for."""

    def __init__(self, T: npt.NDArray[np.int64], L: npt.NDArray[np.int64], *, max_events: int = 4096) -> None:
        self._T, self._L = T, L
        self._out = np.zeros((max_events, EVENT_WORDS), np.int64)
        self._epoch = int(T[H_EPOCH])
        self.after = int(T[H_EVENT_SEQ])

    def read(self) -> EventBatch:
        """What has happened since the last call; at most ``max_events`` at a time."""
        epoch = int(self._T[H_EPOCH])
        noted = int(self._T[H_EVENT_SEQ])
        n = int(read_events(self._T, self._L, self.after, self._out))
        lapped = n < 0 or epoch != self._epoch
        if lapped:
            n, self.after, self._epoch = 0, noted, epoch
        rows = self._out[:n].copy()
        self.after += n
        keys = rows[:, 4:].copy().view(np.uint8).reshape(n, 32)
        return EventBatch(rows[:, 1], rows[:, 2], rows[:, 3], keys, self.after, lapped)
