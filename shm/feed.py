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
from kvplug.shm.pool import Pool
from kvplug.shm.rows import sealed_keys

__all__ = ["BlockChanges", "BlockFeed"]

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

MAX_EVENTS: Final = 1 << 14


class BlockChanges(NamedTuple):
    """Changes in order; ``lapped``: some were lost, so scan."""

    keys: U8
    """(M, 32)."""
    sealed: Bools
    """Whether the block came (True) or went, bool[M]."""
    lapped: bool


class BlockFeed:
    """The changes of one attached pool from now on, and what it has."""

    def __init__(self, pool: Pool, *, max_events: int = MAX_EVENTS) -> None:
        self._pool = pool
        self._events = pool.events(max_events)

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
        return self._pool.is_closed or self._pool.is_retired

    def scan(self, wanted: Callable[[U8], Bools] | None = None) -> U8:
        """Keys of the sealed blocks, (N, 32) uint8; ``wanted``: which of some keys (M, 32) to keep, bool[M]."""
        return sealed_keys(self._pool.T, self._pool.geometry, wanted)
