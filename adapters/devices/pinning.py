"""Which parts of the pool's mapping the device can reach by itself: pinned slab by slab, when one is first copied to.

Registering pins a slab's pages, which takes about as long as writing them once; so it is done for slabs that are used,
and never for memory beyond the pool's watermark, which no slot lies in. One registration a slab: a copy may not lie in
two, and one call for a large pool fails in the driver. A slab that the driver refuses (a limit on locked memory, a
sandbox) is never asked for again; its slots go through a ring of pinned memory instead (``cuda.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.devices.planning import HostMemory

_UNKNOWN, _PINNED, _REFUSED = 0, 1, 2


class PinnedSlabs:
    """Thread-safe. The two functions are :meth:`Driver.register` and :meth:`Driver.unregister`."""

    def __init__(
        self,
        memory: HostMemory,
        register: Callable[[int, int], tuple[bool, str]],
        unregister: Callable[[int], str],
        *,
        refuse_all: bool = False,
    ) -> None:
        """``refuse_all``: nothing is registered, as where the driver refuses it."""
        self._memory = memory
        self._register = register
        self._unregister = unregister
        self._state = np.full(memory.num_slabs, _REFUSED if refuse_all else _UNKNOWN, np.int8)
        self._ours: list[int] = []
        self._lock = threading.Lock()
        self.refusal = ""
        """Why the driver refused a slab; empty if it never did."""

    def pinned(self, slots: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each slot's slab is pinned; a slab that was not asked for yet is registered now. bool[N]."""
        slabs = self._memory.slabs_of(slots)
        outside = (slabs < 0) | (slabs >= len(self._state))
        inside = np.where(outside, 0, slabs)
        if len(self._state) and (self._state[inside] == _UNKNOWN).any():
            with self._lock:
                for slab in np.unique(inside[~outside]).tolist():
                    if self._state[slab] == _UNKNOWN:
                        self._pin(slab)
        if not len(self._state):
            return np.zeros(len(slots), np.bool_)
        found: npt.NDArray[np.bool_] = (self._state[inside] == _PINNED) & ~outside
        return found

    def _pin(self, slab: int) -> None:
        address = self._memory.slab_address(slab)
        ours, refusal = self._register(address, self._memory.slab_bytes)
        if ours:
            self._ours.append(address)
        self.refusal = self.refusal or refusal
        self._state[slab] = _REFUSED if refusal else _PINNED

    @property
    def counts(self) -> tuple[int, int]:
        """(slabs that are pinned, slabs that were refused)."""
        return int((self._state == _PINNED).sum()), int((self._state == _REFUSED).sum())

    def close(self) -> list[str]:
        """Unregisters what was registered here; what went wrong. No copy may be running. Idempotent."""
        with self._lock:
            self._state[:] = _REFUSED
            ours, self._ours = self._ours, []
            return [problem for address in ours if (problem := self._unregister(address))]
