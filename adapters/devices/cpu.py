"""The device whose memory is this process's own: copies are memcpy, done without the GIL.

There is no stream to wait for. An engine on a CPU has finished a step's work when the step returns, so a mark taken
after the forward pass is always already reached.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy, Int64s, UInt64s
from kvplug.shm.copy import gather_runs, scatter_runs


class CpuCopy(DeviceCopy):
    """Copies with the compiled kernels of ``kvplug.shm.copy``; store hashes while the bytes are in cache."""

    def __init__(self) -> None:
        none, no_runs = (
            np.empty(0, dtype=np.int64),
            ByteRuns.of([]),
        )  # compiled or fetched now, not at the first request
        self.store(no_runs, none, none, None)
        self.load(no_runs, none, none, None)

    def mark(self, also: Any = None) -> Any:
        """Nothing: see the module's first lines."""
        return None

    def store(self, runs: ByteRuns, block_ids: Int64s, dst: Int64s, after: Any) -> UInt64s:
        """See :meth:`DeviceCopy.store`."""
        hashes = np.empty(len(block_ids), dtype=np.int64)
        gather_runs(block_ids, dst, runs.base, runs.stride, runs.nbytes, hashes)
        return hashes.view(np.uint64)

    def load(self, runs: ByteRuns, src: Int64s, block_ids: Int64s, after: Any) -> None:
        """See :meth:`DeviceCopy.load`."""
        scatter_runs(block_ids, src, runs.base, runs.stride, runs.nbytes)

    def close(self) -> None:
        """Nothing is held."""
