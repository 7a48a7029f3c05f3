"""The calls of CUDA's driver as they arrive in a library that a compiler made of CUDA's own header: no GPU is needed.

The header is the one in Triton's package, which install.sh brings; ``standin_driver.c`` does what it says.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvplug.adapters.devices import cuda_driver
from kvplug.adapters.devices.cuda_driver import BATCH_SINCE, Driver, _Attributes, _Location
from kvplug.errors import DeviceCopyError, DeviceError

HEADERS = Path(sys.prefix) / "triton" / "triton" / "backends" / "nvidia" / "include"
SOURCE = Path(__file__).with_name("standin_driver.c")
STREAM = 0x5EED
CONTEXT = 0xC0DE
PAGE = mmap.PAGESIZE


class Seen(ctypes.Structure):
    """``struct standin``."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "contexts_set", "batches", "registrations", "version_asked", "flags_asked", "register_flags",
            "device_asked", "attribute_asked", "count", "num_attrs", "order", "stream", "refuse_at",
        )
    ] + [("driver_version", ctypes.c_int64)]  # fmt: skip


def compiled(source: Path, target: Path, *options: str) -> Path:
    assert (HEADERS / "cuda.h").exists(), "no cuda.h here: bash tests/devices/install.sh .venv"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler, "no C compiler here"
    call = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *options, "-I", HEADERS, source, "-o", target]
    made = subprocess.run(call, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(SOURCE, tmp_path_factory.mktemp("driver") / "libcuda.so.1", "-shared", "-fPIC")


class Standin:
    """The library, which nobody else has open, and what it saw."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.seen = Seen.in_dll(self.library, "standin")
        self.library.cuCtxSetCurrent(ctypes.c_void_p(CONTEXT))


@pytest.fixture
def standin(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    own = tmp_path / "libcuda-own.so"
    shutil.copy(library, own)
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(own))
    out = Standin(own)
    yield out
    out.library.cuCtxSetCurrent(None)


def words(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_structures_and_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    code = tmp_path / "sizes.c"
    code.write_text("""
        #include <cuda.h>
        #include <stddef.h>
        #include <stdio.h>
        int main(void) {
            printf("%zu %zu %zu %zu %zu ", sizeof(CUmemcpyAttributes), offsetof(CUmemcpyAttributes, srcAccessOrder),
                   offsetof(CUmemcpyAttributes, srcLocHint), offsetof(CUmemcpyAttributes, dstLocHint),
                   offsetof(CUmemcpyAttributes, flags));
            printf("%zu %zu %zu ", sizeof(CUmemLocation), offsetof(CUmemLocation, type), offsetof(CUmemLocation, id));
            printf("%zu %zu %zu %zu %zu %zu ", sizeof(CUdeviceptr), sizeof(size_t), sizeof(CUresult), sizeof(CUdevice),
                   sizeof(CUdevice_attribute), sizeof(CUdriverProcAddressQueryResult));
            printf("%d %d %d %d %d\\n", CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
                   CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP,
                   CUDA_SUCCESS, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }""")
    said = subprocess.run([compiled(code, tmp_path / "sizes")], capture_output=True, text=True, check=True).stdout
    fields: Any = _Attributes
    place: Any = _Location
    expected = [
        ctypes.sizeof(_Attributes), fields.src_access_order.offset, fields.src_hint.offset, fields.dst_hint.offset,
        fields.flags.offset, ctypes.sizeof(_Location), place.type.offset, place.id.offset,
        8, 8, *[ctypes.sizeof(ctypes.c_int)] * 4,
        cuda_driver._CAN_USE_HOST_POINTER, cuda_driver._SOURCE_IN_STREAM_ORDER, cuda_driver._PORTABLE_AND_MAPPED,
        cuda_driver._SUCCESS, cuda_driver._ALREADY_REGISTERED,
    ]  # fmt: skip
    assert [int(word) for word in said.split()] == expected


def test_a_driver_is_asked_for_what_it_can(standin: Standin) -> None:
    driver = Driver(3)
    assert driver.has_batches
    assert driver.kernels_reach_host
    seen = standin.seen
    assert (seen.device_asked, seen.attribute_asked) == (3, 91)
    assert (seen.version_asked, seen.flags_asked) == (BATCH_SINCE, 0)


@pytest.mark.parametrize(("version", "there"), [(12040, False), (12080, True), (13000, True), (13020, True)])
def test_batches_are_there_since_cuda_12_8_and_with_that_versions_arguments(
    standin: Standin, version: int, there: bool
) -> None:
    """CUDA 13's own function has an argument less."""
    standin.seen.driver_version = version
    driver = Driver(0)
    assert driver.has_batches == there
    if there:
        given, target = batch_of(np.arange(8))
        driver.copy_batch(*given, STREAM)
        assert np.array_equal(target, np.arange(8))
        assert standin.seen.stream == STREAM


def batch_of(content: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """((dst, src, nbytes) of one copy of it, where it goes)."""
    target = np.zeros_like(content)
    return (words(target.ctypes.data), words(content.ctypes.data), words(content.nbytes)), target


def test_a_batch_arrives_whole_in_calls_that_grow(standin: Standin) -> None:
    driver, rng = Driver(0), np.random.default_rng(0)
    source, target = rng.integers(0, 256, 1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
    nbytes = rng.integers(1, 500, 2000)
    at, to = np.cumsum(nbytes) - nbytes, rng.permutation(2000) * 512
    driver.copy_batch(target.ctypes.data + to, source.ctypes.data + at, nbytes, STREAM)
    seen = standin.seen
    assert (seen.num_attrs, seen.order, seen.stream) == (1, 1, STREAM)
    assert (seen.batches, seen.count) == (5, 2000 - 16 - 64 - 256 - 1024)
    expected = np.zeros_like(target)
    for begin, goes, length in zip(at.tolist(), to.tolist(), nbytes.tolist(), strict=True):
        expected[goes : goes + length] = source[begin : begin + length]
    assert np.array_equal(target, expected)
    none = words()
    driver.copy_batch(none, none, none, STREAM)
    assert seen.batches == 5


def test_what_is_refused_is_named(standin: Standin) -> None:
    driver, content = Driver(0), np.arange(100)
    given, _ = batch_of(content)
    three = [np.repeat(numbers, 3) for numbers in given]
    standin.seen.refuse_at = 2
    said = rf"CUDA_ERROR_INVALID_VALUE at copy 2 of 3 \(800 bytes from {given[1][0]:#x}"
    with pytest.raises(DeviceCopyError, match=said):
        driver.copy_batch(*three, STREAM)
    many = [np.repeat(numbers, 150) for numbers in given]
    many[2][100] = 0  # in the third call, which begins at 80
    standin.seen.refuse_at = 1000
    with pytest.raises(DeviceCopyError, match=r"at copy 100 of 150 \(0 bytes"):
        driver.copy_batch(*many, STREAM)
    with pytest.raises(DeviceCopyError, match=r"cuMemcpyBatchAsync: CUDA_ERROR_INVALID_VALUE$"):
        driver.copy_batch(*given, 0)  # the default stream: the driver says that it is no copy's fault


def test_a_range_is_registered_once(standin: Standin) -> None:
    driver, mapping = Driver(0), mmap.mmap(-1, 8 * PAGE)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    assert driver.register(address, 4 * PAGE) == (True, "")
    assert driver.register(address, 4 * PAGE) == (False, "")
    assert driver.register(address + 4 * PAGE, 4 * PAGE) == (True, "")
    assert (standin.seen.register_flags, standin.seen.registrations) == (3, 2)
    across = words(address + 3 * PAGE), words(address), words(2 * PAGE)
    with pytest.raises(DeviceCopyError, match="at copy 0 of 1"):
        driver.copy_batch(*across, STREAM)
    assert driver.unregister(address) == driver.unregister(address + 4 * PAGE) == ""
    assert driver.unregister(address) == "cuMemHostUnregister: CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"
    assert driver.register(address, 0) == (False, "cuMemHostRegister: CUDA_ERROR_INVALID_VALUE")


def test_a_thread_without_a_context_gets_the_devices(standin: Standin) -> None:
    driver, before = Driver(0), standin.seen.contexts_set
    driver.enter()
    assert standin.seen.contexts_set == before
    with mmap.mmap(-1, PAGE) as mapping:
        address, refusals = ctypes.addressof(ctypes.c_char.from_buffer(mapping)), []

        def elsewhere() -> None:
            refusals.append(driver.register(address, PAGE))
            driver.enter()
            refusals.append(driver.register(address, PAGE))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        driver.unregister(address)
    assert refusals == [(False, "cuMemHostRegister: error 201"), (True, "")]
    assert standin.seen.contexts_set == before + 1


def test_without_a_context_or_a_device_there_is_a_typed_error(standin: Standin) -> None:
    with pytest.raises(DeviceError, match="cuDeviceGet: error 101"):
        Driver(8)
    standin.library.cuCtxSetCurrent(None)
    with pytest.raises(DeviceError, match="no context"):
        Driver(0)
