"""Copies between a device's memory and pinned slots, on streams of their own: everything but the device's own calls.

**Who waits for whom.** A copy waits, on the device, for its mark: an event on the engine's stream. So a store sees what
the engine's kernels wrote, and a load overwrites nothing that they still read. The calling thread, one of an adapter's,
sleeps until the copy's own event: only then is a slot hashed and sealed, a block given to a request, a descriptor
buffer or a ring's half used again. That wait is the one without a deadline of kvplug's own: memory that a device may
still write must not become anybody else's, and the driver ends the wait, with an error, when it loses the device.

**Two ways to move a run.** Long ones are left to the copy engines, thousands in one call; short ones are moved by a
kernel (``kernels.py``). From which length on is measured at start, apart for each direction (``cuda_check.py``), and
where one of the two is missing, the other does it all.

**Checksums** are the host's, of the slot's bytes after they arrived: a store is launched in groups, and each group is
hashed while the next ones are on the bus.

A slot whose slab can't be pinned goes through a ring: copied to it by the one and out of it by the other.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy, Int64s, UInt64s
from kvplug.adapters.devices.pinning import PinnedSlabs
from kvplug.adapters.devices.planning import HostMemory, Layout, as_words, descriptors, groups
from kvplug.errors import DeviceCopyError, DeviceError, KvplugError
from kvplug.shm.copy import copy_batch, copy_hash_batch, hash_batch

MOST_BLOCKS = 4096
"""Blocks of one batch; more are copied in several."""
STORE_CHUNK_BYTES = 64 << 20
GROUP_BYTES = 16 << 20
"""What is hashed at once, while the next group is being copied."""
MOST_GROUPS = 16
RING_HALF_BYTES = 16 << 20
MOST_CHECKSUM_THREADS = 4
CPUS_A_CHECKSUM_THREAD = 4
HASHED_ALONE_BYTES = 2 << 20
"""Less than this is hashed by one thread: handing it out would take longer."""


@dataclass(frozen=True)
class Choice:
    """From which length of a run on the copy engines move it, for each direction."""

    store_dma_from: int = 32 << 10
    load_dma_from: int = 32 << 10

    def dma_from(self, to_slots: bool) -> int:
        """That of one direction."""
        return self.store_dma_from if to_slots else self.load_dma_from


ALWAYS_DMA = Choice(0, 0)
NEVER_DMA = Choice(1 << 62, 1 << 62)


@dataclass(frozen=True)
class _Plan:
    """How the runs of one layout are moved in one direction."""

    runs: ByteRuns
    part_nbytes: int
    by_dma: Layout
    by_kernel: Layout


class Lane(ABC):
    """One direction: its stream, and the buffers that one copy at a time uses."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.launch_s = 0.0
        """How long the host took to give the last batch to the device."""

    @property
    @abstractmethod
    def handle(self) -> Any:
        """The stream, as the driver takes it."""

    @property
    @abstractmethod
    def jobs(self) -> Any:
        """What :meth:`give_jobs` sent, on the device."""

    @abstractmethod
    def running(self) -> AbstractContextManager[Any]:
        """Makes the stream the current one, and its device too."""

    @abstractmethod
    def wait_for(self, event: Any) -> None:
        """What is given to the stream from now on begins after an event of :meth:`DeviceCopy.mark`."""

    @abstractmethod
    def end(self, number: int) -> Any:
        """An event after what was given to the stream so far, whose ``synchronize`` puts the calling thread to sleep.
        Events of the same number are the same one, recorded anew."""

    @abstractmethod
    def give_jobs(self, block_ids: Int64s, addresses: Int64s) -> None:
        """Sends block ids and addresses, MOST_BLOCKS at most, to the device. The batch before this one has ended."""

    @abstractmethod
    def halves(self, nbytes: int) -> tuple[int, int]:
        """(address of the ring, bytes of each half), with halves of at least so many bytes."""

    @abstractmethod
    def settle(self) -> None:
        """After an error: nothing of ours may still run when it is reported."""


class StreamCopy(DeviceCopy):
    """See the module's first lines. Thread-safe; a store and a load run beside each other."""

    chunk_bytes = STORE_CHUNK_BYTES

    def __init__(
        self, memory: HostMemory, driver: Any, lanes: dict[bool, Lane], kernels: Any, choice: Choice, *, pin: bool
    ) -> None:
        """
        Args:
            memory: the pool's mapping.
            driver: copies batches and registers memory, see :class:`~kvplug.adapters.devices.cuda_driver.Driver`.
            lanes: True: into slots, False: into blocks.
            kernels: launches the kernel; None where there is none.
            choice: what was measured.
            pin: False: as if the driver refused to register memory.
        """
        self.driver = driver
        self.choice = choice
        self._memory = memory
        self._lanes = lanes
        self._kernels = kernels
        self._pins = PinnedSlabs(memory, driver.register, driver.unregister, refuse_all=not pin)
        if not driver.has_batches and kernels is None:
            raise DeviceError(
                "this driver takes no copies in batches (CUDA's do since 12.8), and no kernel can be used without"
            )
        self._plans: dict[tuple[int, bool], _Plan] = {}
        cpus = len(os.sched_getaffinity(0))
        self.checksum_threads = max(1, min(MOST_CHECKSUM_THREADS, cpus // CPUS_A_CHECKSUM_THREAD))
        self._hashers = ThreadPoolExecutor(self.checksum_threads, "kvplug-checksum")

    @property
    def kernels(self) -> Any:
        """The kernel's launcher; None where there is none."""
        return self._kernels

    @property
    def pins(self) -> PinnedSlabs:
        """What is pinned of the mapping."""
        return self._pins

    def launch_s(self, *, to_slots: bool) -> float:
        """Seconds that the host took to give the last batch of a direction to the device. For the bench."""
        return self._lanes[to_slots].launch_s

    # -- the interface -----------------------------------------------------------------------------------------------

    def store(self, runs: ByteRuns, block_ids: Int64s, dst: Int64s, after: Any) -> UInt64s:
        """See :meth:`DeviceCopy.store`. DeviceError if the device reports an error; then nothing runs any more."""
        hashes = np.empty(len(block_ids), np.int64)
        self._transfer(runs, block_ids, dst, after, to_slots=True, hashes=hashes)
        return hashes.view(np.uint64)

    def load(self, runs: ByteRuns, src: Int64s, block_ids: Int64s, after: Any) -> None:
        """See :meth:`DeviceCopy.load`. DeviceError as for :meth:`store`."""
        self._transfer(runs, block_ids, src, after, to_slots=False, hashes=None)

    def store_unhashed(self, runs: ByteRuns, block_ids: Int64s, dst: Int64s, after: Any) -> None:
        """A store without checksums, for measuring."""
        self._transfer(runs, block_ids, dst, after, to_slots=True, hashes=None)

    def close(self) -> None:
        """Waits for the streams and gives back what was registered. Idempotent."""
        for lane in self._lanes.values():
            with lane.lock:
                lane.settle()
        try:
            self.driver.enter()
            self._pins.close()
        except DeviceError:  # the device is lost; the end of the process gives its memory back
            pass
        self._hashers.shutdown(wait=False)

    # -- a batch -----------------------------------------------------------------------------------------------------

    def _transfer(
        self, runs: ByteRuns, block_ids: Int64s, slots: Int64s, after: Any, *, to_slots: bool, hashes: Int64s | None
    ) -> None:
        block_ids, slots = as_words(block_ids), as_words(slots)
        lane = self._lanes[to_slots]
        with lane.lock, lane.running():
            try:
                self.driver.enter()
                plan = self._plan(runs, to_slots)
                self._await(lane, after)
                for at in range(0, len(block_ids), MOST_BLOCKS):
                    some = slice(at, min(at + MOST_BLOCKS, len(block_ids)))
                    self._batch(
                        lane, plan, block_ids[some], slots[some], to_slots, None if hashes is None else hashes[some]
                    )
            except BaseException as error:
                lane.settle()
                if isinstance(error, KvplugError) or not isinstance(error, Exception):
                    raise
                way = "into slots" if to_slots else "into blocks"
                raise DeviceCopyError(
                    f"copying {len(block_ids)} blocks {way}: {type(error).__name__}: {error}"
                ) from error

    def _await(self, lane: Lane, after: Any) -> None:
        for event in after or ():
            lane.wait_for(event)

    def _plan(self, runs: ByteRuns, to_slots: bool) -> _Plan:
        key = (id(runs), to_slots)
        plan = self._plans.get(key)
        if plan is None:
            layout = Layout.of(runs)
            large = layout.runs.nbytes >= self.choice.dma_from(to_slots)
            if self._kernels is None:
                large = np.ones_like(large)
            elif not self.driver.has_batches:
                large = np.zeros_like(large)
            plan = _Plan(runs, runs.part_nbytes, layout.only(large), layout.only(~large))
            self._plans[key] = plan  # with the runs, so that their id stays theirs
        return plan

    def _batch(
        self, lane: Lane, plan: _Plan, block_ids: Int64s, slots: Int64s, to_slots: bool, hashes: Int64s | None
    ) -> None:
        pinned = self._pins.pinned(slots)
        if pinned.all():
            self._direct(lane, plan, block_ids, slots, to_slots, hashes)
            return
        for which, way in ((pinned, self._direct), (~pinned, self._through_ring)):
            if which.any():
                own = None if hashes is None else np.empty(int(which.sum()), np.int64)
                way(lane, plan, block_ids[which], slots[which], to_slots, own)
                if hashes is not None and own is not None:
                    hashes[which] = own

    def _direct(
        self, lane: Lane, plan: _Plan, block_ids: Int64s, slots: Int64s, to_slots: bool, hashes: Int64s | None
    ) -> None:
        """All groups are launched at once; a store's are hashed in their order, each when it has arrived."""

        def arrived(some: slice) -> None:
            if hashes is not None:
                self._checksums(slots[some], plan.part_nbytes, hashes[some])

        one = [slice(0, len(block_ids))]
        some = one if hashes is None else groups(len(block_ids), plan.part_nbytes, GROUP_BYTES, MOST_GROUPS)
        self._pipeline(lane, plan, block_ids, slots, self._memory, to_slots, some, len(some), None, arrived)

    def _through_ring(
        self, lane: Lane, plan: _Plan, block_ids: Int64s, slots: Int64s, to_slots: bool, hashes: Int64s | None
    ) -> None:
        """Two groups are under way at most, each in a half of the ring."""
        each = max(64, -(-plan.part_nbytes // 64) * 64)
        ring, half = lane.halves(each)
        number = np.arange(len(block_ids))
        per_half = half // each
        inside = ring + number // per_half % 2 * half + number % per_half * each
        nbytes = np.full(len(block_ids), plan.part_nbytes, np.int64)

        def filled(some: slice) -> None:
            copy_batch(inside[some], slots[some], nbytes[some])

        def arrived(some: slice) -> None:
            sums = np.empty(some.stop - some.start, np.int64)
            copy_hash_batch(slots[some], inside[some], nbytes[some], sums)
            if hashes is not None:
                hashes[some] = sums

        some = groups(len(block_ids), each, per_half * each)
        before, after = (None, arrived) if to_slots else (filled, None)
        own = HostMemory(ring, 2 * half, 0, half)
        self._pipeline(lane, plan, block_ids, inside, own, to_slots, some, 2, before, after)

    def _pipeline(
        self, lane: Lane, plan: _Plan, block_ids: Int64s, addresses: Int64s, memory: HostMemory, to_slots: bool,
        batch: Sequence[slice], most_under_way: int,
        before: Callable[[slice], None] | None, arrived: Callable[[slice], None] | None,
    ) -> None:  # fmt: skip
        """Launches a batch's groups, and does on the host what each needs before it begins and when it has ended."""
        began = time.perf_counter()
        under_way: deque[tuple[slice, Any, Any]] = deque()

        def finish() -> None:
            some, end, _ = under_way.popleft()
            end.synchronize()
            if arrived is not None:
                arrived(some)

        if len(plan.by_kernel):
            lane.give_jobs(block_ids, addresses)
        for number, some in enumerate(batch):
            if len(under_way) == most_under_way:
                finish()
            if before is not None:
                before(some)
            kept = self._launch(lane, plan, block_ids, addresses, memory, to_slots, some)
            under_way.append((some, lane.end(number % MOST_GROUPS if most_under_way > 2 else number % 2), kept))
        lane.launch_s = time.perf_counter() - began
        while under_way:
            finish()

    def _launch(
        self,
        lane: Lane,
        plan: _Plan,
        block_ids: Int64s,
        addresses: Int64s,
        memory: HostMemory,
        to_slots: bool,
        some: slice,
    ) -> Any:
        """Begins one group's copies; what must live until they have ended."""
        kept = None
        if len(plan.by_dma):
            near, far, nbytes = descriptors(plan.by_dma, block_ids[some], addresses[some], memory)
            dst, src = (far, near) if to_slots else (near, far)
            kept = as_words(dst), as_words(src), as_words(nbytes)
            self.driver.copy_batch(*kept, lane.handle)
        if len(plan.by_kernel):
            self._kernels.copy(plan.by_kernel, lane.jobs, len(block_ids), some, addresses[some], to_slots=to_slots)
        return kept

    def _checksums(self, addresses: Int64s, nbytes: int, out: Int64s) -> None:
        """XXH3 of parts that have arrived."""
        lengths = np.full(len(addresses), nbytes, np.int64)
        threads = self.checksum_threads
        if threads == 1 or len(addresses) < threads or len(addresses) * nbytes < HASHED_ALONE_BYTES:
            hash_batch(addresses, lengths, out)
            return
        each = -(-len(addresses) // threads)
        shares = [slice(at, at + each) for at in range(0, len(addresses), each)]
        done = [self._hashers.submit(hash_batch, addresses[one], lengths[one], out[one]) for one in shares]
        for future in done:
            future.result()
