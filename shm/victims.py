"""Room in a full pool: victims of the class in need, and slabs taken from another class.

Scans run without the lock and cover a bounded window; what they propose is kept and used up over many reservations. A
class without room of its own, or whose own blocks are all worth more than another class's stalest slab, drains that
slab: so a new model gets space in a pool that an old one has filled.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from kvplug.shm.layout import Geometry
from kvplug.shm.policies.base import Candidates, Policy
from kvplug.shm.scan import candidates, slab_worth
from kvplug.shm.slabs import DRAIN_CALLED_OFF, DRAIN_DONE, drain_step

I64 = npt.NDArray[np.int64]
WINDOW_SLOTS: Final = 65536
SHARE_OF_WINDOW: Final = 8  # propose at least an eighth of what was looked at
DRAIN_SECTIONS: Final = 64
DRAIN_TRIES: Final = 4


@dataclasses.dataclass(slots=True)
class Victims:
    """Proposals in the order in which they should go; ``used[0]`` of them have been looked at (``[1]``: scratch)."""

    slots: I64
    words: I64
    ticks: I64
    used: I64


def _none() -> Victims:
    e = np.empty(0, np.int64)
    return Victims(e, e, e, np.zeros(2, np.int64))


class VictimFinder:
    """For one thread of a client at a time."""

    def __init__(self, T: I64, L: I64, geometry: Geometry, policy: Policy) -> None:
        self._T, self._L, self._geometry, self._policy = T, L, geometry, policy
        self._by_stride: dict[int, Victims] = {}
        self._hand = 0
        n = min(geometry.n_rows, WINDOW_SLOTS + geometry.rows_per_slab)
        self._buffers = np.empty((4, max(n, geometry.rows_per_slab)), np.int64)

    def of(self, stride: int) -> Victims:
        """What is left of the last proposals for this stride."""
        return self._by_stride.setdefault(stride, _none())

    def refill(self, stride: int, need: int) -> bool:
        """Find victims or free a slab for ``need`` blocks of this stride. False if there is nothing to be had."""
        rows, words, ticks, sizes = self._buffers
        found, self._hand = candidates(self._T, stride, self._hand, WINDOW_SLOTS, rows, words, ticks, sizes)
        c = Candidates(rows[:found], words[:found], ticks[:found], sizes[:found])
        chosen = self._policy.choose(c, max(need, found // SHARE_OF_WINDOW)) if found else np.empty(0, np.int64)
        chosen = chosen[:found]
        if self._take_slab(stride, int(np.median(c.ticks)) if found else -1):
            return True
        self._by_stride[stride] = Victims(c.slots[chosen], c.words[chosen], c.ticks[chosen], np.zeros(2, np.int64))
        return found > 0

    def _take_slab(self, stride: int, own_tick: int) -> bool:
        """Drain another class's slab if this class has no blocks (``own_tick`` < 0) or only ones worth more than it."""
        worth = np.empty(self._geometry.n_slabs, np.int64)
        slab_worth(self._T, stride, worth)
        order = np.argsort(worth, kind="stable")
        order = order[worth[order] >= 0]
        for slab in order[:DRAIN_TRIES]:
            if own_tick >= 0 and worth[slab] >= own_tick:
                return False
            for _ in range(DRAIN_SECTIONS):
                step = int(drain_step(self._T, self._L, int(slab), stride))
                if step == DRAIN_DONE:
                    return True
                if step < 0:
                    return False
                if step == DRAIN_CALLED_OFF:
                    break
        return False
