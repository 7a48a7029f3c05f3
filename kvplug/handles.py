"""What a caller holds on to: pinned blocks and reservations, each released once, at the latest when it is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code, PoolError
from kvplug.shm import copy as copies

if TYPE_CHECKING:
    from kvplug.shm.pool import Pool, SlotBatch


class PinnedBlocks:
    """Read-only views of pinned blocks. ``codes`` says which are there; ``blocks[i]`` is a memoryview, or None.

    A view that somebody still uses (numpy made an array of it) keeps its pin after :meth:`release`, until it is gone.
    """

    def __init__(self, pool: Pool, batch: SlotBatch) -> None:
        self._pool, self._batch = pool, batch
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
        if self._batch.codes[i] != Code.OK:
            return None
        if i not in self._views:
            at, n = int(self._batch.offsets[i]), int(self._batch.nbytes[i])
            self._views[i] = self._pool.segment.memory.data[at : at + n].toreadonly()
        return self._views[i]

    def __iter__(self) -> Iterator[memoryview | None]:
        return (self[i] for i in range(len(self)))

    def release(self) -> int:
        """Release the pins of all views that nobody uses. How many had to be kept; call again later for those."""
        slots = self._batch.slots
        kept = 0
        for i, view in list(self._views.items()):
            try:
                view.release()
            except BufferError:
                kept += 1
                continue
            del self._views[i]
        free = np.ones(len(slots), bool)
        free[list(self._views)] = False
        self._pool.unpin(slots[free & (slots >= 0)])
        slots[free] = -1
        self._released = True
        return kept

    def __enter__(self) -> PinnedBlocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        slots = self._batch.slots
        held = slots[slots >= 0]
        if len(held) and not self._views:
            self._pool.unpin_later(held)


class Reservation:
    """Slots being written by the caller. ``codes``; ``views[i]`` a writable memoryview, or None; then seal or abort."""

    def __init__(self, pool: Pool, batch: SlotBatch) -> None:
        self._pool, self._batch = pool, batch
        self._open = np.flatnonzero(batch.codes == Code.OK)
        memory = pool.segment.memory.data
        self.views: list[memoryview | None] = [None] * len(batch)
        for i in self._open.tolist():
            at = int(batch.offsets[i])
            self.views[i] = memory[at : at + int(batch.nbytes[i])]

    @property
    def codes(self) -> npt.NDArray[np.int8]:
        """Per key: OK (a slot is yours), EXISTS, IN_PROGRESS, FULL, BUDGET, TIMEOUT."""
        return self._batch.codes

    def seal(self) -> npt.NDArray[np.int8]:
        """Checksum and publish what was written. Per key as ``codes``, OK where it is sealed now."""
        out = self._batch.codes.copy()
        if len(self._open):
            slots, gens = self._batch.slots[self._open], self._batch.gens[self._open]
            self._drop_views()
            sums = np.empty(len(slots), np.int64)
            copies.hash_batch(
                self._pool.base_address + self._batch.offsets[self._open], self._batch.nbytes[self._open], sums
            )
            out[self._open] = self._pool.complete(slots, gens, 0, sums)
            self._open = self._open[:0]
        return out

    def abort(self) -> None:
        """Give the slots back unwritten. Idempotent."""
        if len(self._open):
            done = self._drop_views()
            self._pool.abort(self._batch.slots[self._open], self._batch.gens[self._open], writers_done=done)
            self._open = self._open[:0]

    def _drop_views(self) -> bool:
        """Take the views away. False if somebody made something of one that can still be written through."""
        done = True
        for view in self.views:
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    done = False
        return done

    def __del__(self) -> None:
        if len(self._open):
            self._pool.abort_later(self._batch.slots[self._open], self._batch.gens[self._open])
