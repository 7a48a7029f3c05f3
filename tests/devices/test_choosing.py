"""Which copies an engine gets, what is refused and how, and what is pinned of the pool. No device is needed."""

from __future__ import annotations

import ctypes.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvplug import config as configuration  # noqa: E402
from kvplug.adapters.devices import device_of, for_device  # noqa: E402
from kvplug.adapters.devices.base import ByteRuns  # noqa: E402
from kvplug.adapters.devices.cpu import CpuCopy  # noqa: E402
from kvplug.adapters.devices.cuda_driver import Driver  # noqa: E402
from kvplug.adapters.devices.pinning import PinnedSlabs  # noqa: E402
from kvplug.adapters.devices.planning import HostMemory  # noqa: E402
from kvplug.errors import DeviceError, UnsupportedEngineError  # noqa: E402
from kvplug.store import KvStore  # noqa: E402
from tests.lab.env import temporary_pool  # noqa: E402

SLAB = 1 << 16
RUNS = [ByteRuns.of([(1 << 20, 512, 512)])]


@pytest.fixture(params=["off", "on"])
def store(request: pytest.FixtureRequest) -> Iterator[KvStore]:
    with temporary_pool("devices") as pool:
        kept = KvStore(config=configuration.load(pool=pool, size="16mib", cuda=request.param))
        yield kept
        kept.close()


def test_the_device_of_the_tensors_decides(store: KvStore) -> None:
    tensors = [torch.zeros(4), torch.zeros(2, 2)]
    assert device_of(tensors) == "cpu"
    assert isinstance(for_device(device_of(tensors), store, RUNS), CpuCopy)


@pytest.mark.parametrize("tensors", [[], [torch.zeros(4), torch.empty(4, device="meta")]])
def test_memory_on_no_device_or_on_several_is_refused(tensors: list[Any]) -> None:
    with pytest.raises(UnsupportedEngineError, match="several devices"):
        device_of(tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda.py")
def test_cuda_is_off_until_it_is_switched_on_and_then_it_must_pass_its_check(store: KvStore) -> None:
    """Off: the line says what switches it on. On, where CUDA does not work: a typed error, which an adapter says."""
    wanted = "KVPLUG_CUDA=on" if store.config.cuda == "off" else "could not be tried out|CUDA"
    with pytest.raises(DeviceError, match=wanted):
        for_device("cuda:0", store, RUNS)


def test_other_devices_are_refused_by_name(store: KvStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="'xpu'"):
        for_device("xpu:0", store, RUNS)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    with pytest.raises(DeviceError, match="ROCm"):
        for_device("cuda:0", store, RUNS)


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a driver")
def test_without_a_driver_there_is_a_typed_error() -> None:
    with pytest.raises(DeviceError, match="libcuda"):
        Driver(0)


class Registrations:
    """Keeps what was asked for; answers as told for each slab."""

    def __init__(self, memory: HostMemory, answers: dict[int, tuple[bool, str]]) -> None:
        self.memory, self.answers = memory, answers
        self.asked: list[int] = []
        self.given_back: list[int] = []

    def register(self, address: int, nbytes: int) -> tuple[bool, str]:
        assert nbytes == self.memory.slab_bytes
        slab = int(self.memory.slabs_of(np.array([address]))[0])
        assert self.memory.slab_address(slab) == address
        self.asked.append(slab)
        return self.answers.get(slab, (True, ""))

    def unregister(self, address: int) -> str:
        self.given_back.append(int(self.memory.slabs_of(np.array([address]))[0]))
        return ""


def slots(memory: HostMemory, *slabs: int) -> np.ndarray:
    return np.array([memory.slab_address(slab) + 64 * slab for slab in slabs])


def test_slabs_are_registered_once_each_and_when_they_are_used() -> None:
    memory = HostMemory(1 << 30, 9 * SLAB + 4096, 4096, SLAB)
    seen = Registrations(memory, {4: (False, "no"), 5: (False, "")})
    pins = PinnedSlabs(memory, seen.register, seen.unregister)
    assert seen.asked == []
    assert pins.pinned(slots(memory, 3, 3, 1)).tolist() == [True] * 3
    assert pins.pinned(slots(memory, 1, 4, 5, 3)).tolist() == [True, False, True, True]
    assert pins.pinned(slots(memory, 4, 5)).tolist() == [False, True]
    assert seen.asked == [1, 3, 4, 5]
    assert pins.counts == (3, 1)
    assert pins.refusal == "no"
    assert pins.pinned(np.array([memory.base, memory.slab_address(9)])).tolist() == [False, False]
    assert pins.close() == []
    assert pins.close() == []
    assert sorted(seen.given_back) == [1, 3], "a registration of somebody else's is left alone"
    assert pins.pinned(slots(memory, 1, 2)).tolist() == [False, False]


def test_where_nothing_is_registered_nothing_is_asked_for() -> None:
    memory = HostMemory(1 << 30, 4 * SLAB, 0, SLAB)
    seen = Registrations(memory, {})
    pins = PinnedSlabs(memory, seen.register, seen.unregister, refuse_all=True)
    assert not pins.pinned(slots(memory, 0, 1, 2)).any()
    assert seen.asked == []
