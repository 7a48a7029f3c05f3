"""The conformance suite over the kernel, run by Triton's interpreter: in a child of ``test_interpreter.py``.

The kernel, its tables and the words that it moves are those that run on a GPU. What the interpreter can't show is
what only a device does: order between streams, and what the compiler makes of the kernel.
"""

from __future__ import annotations

import mmap
import threading
from typing import Any

import numpy as np
import pytest
import torch
import triton

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy, Int64s, UInt64s
from kvplug.adapters.devices.kernels import KernelCopies
from kvplug.adapters.devices.planning import Layout
from kvplug.shm.copy import hash_batch
from tests.devices.conformance import Conformance, Rig, Trial, fresh_rng
from tests.devices.layouts import NAMES, layout_of, narrow

MAPPING_BYTES = 3 << 20
SLAB_BYTES = 1 << 20
MANY = 200


class InterpretedCopy(DeviceCopy):
    """All runs by the kernel, over memory of the host, in several groups a batch."""

    def __init__(self) -> None:
        self.kernels = KernelCopies("cpu", programs=3, piece_bytes=512)
        self._layouts: dict[int, tuple[ByteRuns, Layout]] = {}
        self._lock = threading.Lock()  # the interpreter's, which runs one kernel at a time

    def mark(self, also: Any = None) -> Any:
        return None

    def _copy(self, runs: ByteRuns, block_ids: Int64s, slots: Int64s, to_slots: bool) -> None:
        _, layout = self._layouts.setdefault(id(runs), (runs, Layout.of(runs)))
        jobs = torch.from_numpy(np.concatenate([block_ids, slots]))
        for some in (slice(0, len(slots) // 2), slice(len(slots) // 2, len(slots))):
            with self._lock:
                self.kernels.copy(layout, jobs, len(slots), some, slots[some], to_slots=to_slots)

    def store(self, runs: ByteRuns, block_ids: Int64s, dst: Int64s, after: Any) -> UInt64s:
        self._copy(runs, block_ids, dst, True)
        hashes = np.empty(len(dst), np.int64)
        hash_batch(dst.astype(np.int64), np.full(len(dst), runs.part_nbytes, np.int64), hashes)
        return hashes.view(np.uint64)

    def load(self, runs: ByteRuns, src: Int64s, block_ids: Int64s, after: Any) -> None:
        self._copy(runs, block_ids, src, False)

    def close(self) -> None:
        """Nothing is held."""


def rig_of(copy: DeviceCopy) -> Rig:
    memory = mmap.mmap(-1, MAPPING_BYTES)
    return Rig(copy, "cpu", memory=memory, slab_bytes=SLAB_BYTES, large=False, many=MANY)


@pytest.fixture(scope="module")
def made() -> Rig:
    return rig_of(InterpretedCopy())


class TestInterpreted(Conformance):
    @pytest.fixture
    def rig(self, made: Rig) -> Rig:
        return made


def test_it_is_the_interpreter_that_runs() -> None:
    assert triton.knobs.runtime.interpret


def test_words_are_as_large_as_everything_is_aligned() -> None:
    """Fast where it can be, right where it can't: the same layout is moved in words of 8 bytes and byte by byte."""
    copy = InterpretedCopy()
    rig, rng = rig_of(copy), fresh_rng()
    trial = Trial(rig, layout_of(NAMES[0], narrow(2)), rng)
    blocks = rng.permutation(trial.layout.num_blocks)[:4].astype(np.int64)
    for shift, word in ((0, 8), (4, 4), (2, 2), (7, 1)):
        trial.store(blocks, trial.slots(4, shift))
        trial.load(trial.slots(4, shift), blocks)
        assert word in {word for _, word in copy.kernels._tables}
