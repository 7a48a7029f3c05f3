"""CUDA: streams, events and buffers by torch, copies in batches and pinned memory by the driver, a kernel by Triton.

The order of things is in ``streams.py``; here is what only CUDA knows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.devices.cuda_driver import Driver
from kvplug.adapters.devices.planning import HostMemory
from kvplug.adapters.devices.streams import MOST_BLOCKS, RING_HALF_BYTES, Choice, Lane, StreamCopy


class CudaLane(Lane):
    """See :class:`Lane`. Made while the device is the current one."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.stream = torch.cuda.Stream(device=device)
        # An engine may make us in inference mode, and what is made in it can't be written outside of it.
        with torch.inference_mode(False):
            self._host_jobs = torch.empty(2 * MOST_BLOCKS, dtype=torch.int64, device="cpu", pin_memory=True)
            self._jobs = torch.empty(2 * MOST_BLOCKS, dtype=torch.int64, device=device)
        self._ends: list[Any] = []
        self._ring = torch.empty(0, dtype=torch.uint8, device="cpu")

    @property
    def handle(self) -> Any:
        """A CUstream."""
        return self.stream.cuda_stream

    @property
    def jobs(self) -> Any:
        """int64[2 * MOST_BLOCKS], of which a batch uses the beginning."""
        return self._jobs

    def running(self) -> AbstractContextManager[Any]:
        """See :meth:`Lane.running`."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self.stream)
        return context

    def wait_for(self, event: Any) -> None:
        """See :meth:`Lane.wait_for`."""
        self.stream.wait_event(event)

    def end(self, number: int) -> Any:
        """See :meth:`Lane.end`."""
        while len(self._ends) <= number:
            self._ends.append(torch.cuda.Event(blocking=True))
        self._ends[number].record(self.stream)
        return self._ends[number]

    def give_jobs(self, block_ids: Int64s, addresses: Int64s) -> None:
        """See :meth:`Lane.give_jobs`."""
        total = len(block_ids)
        written = self._host_jobs.numpy()
        written[:total] = block_ids
        written[total : 2 * total] = addresses
        self._jobs[: 2 * total].copy_(self._host_jobs[: 2 * total], non_blocking=True)

    def halves(self, nbytes: int) -> tuple[int, int]:
        """See :meth:`Lane.halves`; pinned."""
        half = max(RING_HALF_BYTES, nbytes)
        if self._ring.numel() < 2 * half:
            self._ring = torch.empty(2 * half, dtype=torch.uint8, device="cpu", pin_memory=True)
        return self._ring.data_ptr(), self._ring.numel() // 2

    def settle(self) -> None:
        """See :meth:`Lane.settle`."""
        try:
            self.stream.synchronize()
        except RuntimeError:  # the device is lost, and runs nothing
            return


def new_lanes(index: int) -> dict[bool, Lane]:
    """Both lanes of a device. torch hands out 32 streams by turns, the engine's among them: whoever takes many comes
    round to one that the engine computes on."""
    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        return {to_slots: CudaLane(device) for to_slots in (True, False)}


class CudaCopy(StreamCopy):
    """Copies for one device. Thread-safe; a store and a load run beside each other."""

    def __init__(
        self,
        memory: HostMemory,
        index: int,
        choice: Choice | None = None,
        *,
        pin: bool = True,
        kernels: bool = True,
        lanes: dict[bool, Lane] | None = None,
    ) -> None:
        """
        Args:
            memory: the pool's mapping.
            index: the device's number in this process, whose memory the blocks are in.
            choice: what was measured; defaults otherwise.
            pin: False: as if the driver refused to register memory.
            kernels: False: as if there were no Triton.
            lanes: of copies that were closed, to be used again; new ones otherwise.
        """
        self.index = index
        self._device = torch.device("cuda", index)
        with torch.cuda.device(self._device):
            lanes = lanes or new_lanes(index)
            torch.cuda.synchronize(self._device)  # what the buffers' memory was before is over, on every stream
            driver = Driver(index)
        launcher = _kernels(self._device) if kernels and driver.kernels_reach_host else None
        super().__init__(memory, driver, lanes, launcher, choice or Choice(), pin=pin)

    def describe(self) -> str:
        """One line: how runs are moved."""
        if self.kernels is None:
            return f"CUDA device {self.index}: all runs by its copy engines, no kernel can be used"
        if not self.driver.has_batches:
            return f"CUDA device {self.index}: all runs by a kernel, for want of a driver of CUDA 12.8"
        out, back = (self.choice.dma_from(to_slots) for to_slots in (True, False))
        return f"CUDA device {self.index}: runs from {out} bytes on, {back} for loads, by its copy engines"

    def mark(self, also: Any = None) -> Any:
        """Events on the current stream, and on ``also`` if it is another."""
        current = torch.cuda.current_stream(self._device)
        streams = [current] if also is None or also == current else [current, also]
        return [stream.record_event() for stream in streams]


def _kernels(device: Any) -> Any:
    """The kernel's launcher, or None where there is no Triton."""
    try:
        from kvplug.adapters.devices.kernels import KernelCopies
    except ImportError:
        return None
    return KernelCopies(device)
