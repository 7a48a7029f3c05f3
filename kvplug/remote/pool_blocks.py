"""A store as the exchange between hosts sees it: :class:`kvplug.rdma.blocks.Blocks` over a KvStore."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvplug.errors import BlockTooLargeError, Code
from kvplug.rdma.blocks import PinnedParts, Reserved
from kvplug.store import Forecast, KvStore

__all__ = ["PoolExchange"]

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]


class PoolExchange:
    """One store's pool, for an agent or a reader. Thread-safe as the store is, which the caller closes."""

    def __init__(self, store: KvStore) -> None:
        self.store = store
        self._forecast: Forecast | None = None

    @property
    def host(self) -> bytes:
        """The pool's identity, 16 bytes."""
        return self.store.pool_uuid

    @property
    def memory(self) -> U8:
        """The whole segment, uint8."""
        return self.store.mapping

    @property
    def data_bytes(self) -> int:
        """Bytes that the pool has for blocks."""
        return self.store.data_bytes

    def open_segment(self) -> int:
        """A descriptor of the segment, on a description of its own: the caller closes it. Raises PoolError."""
        return self.store.open_segment()

    def is_current(self) -> bool:
        """Whether the pool's name still leads to this segment."""
        return self.store.is_current

    def exists(self, keys: U8) -> npt.NDArray[np.bool_]:
        """Whether each key has a sealed block here, bool[N]."""
        return self.store.exists(keys)

    def pin(self, keys: U8, *, prefix: bool, touch: bool = True) -> PinnedParts:
        """Pin these blocks ((N, 32) uint8; ``prefix``: the leading ones; ``touch``: date them) and tell their parts."""
        b = self.store.pin_batch(keys, prefix=prefix, touch=touch)
        parts = self.store.parts_of(b)
        ok = np.flatnonzero(b.codes == Code.OK)
        return PinnedParts(b.codes, b.slots[ok], b.gens[ok], b.offsets[ok], b.nbytes[ok], *parts)

    def unpin(self, slots: I64) -> None:
        """Release one pin of each slot, int64[M]."""
        self.store.unpin(slots)

    def reserve(self, keys: U8, part_nbytes: I64, siblings: tuple[int, int]) -> Reserved:
        """A slot for each key that is not there; ``siblings``: (count, index) of blocks that go together.

        A block that no slab here can hold is FULL, not an error.
        """
        try:
            b = self.store.reserve_batch(keys, part_nbytes, siblings=siblings)
        except BlockTooLargeError:
            n = len(keys)
            return Reserved(np.full(n, Code.FULL, np.int8), *np.zeros((3, n), np.int64))
        return Reserved(b.codes, b.slots, b.gens, b.offsets)

    def complete(self, slots: I64, gens: I64, offsets: I64, nbytes: I64, sums: I64) -> I8:
        """All parts of these slots are written: seal those whose bytes have these checksums.

        offsets (from the segment's start), nbytes, sums (XXH3's bits): int64[M, P]. OK, CORRUPT, STALE or TIMEOUT.
        Raises BufferError: arrays that do not fit together.
        """
        return self.store.complete_checked(slots, gens, offsets, nbytes, sums)

    def abort(self, slots: I64, gens: I64, *, writers_done: bool) -> None:
        """Give these slots up; without ``writers_done`` they stay quarantined until :meth:`acknowledge`."""
        self.store.abort_batch(slots, gens, writers_done)

    def acknowledge(self, slots: I64, gens: I64) -> None:
        """Nobody can write to these any more."""
        self.store.acknowledge(slots, gens)

    def at_risk(self, most_bytes: int, most_blocks: int, *, anew: bool) -> tuple[U8, I64]:
        """(keys, bytes of each): blocks worth keeping that will be evicted soon. For one thread; takes no lock.

        ``anew``: look at the whole pool; else the next of what the last look has found.
        """
        if self._forecast is None:
            self._forecast = self.store.forecast()
        found = (self._forecast.look if anew else self._forecast.more)(most_bytes, most_blocks)
        return found.keys, found.nbytes

    def offered(self, which: npt.NDArray[np.bool_]) -> None:
        """These of the last :meth:`at_risk` were offered, and are named again only once they were used."""
        if self._forecast is not None:
            self._forecast.offered(which)
