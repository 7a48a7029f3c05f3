"""The few calls of CUDA's driver that torch has no name for, by ctypes: batched copies and registering memory.

The driver's library is there wherever CUDA works, whatever torch and whatever engine; a call costs a microsecond and
is made without the GIL. Its errors leave no trace in the runtime that torch looks at, so that a refused registration
is not found again by the next kernel launch. Addresses and lengths are handed over as numpy arrays, never one by one.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from kvplug.adapters.devices.base import Int64s
from kvplug.errors import DeviceCopyError, DeviceError

LIBRARY = "libcuda.so.1"
BATCH_SINCE = 12080
"""CUDA 12.8 brought cuMemcpyBatchAsync; asked for by that version, it keeps that version's arguments."""

FIRST_COPIES, MOST_COPIES = 16, 1024
"""Of one call. No document says so, but by what vLLM's developers measured on an H100 a driver begins a call's copies
when it has taken all of them, half a microsecond each. So the first call is short, and the next ones are taken while
the copy engines are busy; bench-gpu shows it beside one call for all."""

_SUCCESS = 0
_ALREADY_REGISTERED = 712
_PORTABLE_AND_MAPPED = 1 | 2
_CAN_USE_HOST_POINTER = 91
"""CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM."""
_SOURCE_IN_STREAM_ORDER = 1


class _Location(ctypes.Structure):
    _fields_ = [("type", c_uint), ("id", c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("src_access_order", c_uint),
        ("src_hint", _Location),
        ("dst_hint", _Location),
        ("flags", c_uint),
    ]


_BATCH = ctypes.CFUNCTYPE(
    c_int, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p
)


class Driver:
    """CUDA's driver for one device, whose context is current in the thread that makes this."""

    def __init__(self, index: int) -> None:
        """``index``: the device's number in this process. DeviceError without a driver or a context."""
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise DeviceError(
                f"CUDA's driver library {LIBRARY} can't be loaded: {error}; see that nvidia-smi works on this host"
            ) from error
        self._context = c_void_p()
        self._check(self._cuda.cuCtxGetCurrent(byref(self._context)), "cuCtxGetCurrent")
        if not self._context:
            raise DeviceError(f"CUDA device {index} has no context in this thread")
        device = c_int()
        self._check(self._cuda.cuDeviceGet(byref(device), c_int(index)), "cuDeviceGet")
        able = c_int()
        code = self._cuda.cuDeviceGetAttribute(byref(able), c_int(_CAN_USE_HOST_POINTER), device)
        self.kernels_reach_host = code == _SUCCESS and bool(able.value)
        """Whether a kernel may use the host's own addresses of registered memory."""
        self._batch = self._find_batch()
        self._attributes = _Attributes(src_access_order=_SOURCE_IN_STREAM_ORDER)

    @property
    def has_batches(self) -> bool:
        """Whether the driver takes copies in batches."""
        return self._batch is not None

    def _find_batch(self) -> Any:
        address, status = c_void_p(), c_int()
        try:
            code = self._cuda.cuGetProcAddress_v2(
                c_char_p(b"cuMemcpyBatchAsync"), byref(address), c_int(BATCH_SINCE), c_uint64(0), byref(status)
            )
        except AttributeError:  # a driver older than 12.0
            return None
        return _BATCH(address.value) if code == _SUCCESS and address.value else None

    def enter(self) -> None:
        """Makes the device's context current in the calling thread, where it is not."""
        current = c_void_p()
        self._check(self._cuda.cuCtxGetCurrent(byref(current)), "cuCtxGetCurrent")
        if current.value != self._context.value:
            self._check(self._cuda.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    def copy_batch(self, dst: Int64s, src: Int64s, nbytes: Int64s, stream: int) -> None:
        """Begins N copies between any addresses that the device reaches, in no particular order among them.

        Args:
            dst: int64[N], C-contiguous like the others; the driver has read all three when this returns.
            src: int64[N].
            nbytes: int64[N], none of them 0.
            stream: a CUstream, not the default one.
        """
        begin, count = 0, FIRST_COPIES
        while begin < len(nbytes):
            self._call_batch(dst, src, nbytes, begin, min(begin + count, len(nbytes)), stream)
            begin, count = begin + count, min(4 * count, MOST_COPIES)

    def _call_batch(self, dst: Int64s, src: Int64s, nbytes: Int64s, begin: int, end: int, stream: int) -> None:
        first, failed, skip = c_size_t(0), c_size_t(-1), 8 * begin
        code = self._batch(
            dst.ctypes.data + skip, src.ctypes.data + skip, nbytes.ctypes.data + skip, end - begin,
            ctypes.addressof(self._attributes), ctypes.addressof(first), 1, ctypes.addressof(failed), stream,
        )  # fmt: skip
        if code != _SUCCESS:
            at, which = begin + failed.value, ""
            if at < len(nbytes):  # SIZE_MAX: it is no copy's fault
                ends = f"{int(nbytes[at])} bytes from {int(src[at]):#x} to {int(dst[at]):#x}"
                which = f" at copy {at} of {len(nbytes)} ({ends})"
            raise DeviceCopyError(f"cuMemcpyBatchAsync: {self._name(code)}{which}")

    def register(self, address: int, nbytes: int) -> tuple[bool, str]:
        """Pins a range of this process's memory for all devices.

        Returns:
            (whether it is ours to unregister, why the range can't be used); the latter is empty if it can.
        """
        code = self._cuda.cuMemHostRegister_v2(c_void_p(address), c_size_t(nbytes), c_uint(_PORTABLE_AND_MAPPED))
        if code == _ALREADY_REGISTERED:
            return False, ""
        return code == _SUCCESS, "" if code == _SUCCESS else f"cuMemHostRegister: {self._name(code)}"

    def unregister(self, address: int) -> str:
        """Gives a registered range back; what went wrong, or nothing."""
        code = self._cuda.cuMemHostUnregister(c_void_p(address))
        return "" if code == _SUCCESS else f"cuMemHostUnregister: {self._name(code)}"

    def _check(self, code: int, call: str) -> None:
        if code != _SUCCESS:
            raise DeviceError(f"{call}: {self._name(code)}")

    def _name(self, code: int) -> str:
        text = c_char_p()
        known = self._cuda.cuGetErrorName(c_int(code), byref(text)) == _SUCCESS and text.value
        return text.value.decode() if known and text.value else f"error {code}"
