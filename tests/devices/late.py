"""A device that is as late as it may be: nothing that its streams are given happens before somebody waits for it.

For what ``streams.py`` does on the host: groups, the ring's halves, buffers that are used again, what is hashed when.
Whatever is looked at or overwritten before its event was waited for is wrong here every time. It is no CUDA: how a real
device orders streams, and whether its driver takes what it is given, only a GPU shows (``test_cuda.py``).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.devices.planning import HostMemory, Layout, descriptors
from kvplug.adapters.devices.streams import MOST_BLOCKS, Choice, Lane, StreamCopy
from kvplug.shm.copy import copy_batch

RING_HALF_BYTES = 64 << 10
NOWHERE = HostMemory(0, 1, 0, 1)

_current = threading.local()


class Stream:
    """Work in the order in which it was given; done when somebody waits for it."""

    def __init__(self) -> None:
        self.given = self.done = 0
        self._left: deque[Callable[[], None]] = deque()

    def give(self, work: Callable[[], None]) -> None:
        self._left.append(work)
        self.given += 1

    def catch_up(self, to: int) -> None:
        while self.done < to:
            self._left.popleft()()
            self.done += 1


class End:
    """An event; recording it anew moves it."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.at = stream, 0

    def synchronize(self) -> None:
        self._stream.catch_up(self.at)


class LateLane(Lane):
    """See :class:`Lane`."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = Stream()
        self._host_jobs, self._jobs = (np.zeros(2 * MOST_BLOCKS, np.int64) for _ in range(2))
        self._ends: dict[int, End] = {}
        self._ring = np.zeros(0, np.uint8)

    @property
    def handle(self) -> Stream:
        return self._stream

    @property
    def jobs(self) -> np.ndarray:
        return self._jobs

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        _current.stream = self._stream
        yield
        del _current.stream

    def wait_for(self, event: Any) -> None:
        """There is nothing to wait for."""

    def end(self, number: int) -> End:
        end = self._ends.setdefault(number, End(self._stream))
        end.at = self._stream.given
        return end

    def give_jobs(self, block_ids: Int64s, addresses: Int64s) -> None:
        total = len(block_ids)
        self._host_jobs[:total] = block_ids
        self._host_jobs[total : 2 * total] = addresses

        def sent() -> None:
            self._jobs[: 2 * total] = self._host_jobs[: 2 * total]

        self._stream.give(sent)

    def halves(self, nbytes: int) -> tuple[int, int]:
        half = max(RING_HALF_BYTES, nbytes)
        if self._ring.nbytes < 2 * half:
            self._ring = np.full(2 * half, 0x5A, np.uint8)
        return self._ring.ctypes.data, self._ring.nbytes // 2

    def settle(self) -> None:
        self._stream.catch_up(self._stream.given)


class LateDriver:
    """Takes copies in batches; registers memory, or refuses every other slab."""

    has_batches = True

    def __init__(self, memory: HostMemory, *, refuse_odd: bool = False) -> None:
        self._memory, self._refuse_odd = memory, refuse_odd

    def enter(self) -> None:
        """There is no context."""

    def copy_batch(self, dst: Int64s, src: Int64s, nbytes: Int64s, stream: Stream) -> None:
        given = dst.copy(), src.copy(), nbytes.copy()  # the driver has read them on return
        stream.give(lambda: copy_batch(*given))

    def register(self, address: int, nbytes: int) -> tuple[bool, str]:
        slab = int(self._memory.slabs_of(np.array([address]))[0])
        return (False, "refused") if self._refuse_odd and slab % 2 else (True, "")

    def unregister(self, address: int) -> str:
        return ""


class LateKernels:
    """What the kernel does, from the jobs as they are when its turn comes."""

    def copy(self, layout: Layout, jobs: np.ndarray, total: int, some: slice, slots: Int64s, *, to_slots: bool) -> None:
        def run() -> None:
            ids, addresses = jobs[some], jobs[total + some.start : total + some.stop]
            assert np.array_equal(addresses, slots)
            near, far, nbytes = descriptors(layout, ids, addresses, NOWHERE)
            dst, src = (far, near) if to_slots else (near, far)
            copy_batch(dst.copy(), src.copy(), nbytes.copy())

        _current.stream.give(run)


class LateCopy(StreamCopy):
    """The host's side of copies, over memory of the host."""

    def __init__(
        self, memory: HostMemory, choice: Choice, *, pin: bool = True, refuse_odd: bool = False, kernels: bool = True
    ) -> None:
        driver = LateDriver(memory, refuse_odd=refuse_odd)
        lanes: dict[bool, Lane] = {True: LateLane(), False: LateLane()}
        super().__init__(memory, driver, lanes, LateKernels() if kernels else None, choice, pin=pin)

    def mark(self, also: Any = None) -> Any:
        return None
