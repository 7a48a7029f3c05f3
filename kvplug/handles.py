"""What a caller holds on to: pinned blocks and reservations, each released once, at the latest when it is forgotten.

Every view is made over an array object of its own, the *owner*. Whatever is derived from a view (a slice, an array, a
tensor) keeps that owner alive, and nothing else does: when it is gone, nobody can reach the block's bytes any more.
Asking a memoryview to release itself would say less, since slices and tensors are no exports of it.

What a handle answers for is its batch's :class:`kvplug.shm.batch.Holding`. A handle that is forgotten takes its batch
with it, and the pool gives back the rest: nothing here has a finaliser, which an exception could interrupt.
"""

from __future__ import annotations

import contextlib
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


def _owner(pool: Pool, batch: SlotBatch, i: int, *, writable: bool) -> Owner:
    """The block's bytes as an array object of their own; while it lives, the block stays."""
    at = int(batch.arrays()[2][i])
    owner = pool.segment.memory[at : at + int(batch.nbytes[i])]
    owner.flags.writeable = writable
    pool.lend(batch, i, owner)
    return owner


class PinnedBlocks:
    """Read-only views of pinned blocks. ``codes`` says which are there; ``blocks[i]`` is a memoryview, or None.

    A view that somebody still has after :meth:`release`, or what was made of it, keeps the block's pin till it goes.
    """

    def __init__(self, pool: Pool, batch: SlotBatch) -> None:
        self._pool, self._batch = pool, batch
        self._life = pool.life
        self._views: dict[int, memoryview] = {}
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
            self._views[i] = _owner(self._pool, self._batch, i, writable=False).data
        return self._views[i]

    def __iter__(self) -> Iterator[memoryview | None]:
        return (self[i] for i in range(len(self)))

    def release(self) -> int:
        """Release the pins of all blocks that nobody uses. How many are in use: their pins follow by themselves."""
        self._released = True
        self._views.clear()
        kept = int(self._batch.holding.in_use().sum())
        if self._life is self._pool.life and not self._pool.is_closed:  # closing has released them
            self._pool.give_back(self._batch)
        return kept

    def __enter__(self) -> PinnedBlocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Reservation:
    """Slots being written by the caller. ``codes``; ``views[i]`` a writable memoryview, or None; then seal or abort.

    ``with store.reserve(keys, nbytes) as r: …; r.seal()`` gives back at the end what was not sealed by then.
    """

    def __init__(self, pool: Pool, batch: SlotBatch) -> None:
        self._pool, self._batch = pool, batch
        self._life = pool.life
        self._open = np.flatnonzero(batch.codes == Code.OK)
        self.views: list[memoryview | None] = [None] * len(batch)
        for i in self._open.tolist():
            self.views[i] = _owner(pool, batch, i, writable=True).data

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
            slots, gens, offsets = (array[self._open] for array in self._batch.arrays())
            for view in self.views:
                if view is not None:
                    with contextlib.suppress(BufferError):
                        view.release()
            sums = np.empty(len(slots), np.int64)
            copies.hash_batch(self._pool.base_address + offsets, self._batch.nbytes[self._open], sums)
            out[self._open] = self._pool.complete(slots, gens, sums, part=0)
            self._open = self._open[:0]
            self._pool.finish(self._batch.holding)
        return out

    def abort(self) -> None:
        """Give the slots back unwritten. Idempotent. One that somebody can still write to is free once nobody can."""
        self.views[:] = [None] * len(self.views)
        pool = self._pool
        if len(self._open) and self._life is pool.life and not pool.is_closed:  # else it is the parent's, or reclaimed
            pool.give_back(self._batch)
        self._open = self._open[:0]

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
