"""The CPU's copies, and that the suite would notice copies that are wrong."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy
from kvplug.adapters.devices.cpu import CpuCopy
from tests.devices.conformance import Conformance, Rig, Trial, fresh_rng
from tests.devices.layouts import NAMES, layout_of, narrow

MAPPING_BYTES = 16 << 20
SLAB_BYTES = 4 << 20


def rig_of(copy: DeviceCopy, mapping_bytes: int = MAPPING_BYTES) -> Rig:
    return Rig(copy, "cpu", memory=mmap.mmap(-1, mapping_bytes), slab_bytes=SLAB_BYTES, large=True)


@pytest.fixture(scope="module")
def made() -> Rig:
    return rig_of(CpuCopy())


class TestCpu(Conformance):
    @pytest.fixture
    def rig(self, made: Rig) -> Rig:
        return made


class Wrong(CpuCopy):
    """Copies, but for one thing."""

    def __init__(self, what: str) -> None:
        self.what = ""
        super().__init__()
        self.what = what

    def store(self, runs: ByteRuns, block_ids: Any, dst: Any, after: Any) -> Any:
        if self.what == "a run is short" and len(runs.nbytes):
            runs = ByteRuns(runs.base, runs.stride, np.array([*runs.nbytes[:-1], runs.nbytes[-1] - 1]))
        if self.what == "runs change places":
            runs = ByteRuns(*(np.ascontiguousarray(table[::-1]) for table in (runs.base, runs.stride, runs.nbytes)))
        if self.what == "the last block is left out":
            block_ids, dst = np.append(block_ids[:-1], block_ids[:1]), np.append(dst[:-1], dst[:1])
        if self.what == "a byte too many":
            np.frombuffer(self.host, np.uint8)[int(dst[0]) - self.base + runs.part_nbytes] ^= 1
        hashes = super().store(runs, block_ids, dst, after)
        if self.what == "the checksum is of something else":
            hashes[-1] ^= np.uint64(1)
        return hashes

    def load(self, runs: ByteRuns, src: Any, block_ids: Any, after: Any) -> None:
        if self.what == "a block beside":
            block_ids = (block_ids + 1) % (int(block_ids.max()) + 1)
        if self.what == "another slot":
            src = np.roll(src, 1)
        super().load(runs, src, block_ids, after)


STORES: dict[str, Callable[[Trial, Any], None]] = dict.fromkeys(
    (
        "a run is short",
        "runs change places",
        "the last block is left out",
        "a byte too many",
        "the checksum is of something else",
    ),
    lambda trial, blocks: trial.store(blocks, trial.slots(len(blocks))),
)
LOADS: dict[str, Callable[[Trial, Any], None]] = dict.fromkeys(
    ("a block beside", "another slot"), lambda trial, blocks: trial.load(trial.slots(len(blocks)), blocks)
)


@pytest.mark.parametrize("what", [*STORES, *LOADS])
def test_the_suite_notices_copies_that_are_wrong(what: str) -> None:
    wrong = Wrong(what)
    rig = rig_of(wrong, SLAB_BYTES)
    wrong.host, wrong.base = rig.memory, rig.host.ctypes.data
    rng = fresh_rng()
    trial = Trial(rig, layout_of(NAMES[1], narrow(2)), rng)
    blocks = rng.permutation(trial.layout.num_blocks)[:5].astype(np.int64)
    with pytest.raises(AssertionError):
        (STORES | LOADS)[what](trial, blocks)
