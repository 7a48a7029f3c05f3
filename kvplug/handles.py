"""What a caller holds on to: pinned blocks and reservations, each released once, at the latest when it is forgotten.

Every view is made over an array object of its own, the *owner*. Whatever is derived from a view (a slice, an array, a
tensor) keeps that owner alive, and nothing else does: when it is gone, nobody can reach the block's bytes any more.
Asking a memoryview to release itself would say less, since slices and tensors are no exports of it.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code, PoolError
from kvplug.shm import copy as copies

if TYPE_CHECKING:
    from kvplug.shm.pool import Pool, SlotBatch

Owner = npt.NDArray[np.uint8]


def _owner(pool: Pool, batch: SlotBatch, i: int) -> Owner:
    at = int(batch.offsets[i])
    return pool.segment.memory[at : at + int(batch.nbytes[i])]


class PinnedBlocks:
    """Read-only views of pinned blocks. ``codes`` says which are there; ``blocks[i]`` is a memoryview, or None.

    A view that somebody still has after :meth:`release`, or what was made of it, keeps the block's pin till it goes.
    """

    def __init__(self, pool: Pool, batch: SlotBatch) -> None:
        self._pool, self._batch = pool, batch
        self._life = pool.life
        self._views: dict[int, memoryview] = {}
        self._owners: dict[int, weakref.ref[Owner]] = {}
        self._released = False

    @property
    def codes(self) -> npt.NDArray[np.int8]:
        """Per key: OK, MISSING, BUDGET, TIMEOUT."""
        return self._batch.codes

    def __len__(self) -> int:
        return len(self._batch)

    def __getitem__(self, i: int) -> memoryview | None:
        if self._released:
            raise PoolError("these blocks were released; their memory may hold others by now")
        if self._life is not self._pool.life:
            raise PoolError("these blocks were pinned before a fork, by the parent: pin them here")
        i = range(len(self))[i]
        if self._batch.codes[i] != Code.OK:
            return None
        if i not in self._views:
            owner = _owner(self._pool, self._batch, i)
            owner.flags.writeable = False
            self._owners[i] = weakref.ref(owner)
            self._views[i] = owner.data
            self._pool.lend(owner, int(self._batch.slots[i]))
            self._batch.slots[i] = -1  # its pin goes with the owner
        return self._views[i]

    def __iter__(self) -> Iterator[memoryview | None]:
        return (self[i] for i in range(len(self)))

    def release(self) -> int:
        """Release the pins of all blocks that nobody uses. How many are in use: their pins follow by themselves."""
        kept = self._forget_views()
        slots = self._take_slots()
        if self._life is self._pool.life and not self._pool.is_closed:  # closing has released them
            self._pool.unpin(slots)
        return kept

    def _forget_views(self) -> int:
        """Let go of the views. The number of those that are in use: each keeps its block's pin."""
        self._released = True
        self._views.clear()
        return sum(owner() is not None for owner in self._owners.values())

    def _take_slots(self) -> npt.NDArray[np.int64]:
        slots = self._batch.slots
        taken = slots[slots >= 0]
        slots[:] = -1
        return taken

    def __enter__(self) -> PinnedBlocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        self._forget_views()
        slots = self._take_slots()
        if len(slots) and self._life is self._pool.life:
            self._pool.unpin_later(slots)


class Reservation:
    """Slots being written by the caller. ``codes``; ``views[i]`` a writable memoryview, or None; then seal or abort.

    ``with store.reserve(keys, nbytes) as r: …; r.seal()`` gives back at the end what was not sealed by then.
    """

    def __init__(self, pool: Pool, batch: SlotBatch) -> None:
        self._pool, self._batch = pool, batch
        self._life = pool.life
        self._open = np.flatnonzero(batch.codes == Code.OK)
        self._owners: list[weakref.ref[Owner]] = []
        self.views: list[memoryview | None] = [None] * len(batch)
        for i in self._open.tolist():
            owner = _owner(pool, batch, i)
            self._owners.append(weakref.ref(owner))
            self.views[i] = owner.data

    @property
    def codes(self) -> npt.NDArray[np.int8]:
        """Per key: OK (a slot is yours), EXISTS, IN_PROGRESS, FULL, BUDGET, TIMEOUT."""
        return self._batch.codes

    def seal(self) -> npt.NDArray[np.int8]:
        """Checksum and publish what was written. Per key as ``codes``, OK where it is sealed now.

        The views end here. What was made of them (slices, arrays, tensors) must not be written to from now on.
        """
        if self._life is not self._pool.life:
            raise PoolError("this reservation was made before a fork, by the parent: it is the parent's to seal")
        out = self._batch.codes.copy()
        if len(self._open):
            slots, gens = self._batch.slots[self._open], self._batch.gens[self._open]
            for view in self.views:
                if view is not None:
                    with contextlib.suppress(BufferError):
                        view.release()
            sums = np.empty(len(slots), np.int64)
            copies.hash_batch(
                self._pool.base_address + self._batch.offsets[self._open], self._batch.nbytes[self._open], sums
            )
            out[self._open] = self._pool.complete(slots, gens, 0, sums)
            self._open = self._open[:0]
        return out

    def abort(self) -> None:
        """Give the slots back unwritten. Idempotent. One that somebody can still write to is free once nobody can."""
        self._give_back(later=False)

    def _give_back(self, *, later: bool) -> None:
        if not len(self._open):
            return
        self.views[:] = [None] * len(self.views)
        slots, gens = self._batch.slots[self._open], self._batch.gens[self._open]
        self._open = self._open[:0]
        pool = self._pool
        if self._life is not pool.life or pool.is_closed:  # the parent's; or reclaimed with the session
            return
        strong = [owner() for owner in self._owners]  # nothing is acknowledged before it was given up
        used = np.array([owner is not None for owner in strong])
        if later:
            pool.abort_later(slots, gens)
        else:
            pool.abort(slots[~used], gens[~used], writers_done=True)
            pool.abort(slots[used], gens[used], writers_done=False)
        for i, owner in enumerate(strong):
            if owner is not None:
                at = slice(i, i + 1)
                weakref.finalize(owner, pool.acknowledge_later, slots[at].copy(), gens[at].copy()).atexit = False
        if later and not used.all():
            pool.acknowledge_later(slots[~used], gens[~used])

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the interpreter is half gone; what dies with the process is reclaimed
            self._give_back(later=True)
