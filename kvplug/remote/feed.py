"""What a pool has and how that changes, for those who tell others: the event ring, and a scan of the slot table.

Neither takes the lock, so both are hints by the time they are read. Scan first and replay the events since: a key's
last event decides, or the scan where it has none, whatever happened in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvplug.shm import layout as lay
from kvplug.store import KvStore

__all__ = ["BlockChanges", "BlockFeed"]

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

SCAN_ROWS: Final = 1 << 16
MAX_EVENTS: Final = 1 << 14


class BlockChanges(NamedTuple):
    """Changes in order; ``lapped``: some were lost, so scan."""

    keys: U8
    """(M, 32)."""
    sealed: Bools
    """Whether the block came (True) or went, bool[M]."""
    lapped: bool


class BlockFeed:
    """The changes of one store's pool from now on, and what it has."""

    def __init__(self, store: KvStore, *, max_events: int = MAX_EVENTS) -> None:
        self._pool = store.pool
        self._events = self._pool.events(max_events)

    def read(self) -> BlockChanges:
        """What has happened since the last call; at most ``max_events`` at a time."""
        batch = self._events.read()
        return BlockChanges(batch.keys, batch.kinds == lay.E_SEALED, batch.lapped)

    @property
    def behind(self) -> int:
        """Events that were not read yet."""
        return max(0, int(self._pool.T[lay.H_EVENT_SEQ]) - self._events.after)

    @property
    def retired(self) -> bool:
        """Whether the pool was removed or the store closed: nothing will change any more."""
        return self._pool.is_closed or bool(self._pool.T[lay.H_RETIRED])

    def scan(self, wanted: Callable[[U8], Bools] | None = None) -> U8:
        """Keys of the sealed blocks, (N, 32) uint8; ``wanted``: which of some keys (M, 32) to keep, bool[M]."""
        g = self._pool.geometry
        rows = self._pool.T[g.o_row : g.o_row + g.n_rows * lay.ROW_WORDS].reshape(-1, lay.ROW_WORDS)
        found = [np.empty((0, 32), np.uint8)]
        for at in range(0, len(rows), SCAN_ROWS):
            some = rows[at : at + SCAN_ROWS]
            words = some[:, lay.R_WORD].copy()
            sealed = np.flatnonzero(words & lay.STATE_MASK == lay.SEALED)
            keys = some[sealed, lay.R_KEY : lay.R_KEY + 4]
            same = some[sealed, lay.R_WORD] == words[sealed]
            named: U8 = np.ascontiguousarray(keys[same]).view(np.uint8).reshape(-1, 32)
            found.append(named if wanted is None else named[wanted(named)])
        return np.concatenate(found)
