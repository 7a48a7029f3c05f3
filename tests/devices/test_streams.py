"""What the host does for copies on streams, with a device that is as late as it may be (``late.py``)."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from kvplug.adapters.devices import streams
from kvplug.adapters.devices.planning import HostMemory
from kvplug.adapters.devices.streams import ALWAYS_DMA, NEVER_DMA, Choice
from kvplug.errors import DeviceCopyError
from tests.devices import late
from tests.devices.conformance import Conformance, Rig, Trial, fresh_rng
from tests.devices.layouts import NAMES, layout_of, narrow

MAPPING_BYTES = 4 << 20
SLAB_BYTES = 512 << 10
WAYS: dict[str, dict[str, Any]] = {
    "copy engines": {"choice": ALWAYS_DMA, "kernels": False},
    "kernel": {"choice": NEVER_DMA},
    "both, some slabs refused": {"choice": Choice(200, 100), "refuse_odd": True},
    "ring": {"choice": Choice(100, 200), "pin": False},
}


def rig_of(**how: Any) -> Rig:
    mapping = mmap.mmap(-1, MAPPING_BYTES)
    memory = HostMemory(np.frombuffer(mapping, np.uint8).ctypes.data, MAPPING_BYTES, 0, SLAB_BYTES)
    copy = late.LateCopy(memory, **how)
    copy.checksum_threads = 3
    return Rig(copy, "cpu", memory=mapping, slab_bytes=SLAB_BYTES, large=False)


@pytest.fixture(scope="module", params=WAYS)
def made(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """With small groups, batches and shares, so that there are several of each."""
    with pytest.MonkeyPatch.context() as smaller:
        smaller.setattr(streams, "GROUP_BYTES", 4 << 10)
        smaller.setattr(streams, "MOST_BLOCKS", 500)
        smaller.setattr(streams, "HASHED_ALONE_BYTES", 1)
        rig = rig_of(**WAYS[request.param])
        yield rig
        rig.copy.close()


class TestStreams(Conformance):
    @pytest.fixture
    def rig(self, made: Rig) -> Rig:
        return made


@pytest.mark.parametrize(("way", "to_slots"), [("copy engines", True), ("ring", True), ("ring", False)])
def test_an_end_that_is_not_waited_for_is_noticed(way: str, to_slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the suite over a late device would show nothing."""
    monkeypatch.setattr(late, "RING_HALF_BYTES", 2048)
    monkeypatch.setattr(late.End, "synchronize", lambda self: None)
    rig, rng = rig_of(**WAYS[way]), fresh_rng()
    trial = Trial(rig, layout_of(NAMES[0], narrow(2)), rng)
    blocks = rng.permutation(trial.layout.num_blocks).astype(np.int64)
    slots = trial.slots(len(blocks))
    call, given = (trial.store, (blocks, slots)) if to_slots else (trial.load, (slots, blocks))
    with pytest.raises(AssertionError):
        call(*given)


def test_after_an_error_nothing_runs_any_more_and_the_next_copy_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "GROUP_BYTES", 1)
    rig, rng = rig_of(**WAYS["copy engines"]), fresh_rng()
    trial = Trial(rig, layout_of(NAMES[0], narrow(2)), rng)
    blocks = np.arange(4)
    copies = rig.copy.driver.copy_batch
    given: list[Any] = []

    def fails_later(*what: Any) -> None:
        if given:
            raise RuntimeError("the driver said no")
        given.append(what)
        copies(*what)

    with monkeypatch.context() as broken:
        broken.setattr(rig.copy.driver, "copy_batch", fails_later)
        with pytest.raises(DeviceCopyError, match=r"4 blocks into slots.*said no"):
            trial.store(blocks, trial.slots(4))
    stream = given[0][-1]
    assert stream.done == stream.given == 1
    trial.before[:] = rig.host
    trial.store(blocks, trial.slots(4))
    trial.load(trial.slots(4), blocks)
