"""Copies between an engine's KV memory and pool slots: one small interface, one file per kind of device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy
from kvplug.errors import DeviceError, UnsupportedEngineError

if TYPE_CHECKING:  # vLLM imports this package in processes that never copy a byte
    from kvplug.store import KvStore

__all__ = ["device_of", "for_device"]


def device_of(tensors: Iterable[Any]) -> str:
    """The one device that all of an engine's cache tensors are on, as torch writes it: ``cpu``, ``cuda:1``.

    UnsupportedEngineError if there are several, or none.
    """
    found = sorted({str(tensor.device) for tensor in tensors})
    if len(found) != 1:
        raise UnsupportedEngineError(f"KV memory on several devices, or on none: {', '.join(found) or 'no tensors'}")
    return found[0]


def for_device(device: str, store: KvStore, layouts: Sequence[ByteRuns]) -> DeviceCopy:
    """The copies between the memory of a device and a store's slots.

    Args:
        device: as torch writes it, see :func:`device_of`.
        store: attached; its mapping is what is copied to and from, its settings say what may be used.
        layouts: all layouts that will be copied; on CUDA each is tried out first.

    Raises:
        DeviceError: there are no copies for this device, they are switched off, or they don't work here.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        from kvplug.adapters.devices.cpu import CpuCopy

        return CpuCopy()
    if kind != "cuda":
        raise DeviceError(f"no copies for devices of kind {kind!r}: only 'cpu' and NVIDIA's 'cuda'")
    return _cuda(int(index or 0), store, layouts)


def _cuda(index: int, store: KvStore, layouts: Sequence[ByteRuns]) -> DeviceCopy:
    import torch

    if torch.version.hip is not None:  # torch calls AMD's devices cuda, too
        raise DeviceError("no copies for AMD GPUs (ROCm): only for CPUs and NVIDIA's GPUs")
    if store.config.cuda != "on":
        raise DeviceError(
            "KV memory is on a CUDA device, and kvplug's copies for CUDA have not yet been run on any GPU: "
            "KVPLUG_CUDA=on uses them, after a check at start that compares what they copy byte by byte"
        )
    from kvplug.adapters.devices import cuda_check
    from kvplug.adapters.devices.planning import HostMemory

    memory = HostMemory(store.base_address, store.mapping.nbytes, store.data_offset, store.slab_bytes)
    return cuda_check.start(memory, index, layouts)
