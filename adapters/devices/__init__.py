"""Copies between an engine's KV memory and pool slots: one small interface, one file per kind of device."""

from __future__ import annotations

from kvplug.adapters.devices.base import DeviceCopy
from kvplug.errors import UnsupportedEngineError

__all__ = ["for_device"]


def for_device(kind: str) -> DeviceCopy:
    """The copies for a kind of device, as torch names it (``cpu``). UnsupportedEngineError where there are none."""
    if kind == "cpu":
        from kvplug.adapters.devices.cpu import CpuCopy

        return CpuCopy()
    raise UnsupportedEngineError(f"no copies for devices of kind {kind!r} yet: only 'cpu'")
