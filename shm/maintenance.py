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
from kvplug.sizes import format_size
from kvplug.threads import LivingThread

if TYPE_CHECKING:
    from kvplug.shm.pool import Pool

log = logging.getLogger("kvplug")
INTERVAL_S: Final = 0.25
RETRY_LEAST_S: Final = 1.0
RETRY_MOST_S: Final = 30.0
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
        return watermark < pool.geometry.n_slabs and pool.grow() and int(t[lay.H_WATERMARK]) > watermark


class Growth:
    """Memory for one slab after another, and patience while there is none.

    What is short now may be there in a second: an engine was loading weights, a file was in the way. So a refusal ends
    nothing. It is tried again after a pause, which doubles up to RETRY_MOST_S and begins anew when memory was had.
    """

    def __init__(self, seg: segment.Segment) -> None:
        self._segment = seg
        self._pause_s = 0.0
        self._not_before = 0.0

    def next_slab(self, slab: int) -> int:
        """Take memory for ``slab``, the one at the watermark. The slab; -1: none is left, or no memory for now."""
        if slab >= self._segment.geometry.n_slabs or time.monotonic() < self._not_before:
            return -1
        reason = self._reserve(slab)
        if reason:
            self._put_off(slab, reason)
        if reason is not None:
            return -1
        if self._pause_s:
            self._pause_s = 0.0
            log.warning("kvplug: pool %r grows again, from %s", self._segment.pool, self._so_far(slab))
        return slab

    def _reserve(self, slab: int) -> str | None:
        """Take the memory: None, or why it was not to be had; an empty string: the pool was removed."""
        g = self._segment.geometry
        memory = hostmem.memory()
        spare = memory.limit_bytes - memory.used_bytes
        if memory.limit_bytes and spare < g.slab_bytes + hostmem.MEMORY_RESERVE_BYTES:
            return (
                f"{format_size(max(spare, 0))} of {format_size(memory.limit_bytes)} of memory are unused "
                f"({memory.source}), and it takes {format_size(g.slab_bytes)} at a time and leaves "
                f"{format_size(hostmem.MEMORY_RESERVE_BYTES)} to others"
            )
        began = time.monotonic()
        try:
            if not self._segment.reserve_slab(slab):
                return ""
        except OSError as e:
            return f"{hostmem.DEV_SHM} has no more room: {e.strerror}"
        log.debug("kvplug: reserved slab %d in %.1f ms", slab, (time.monotonic() - began) * 1e3)
        return None

    def _put_off(self, slab: int, reason: str) -> None:
        is_news = not self._pause_s
        self._pause_s = min(max(self._pause_s * 2, RETRY_LEAST_S), RETRY_MOST_S)
        self._not_before = time.monotonic() + self._pause_s
        if is_news:
            log.warning(
                "kvplug: pool %r can't grow for now, it stays at %s: %s. So blocks are evicted sooner. It is tried "
                "again, every %d s at the latest; give the machine or container more memory, or create the pool with a "
                "smaller KVPLUG_SIZE",
                self._segment.pool,
                self._so_far(slab),
                reason,
                RETRY_MOST_S,
            )

    def _so_far(self, slab: int) -> str:
        g = self._segment.geometry
        return f"{format_size(slab * g.slab_bytes)} of {format_size(g.data_bytes)}"
