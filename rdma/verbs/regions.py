"""A pool's memory as an RDMA device sees it: registered region by region, when somebody first wants one.

Registering pins a region's pages and makes those that had none, which takes some milliseconds a region; the pool
reserves its memory anyway. Doing all of a large pool at once would take minutes and hold memory that nobody reads,
so a region is registered when a block in it is first read or written remotely, and stays so. A thread does it, in the
order of asking: who asks waits for a moment, and takes another path for what is not ready by then.

Regions are equal stretches of the segment, so that a block's keys follow from its offset. There is no bound on the
segment: beyond MAX_REGIONS of them they are larger.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import VerbsError
from kvplug.rdma.blocks import U8
from kvplug.rdma.control.protocol import I64
from kvplug.rdma.verbs.binding import U32, Device, Region
from kvplug.threads import guarded

REGION_BYTES: Final = 32 << 20
MAX_REGIONS: Final = 1 << 15
"""So many of 32 MiB make 1 TiB."""
CLOSE_S: Final = 5.0


def region_bytes(nbytes: int, most: int) -> int:
    """Bytes of one region of a segment of ``nbytes``, where a device can have ``most`` of them for everybody."""
    size = REGION_BYTES
    while size * max(1, min(MAX_REGIONS, most // 2)) < nbytes:
        size *= 2
    return size


class Regions:
    """One device's regions of one segment. Thread-safe."""

    def __init__(self, device: Device, memory: U8, access: int, *, each_bytes: int) -> None:
        """``access``: of the binding's. ``memory`` is held until :meth:`close`."""
        self._device, self._memory, self._access = device, memory, access
        self.base = int(memory.ctypes.data)
        self.nbytes = len(memory)
        self.each_bytes = each_bytes
        count = -(-self.nbytes // each_bytes)
        self._regions: list[Region | None] = [None] * count
        self._lkeys, self._rkeys = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
        self._ready = np.zeros(count, np.bool_)
        self._asked: dict[int, None] = {}  # in the order of asking
        self._failed: dict[int, VerbsError] = {}
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._regions)

    @property
    def registered(self) -> int:
        """How many are registered."""
        return int(self._ready.sum())

    def keys(self, which: I64, deadline: float) -> tuple[npt.NDArray[np.bool_], U32, U32]:
        """(whether it is ready, lkey, rkey) of each of these regions, registered by ``deadline`` (time.monotonic()).

        Those that are not ready by then are registered all the same, a little later. Raises VerbsError: the device
        refuses one of them.
        """
        if not self._ready[which].all():
            with self._changed:
                missing = [one for one in np.unique(which).tolist() if not self._ready[one]]
                self._ask(missing)
                while missing and not self._closed:
                    failed = [self._failed.pop(one) for one in missing if one in self._failed]
                    if failed:
                        raise failed[0]
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                    missing = [one for one in missing if not self._ready[one]]
        return self._ready[which], self._lkeys[which], self._rkeys[which]

    def _ask(self, missing: list[int]) -> None:
        if self._closed:
            raise VerbsError("the device was closed")
        for one in missing:
            if one not in self._asked:
                self._failed.pop(one, None)
                self._asked[one] = None
        if self._worker is None:
            register = guarded("kvplug-register", self._register, "the next one who asks begins it again")
            self._worker = threading.Thread(target=register, name="kvplug-register", daemon=True)
            try:
                self._worker.start()
            except RuntimeError:  # no thread is left: tried again with the next read
                self._give_up("this process can have no more threads")
                raise VerbsError("memory can't be registered: this process can have no more threads") from None

    def _register(self) -> None:
        why = "an error of kvplug's own"
        try:
            self._register_asked()
            why = ""
        finally:
            if why:
                with self._changed:
                    self._give_up(why)

    def _give_up(self, why: str) -> None:
        """With the mutex held: nobody works on what was asked for, and whoever waits is told."""
        self._worker = None
        self._failed |= {one: VerbsError(f"memory can't be registered: {why}") for one in self._asked}
        self._asked.clear()
        self._changed.notify_all()

    def _register_asked(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._asked:
                    self._worker = None
                    return
                one = next(iter(self._asked))  # it stays there while it is worked on: nobody asks for it twice
            at = one * self.each_bytes
            region: Region | None = None
            failed: VerbsError | None = None
            try:
                size = min(self.each_bytes, self.nbytes - at)
                region = self._device.register(self.base + at, size, self._access)
            except VerbsError as e:
                failed = e
            with self._changed:
                del self._asked[one]
                if failed is not None:
                    self._failed[one] = failed
                elif region is not None and not self._closed:
                    self._lkeys[one], self._rkeys[one] = region.lkey, region.rkey
                    self._regions[one], region = region, None
                    self._ready[one] = True
                self._changed.notify_all()
            if region is not None:
                with contextlib.suppress(VerbsError):  # closed meanwhile
                    region.close()

    def close(self) -> None:
        """Deregister all of them. Idempotent. Raises VerbsError: the device refuses."""
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
        if worker is not None:
            worker.join(CLOSE_S)
        with self._changed:
            regions, self._regions = self._regions, []
            self._ready[:] = False
        for region in regions:
            if region is not None:
                region.close()
