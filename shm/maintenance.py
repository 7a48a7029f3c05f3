"""What a client does beside its calls, in one background thread.

It reserves memory and faults it in, reaps the dead and drains queues. No daemon: each attached process does it,
whoever comes first; all of it can be done twice.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from kvplug import hostmem
from kvplug.shm import layout as lay
from kvplug.shm import segment
from kvplug.threads import LivingThread

if TYPE_CHECKING:
    from kvplug.shm.pool import Pool

log = logging.getLogger("kvplug")
INTERVAL_S: Final = 0.25
TABLE_STEP_BYTES: Final = 64 << 20  # some 10 ms
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Maintenance:
    """The thread. It holds the pool only weakly: a pool that nobody uses any more ends it."""

    def __init__(self, pool: Pool, *, prefault: bool) -> None:
        self._pool = weakref.ref(pool)
        self._stop = threading.Event()
        self._prefault = prefault
        self._tables_populated = 0
        self._populated = 0
        self._thread = LivingThread("kvplug-maintenance", self._run)
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Ask it to end and wait a bounded time."""
        self._stop.set()
        self._thread.end(timeout_s)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            pool = self._pool()
            if pool is None or pool.is_closed or pool.is_forked:
                return
            busy = self._step_tables(pool) or (self._prefault and self._step(pool))
            if not busy or time.monotonic() >= due:  # a large pool keeps it busy for minutes, and the dead don't wait
                pool.maintain()
                due = time.monotonic() + INTERVAL_S
            del pool
            if not busy:
                self._stop.wait(INTERVAL_S)

    def _step_tables(self, pool: Pool) -> bool:
        """Map some more of the tables, so that look-ups meet no page faults. False when all are."""
        start, end = self._tables_populated, pool.geometry.data_offset
        if start < end:
            self._tables_populated = min(start + TABLE_STEP_BYTES, end)
            _madvise(pool.base_address + start, self._tables_populated - start, MADV_POPULATE_WRITE)
        return self._tables_populated < end

    def _step(self, pool: Pool) -> bool:
        """Reserve or fault in one slab. False when there is nothing left to do."""
        t = pool.T
        watermark = int(t[lay.H_WATERMARK])
        if self._populated < watermark:
            g = pool.geometry
            start = pool.base_address + g.data_offset + self._populated * g.slab_bytes
            # An older kernel answers EINVAL: then pages fault in on first touch, as without this.
            _madvise(start, g.slab_bytes, MADV_POPULATE_WRITE)
            self._populated += 1
            return True
        return watermark < pool.geometry.n_slabs and pool.grow()


def reserve_next_slab(pool: Pool) -> int:
    """Take memory for the slab at the watermark. The slab, or -1 if there is no memory, or no slab left."""
    slab = int(pool.T[lay.H_WATERMARK])
    g = pool.geometry
    if slab >= g.n_slabs:
        return -1
    memory = hostmem.memory()
    if memory.limit_bytes and memory.limit_bytes - memory.used_bytes < g.slab_bytes + hostmem.MEMORY_RESERVE_BYTES:
        pool.warn_once(
            "memory",
            f"pool {pool.name!r} stops growing at {slab * g.slab_bytes} of {g.data_bytes} bytes: memory is short",
        )
        return -1
    began = time.monotonic()
    try:
        segment.reserve(pool.lock_fd, g.data_offset + slab * g.slab_bytes, g.slab_bytes)
    except OSError as e:
        pool.warn_once(
            "space", f"pool {pool.name!r} stops growing at {slab * g.slab_bytes} of {g.data_bytes} bytes: {e.strerror}"
        )
        return -1
    log.debug("reserved slab %d in %.1f ms", slab, (time.monotonic() - began) * 1e3)
    return slab
