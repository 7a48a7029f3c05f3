"""What a call on a batch of keys answers: one code and one slot for each."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code
from kvplug.shm import layout as lay

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SlotBatch:
    """Slots for a batch of keys; all arrays have length N. An entry counts only where its code is OK (0).

    ``offsets`` are bytes from the mapping's start (``Pool.base_address``); ``gens`` must accompany ``slots`` in every
    later call.
    """

    codes: I8
    slots: I64
    gens: I64
    offsets: I64
    nbytes: I64

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def empty(cls, n: int) -> SlotBatch:
        """N entries that name nothing."""
        return cls(
            np.full(n, Code.MISSING, np.int8),
            np.full(n, -1, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
        )


def part_offsets(part_nbytes: npt.ArrayLike) -> tuple[I64, int]:
    """(offset of each part inside a slot, bytes of the whole payload); parts are aligned to 64 bytes."""
    sizes = np.asarray(part_nbytes, np.int64)
    padded = -(-sizes // lay.PART_ALIGN_BYTES) * lay.PART_ALIGN_BYTES
    starts = np.concatenate(([0], np.cumsum(padded)[:-1])).astype(np.int64)
    return starts, int(starts[-1] + sizes[-1])
