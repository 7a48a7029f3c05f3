"""The owner's end of reads by verbs: queue pairs that readers may read from, and the keys that open its memory.

A reader that has proved itself asks on its control connection, and what it was given goes with that connection. Each
queue pair is read from and does nothing itself; the memory is registered for reading only, region by region, and a key
is told only to who has a lease on a block in that region.

What nothing here can do is to take a key back: a region's key opens all of that region, to every queue pair of this
agent, until the agent ends. So a lease that has run out does not stop a READ; the reader's clock and checksums do.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from kvplug.errors import ProtocolError, VerbsError
from kvplug.rdma.blocks import U8
from kvplug.rdma.control import protocol as p
from kvplug.rdma.control.leases import Lease
from kvplug.rdma.verbs.binding import REMOTE_READ, Endpoint, QueuePair
from kvplug.rdma.verbs.rails import Rails, devices_present
from kvplug.rdma.verbs.reads import split

if TYPE_CHECKING:
    from kvplug.config import Config

log = logging.getLogger("kvplug")

MAX_QUEUES: Final = 1024  # of all readers
REGISTER_S: Final = 0.5
"""Longest that an answer waits for memory to be registered."""
TRY_AGAIN_S: Final = 10.0
RESPONDER_DEPTH: Final = 1


class QueueServer:
    """The queue pairs of one agent. Thread-safe."""

    def __init__(self, config: Config, memory: U8, count: Callable[[str, int], None]) -> None:
        self._config, self._memory, self._count = config, memory, count
        self._mutex = threading.Lock()
        self._opening = threading.Lock()
        self._rails: Rails | None = None
        self._next_try = 0.0
        self._warned = False
        self._queues: dict[int, dict[int, QueuePair]] = {}
        self._open = 0
        self._closed = False

    def open_devices(self) -> Rails:
        """Its rails. Raises VerbsError."""
        with self._opening:
            if self._closed:
                raise VerbsError("the agent has ended")
            if self._rails is None:
                self._rails = Rails(self._config, self._memory, REMOTE_READ)
            return self._rails

    def offered(self) -> bool:
        """Whether readers may come over verbs: there is a device, and it can be opened."""
        if self._rails is not None:
            return True
        if not devices_present() or time.monotonic() < self._next_try:
            return False
        try:
            self.open_devices()
        except VerbsError as e:
            self._next_try = time.monotonic() + TRY_AGAIN_S
            if not self._warned:
                self._warned = True
                log.warning("this agent serves over TCP alone: %s", e)
            return False
        return True

    def answer(self, message: p.OpenQueue | p.GetRegions, reader: int, near: str, lease: Lease | None) -> p.Message:
        """The answer to either. ``near``: this host's address to that reader; ``lease``: the one that is named."""
        if self._rails is None:
            return p.Failed("request")
        try:
            if isinstance(message, p.OpenQueue):
                return self._connect(message, reader, near)
            return self._keys(message, lease)
        except VerbsError as e:
            self._count("verbs_errors", 1)
            log.debug("for reader %d: %s", reader, e)
            return p.Failed("busy")

    def _connect(self, message: p.OpenQueue, reader: int, near: str) -> p.Message:
        rails = self.open_devices().all
        rail = rails[message.rail % len(rails)]
        with self._mutex:
            mine = self._queues.setdefault(reader, {})
            gone = [mine.pop(qpn) for qpn in message.instead if qpn in mine]
            full = len(mine) >= p.MAX_QUEUES_A_READER or self._open - len(gone) >= MAX_QUEUES
            self._open += (not full) - len(gone)
        _destroy(gone)
        if full:
            return p.Failed("busy")
        queue: QueuePair | None = None
        try:
            queue = rail.device.queue_pair(RESPONDER_DEPTH)
            ours, gid_index = rail.endpoint(queue.qpn, near)
            theirs = Endpoint(*msgspec.structs.astuple(message.queue))
            queue.connect(ours, theirs, port=rail.port.number, gid_index=gid_index)
            with self._mutex:
                here = self._queues.get(reader)
                if here is None:
                    raise VerbsError("the reader has gone")
                here[queue.qpn] = queue
        except VerbsError:
            with self._mutex:
                self._open -= 1
            _destroy([queue] if queue else [])
            raise
        self._count("queues_opened", 1)
        regions = rail.regions
        end = p.QueueEnd(ours.qpn, ours.psn, ours.gid, ours.lid, ours.mtu, min(ours.reads, theirs.reads))
        return p.QueueOpened(end, rail.number, regions.base, regions.nbytes, regions.each_bytes)

    def _keys(self, message: p.GetRegions, lease: Lease | None) -> p.Message:
        if lease is None:
            return p.Failed("lease")
        found = [rail.regions for rail in self.open_devices().all if rail.number == message.device]
        if not found:
            return p.Failed("request")
        regions = found[0]
        wanted = p.array(message.regions, np.uint32).astype(np.int64)
        which, ahead, _ = split(lease.offsets, lease.nbytes, regions.each_bytes)
        theirs = np.unique((lease.offsets[which] + ahead) // regions.each_bytes)
        if not np.isin(wanted, theirs).all():
            raise ProtocolError("a region in which no block of the lease lies")
        registered = regions.registered
        ready, _, rkeys = regions.keys(wanted, time.monotonic() + min(message.seconds, REGISTER_S))
        self._count("regions_registered", regions.registered - registered)
        return p.RegionKeys(p.raw(ready, np.bool_), p.raw(np.where(ready, rkeys, 0), np.uint32))

    def forget(self, reader: int) -> None:
        """The reader has gone: destroy its queue pairs."""
        with self._mutex:
            gone = list(self._queues.pop(reader, {}).values())
            self._open -= len(gone)
        _destroy(gone)

    def close(self) -> None:
        """Destroy all of them and close the devices: from now on nobody reads this pool by verbs. Idempotent."""
        with self._mutex:
            readers = list(self._queues)
        for reader in readers:
            self.forget(reader)
        with self._opening:
            self._closed = True
            rails, self._rails = self._rails, None
        if rails is not None:
            rails.close()


def _destroy(queues: list[QueuePair]) -> None:
    for queue in queues:
        with contextlib.suppress(VerbsError):  # the kernel does, with the process at the latest
            queue.close()
