"""What a call on a batch of keys answers: one code and one slot for each, and whose the slots are until it is read."""

from __future__ import annotations

import collections
import itertools
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import BlockTooLargeError, Code, ConfigError
from kvplug.shm import layout as lay

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

_numbers = itertools.count()


class Mark(weakref.ref[Any]):
    """A weak reference that knows which holding waits for its object's end."""

    __slots__ = ("_holding",)
    _holding: Holding

    @property
    def holding(self) -> Holding | None:
        """None in a mark that an exception has come before."""
        return getattr(self, "_holding", None)


class Holdings:
    """The slots that one client has pinned or is writing and that nobody but an object of this process answers for.

    The object is a batch that nobody has read yet, a handle, or a view of a block. What it holds is entered here
    *before* the section that takes it, and the section itself fills in which slots those are. So at whatever
    instruction an exception comes (a signal handler's, in the middle of any call), the slots are known here, and are
    given back when the object is gone. Its end is noted by C code alone, ``deque.append`` as the callback of a weak
    reference: a finaliser in Python could be interrupted as well.
    """

    def __init__(self) -> None:
        self.all: dict[int, Holding] = {}
        self.ended: collections.deque[Mark] = collections.deque()

    def watch(self, owner: object, holding: Holding) -> Mark:
        """A mark on ``owner``, whose end is a reason to look at ``holding``."""
        mark = Mark(owner, self.ended.append)
        mark._holding = holding
        return mark


class Holding:
    """Slots of one batch: pinned, or being written. ``slots`` is the array that sections fill and mark as done."""

    __slots__ = ("gens", "key", "mark", "owners", "pins", "released", "slots", "within")

    def __init__(self, within: Holdings, slots: I64, gens: I64, *, pins: bool) -> None:
        self.within, self.slots, self.gens, self.pins = within, slots, gens, pins
        self.key: Final = next(_numbers)
        self.mark: Mark | None = None
        self.owners: dict[int, Mark] = {}
        """Views of single blocks, by their place in the batch: each keeps its slot for as long as it lives."""
        self.released = False

    @property
    def is_due(self) -> bool:
        """Whether its object is gone, or has said that it needs the slots no more."""
        return self.released or self.mark is None or self.mark() is None

    def in_use(self) -> npt.NDArray[np.bool_]:
        """Of each slot, whether a view of it lives."""
        used = np.zeros(len(self.slots), np.bool_)
        for i, owner in tuple(self.owners.items()):
            used[i] = owner() is not None
        return used

    def forget(self) -> None:
        """Somebody else answers for these slots from now on, or nobody needs to."""
        self.within.all.pop(self.key, None)
        self.mark = None


class SlotBatch:
    """Slots for a batch of keys; all arrays have length N. An entry counts only where its code is OK (0).

    ``codes`` is int8, the others are int64. ``offsets`` are bytes from the mapping's start (``Pool.base_address``);
    ``gens`` must accompany ``slots`` in every later call. Who has read slots, gens or offsets answers for the slots. A
    batch that is dropped before that, as by an exception that comes between a section and its caller, gives them back.
    """

    __slots__ = ("__weakref__", "_gens", "_offsets", "_slots", "codes", "holding", "nbytes")

    def __init__(self, n: int, within: Holdings, *, pins: bool) -> None:
        self.codes: I8 = np.full(n, Code.MISSING, np.int8)
        self._slots = np.full(n, -1, np.int64)
        self._gens, self._offsets, self.nbytes = np.zeros((3, n), np.int64)
        self.holding = Holding(within, self._slots, self._gens, pins=pins)
        self.holding.mark = within.watch(self, self.holding)
        within.all[self.holding.key] = self.holding

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def slots(self) -> I64:
        """Slot of each key, -1 where there is none."""
        self.holding.forget()
        return self._slots

    @property
    def gens(self) -> I64:
        """Generation of each slot."""
        self.holding.forget()
        return self._gens

    @property
    def offsets(self) -> I64:
        """Where each block begins, in bytes from the mapping's start."""
        self.holding.forget()
        return self._offsets

    def arrays(self) -> tuple[I64, I64, I64]:
        """(slots, gens, offsets) for who keeps the batch, and with it what it holds."""
        return self._slots, self._gens, self._offsets


def part_sizes(part_nbytes: Any) -> I64:
    """Bytes of the parts of a block, int64[P]. Raises ConfigError unless they are 1 to MAX_PARTS sizes of at least 1.

    Checked as they were given: as int64 a number may be another one, and a sum below zero.
    """
    array = np.asarray(part_nbytes) if not isinstance(part_nbytes, (list, tuple)) else None
    given = array.tolist() if array is not None and array.ndim == 1 and array.dtype.kind in "iu" else part_nbytes
    if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= lay.MAX_PARTS:
        raise ConfigError(f"a block has 1 to {lay.MAX_PARTS} parts, given as a list of sizes, not {given!r:.80}")
    for size in given:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise ConfigError(f"sizes of blocks and parts are whole numbers of bytes, not {size!r:.80}")
        if not size >= 1:
            raise ConfigError(f"a part of a block has at least one byte, not {size}")
        if size > lay.SIZE_MASK:
            raise BlockTooLargeError(f"a part of {size!r:.80} bytes: no pool has blocks of more than {lay.SIZE_MASK}")
    return np.array(given, np.int64)


def part_offsets(part_nbytes: npt.ArrayLike) -> tuple[I64, int]:
    """(offset of each part inside a slot, bytes of the whole payload); parts are aligned to 64 bytes."""
    sizes = np.asarray(part_nbytes, np.int64)
    padded = -(-sizes // lay.PART_ALIGN_BYTES) * lay.PART_ALIGN_BYTES
    starts = np.concatenate(([0], np.cumsum(padded)[:-1])).astype(np.int64)
    return starts, int(starts[-1] + sizes[-1])
