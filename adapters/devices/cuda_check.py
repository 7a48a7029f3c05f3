"""What happens at start, before an engine's blocks are copied: the choice is measured, and copies are tried out.

Both use scratch memory, on the device and in a shared mapping, so the engine's cache and the pool are not touched.
The check copies random bytes in the engine's own layouts (same lengths, same alignment), from pinned memory and
through the ring, and compares every byte with what the CPU's copies make of them. kvplug is on only if nothing differs.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from kvplug.adapters.devices.base import ByteRuns, Int64s
from kvplug.adapters.devices.cuda import CudaCopy, new_lanes
from kvplug.adapters.devices.planning import HostMemory, dma_from_bytes, like, signature
from kvplug.adapters.devices.streams import ALWAYS_DMA, NEVER_DMA, Choice, Lane
from kvplug.errors import DeviceCopyError, DeviceError, KvplugError
from kvplug.shm.copy import gather_runs, scatter_runs

SIZES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10)
MEASURED_BYTES = 32 << 20
"""So much takes more than half a millisecond: what a call and a wake-up cost does not decide."""
SPARE_BYTES = 2 << 20
REPEATS = 5
CHECKED_BYTES = 8 << 20
CHECKED_BLOCKS = 7
PAGE_BYTES = 4096

Lanes: TypeAlias = "dict[bool, Lane] | None"
"""What :class:`CudaCopy` takes."""


def start(memory: HostMemory, index: int, layouts: Sequence[ByteRuns]) -> CudaCopy:
    """Copies for the engine on device ``index``, measured and checked in these layouts.

    Raises DeviceError with the reason why CUDA copies can't be used here.
    """
    try:
        lanes = new_lanes(index)
        choice, kernels = measure(index, lanes=lanes)
        check(index, layouts, choice, kernels=kernels, lanes=lanes)
        return CudaCopy(memory, index, choice, kernels=kernels, lanes=lanes)
    except KvplugError:
        raise
    except Exception as error:
        raise DeviceError(f"CUDA copies could not be tried out: {type(error).__name__}: {error}") from error


class Scratch:
    """Memory to try copies with: some on the device, and a shared mapping in two slabs."""

    def __init__(self, index: int, device_bytes: int, host_bytes: int) -> None:
        slab = -(-host_bytes // 2 // PAGE_BYTES) * PAGE_BYTES
        self.mapping = mmap.mmap(-1, 2 * slab)
        self.host = np.frombuffer(self.mapping, np.uint8)
        self.memory = HostMemory(self.host.ctypes.data, 2 * slab, 0, slab)
        self.device = torch.empty(device_bytes, dtype=torch.uint8, device=torch.device("cuda", index))
        torch.cuda.synchronize(index)

    def slots(self, part_nbytes: int, count: int, rng: np.random.Generator) -> Int64s:
        """Addresses of parts, in any order, none of them in both slabs."""
        each = -(-part_nbytes // 64) * 64
        per_slab = self.memory.slab_bytes // each
        at = rng.permutation(2 * per_slab)[:count]
        addresses: Int64s = self.memory.base + at // per_slab * self.memory.slab_bytes + at % per_slab * each
        return addresses


@contextlib.contextmanager
def copies(scratch: Scratch, index: int, choice: Choice, **how: Any) -> Iterator[CudaCopy]:
    """Copies over scratch memory, closed afterwards."""
    copy = CudaCopy(scratch.memory, index, choice, **how)
    try:
        yield copy
    finally:
        copy.close()


# -- the choice ------------------------------------------------------------------------------------------------------


def measure(index: int, sizes: Sequence[int] = SIZES, *, lanes: Lanes = None) -> tuple[Choice, bool]:
    """(which runs the copy engines move faster than the kernel on this device and host, whether the kernel works)."""
    found = timings(index, sizes, lanes=lanes)
    if len(found) < 4:  # one way only: there is nothing to choose
        return Choice(), (True, "kernel") in found
    stores, loads = (
        dma_from_bytes(sizes, found[to_slots, "dma"], found[to_slots, "kernel"]) for to_slots in (True, False)
    )
    return Choice(stores, loads), True


def timings(index: int, sizes: Sequence[int] = SIZES, *, lanes: Lanes = None) -> dict[tuple[bool, str], list[float]]:
    """Seconds that MEASURED_BYTES take in runs of each length, by (to slots, "dma" or "kernel").

    A way that is not there, or a kernel that can't be compiled, has no entry: what is left must pass the check alone.
    """
    scratch, rng = Scratch(index, MEASURED_BYTES, MEASURED_BYTES + SPARE_BYTES), np.random.default_rng(0)
    out: dict[tuple[bool, str], list[float]] = {}
    for name, choice in (("dma", ALWAYS_DMA), ("kernel", NEVER_DMA)):
        with copies(scratch, index, choice, lanes=lanes) as copy:
            if (name == "dma" and not copy.driver.has_batches) or (name == "kernel" and copy.kernels is None):
                continue
            for to_slots in (True, False):
                try:
                    out[to_slots, name] = [_time(copy, scratch, size, to_slots, rng) for size in sizes]
                except DeviceError:
                    if name == "dma":
                        raise
    return out


def _time(copy: CudaCopy, scratch: Scratch, size: int, to_slots: bool, rng: np.random.Generator) -> float:
    blocks = MEASURED_BYTES // size
    runs = ByteRuns.of([(scratch.device.data_ptr(), size, size)])
    ids, slots = rng.permutation(blocks), scratch.slots(size, blocks, rng)
    call: Callable[..., None] = copy.store_unhashed if to_slots else copy.load
    given = (runs, ids, slots, None) if to_slots else (runs, slots, ids, None)
    call(*given)  # registers, compiles
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        call(*given)
        best = min(best, time.perf_counter() - began)
    return best


# -- the check -------------------------------------------------------------------------------------------------------


def check(
    index: int, layouts: Sequence[ByteRuns], choice: Choice, *, kernels: bool = True, lanes: Lanes = None
) -> None:
    """Random bytes to slots and back in each of these layouts. DeviceCopyError, with the first difference."""
    distinct = {signature(runs): runs for runs in layouts if len(runs.nbytes) and runs.part_nbytes}
    rng = np.random.default_rng()
    for runs in distinct.values():
        part = runs.part_nbytes
        blocks = max(2, min(CHECKED_BLOCKS, CHECKED_BYTES // part))
        _, device_bytes = like(runs, blocks, 0)
        each = -(-part // 64) * 64
        scratch = Scratch(index, device_bytes, 2 * (-(-blocks // 2) + 1) * each)
        for way, pin in (("pinned slots", True), ("the ring", False)):
            with copies(scratch, index, choice, pin=pin, kernels=kernels, lanes=lanes) as copy:
                _there_and_back(copy, scratch, like(runs, blocks, scratch.device.data_ptr())[0], blocks, way, rng)


def _there_and_back(
    copy: CudaCopy, scratch: Scratch, runs: ByteRuns, blocks: int, way: str, rng: np.random.Generator
) -> None:
    mirror = rng.integers(0, 256, scratch.device.numel(), np.uint8)
    scratch.device.copy_(torch.from_numpy(mirror))
    on_host = ByteRuns(runs.base - scratch.device.data_ptr() + mirror.ctypes.data, runs.stride, runs.nbytes)
    ids, slots = rng.permutation(blocks), scratch.slots(runs.part_nbytes, blocks, rng)
    scratch.host[:] = 0xA5
    expected, sums = scratch.host.copy(), np.empty(blocks, np.int64)
    shifted = slots - scratch.host.ctypes.data + expected.ctypes.data
    gather_runs(ids, shifted, on_host.base, on_host.stride, on_host.nbytes, sums)
    hashes = copy.store(runs, ids, slots, copy.mark())
    _same(scratch.host, expected, f"a store to {way}")
    if not np.array_equal(hashes.view(np.int64), sums):
        raise DeviceCopyError(f"a store to {way} has other checksums than its bytes")
    scratch.host[:] = np.frombuffer(rng.bytes(scratch.host.nbytes), np.uint8)
    scatter_runs(ids, slots, on_host.base, on_host.stride, on_host.nbytes)
    copy.load(runs, slots, ids, copy.mark())
    _same(scratch.device.cpu().numpy(), mirror, f"a load from {way}")


def _same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], what: str) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise DeviceCopyError(f"{what} differs in {wrong} of {len(found)} bytes")
