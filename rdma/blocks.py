"""What this package needs of a pool: the store's side is :class:`kvplug.remote.pool_blocks.PoolExchange`.

Between hosts everything is said in blocks of the pool: slots, generations, offsets from the segment's start, parts
and their checksums. Here stands only the shape of that, so that this package imports no pool.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

I8 = npt.NDArray[np.int8]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PinnedParts:
    """Pinned blocks and their parts. codes: int8[N]; the rest of the M blocks with code 0, in order.

    slots, gens, offsets, nbytes, siblings ((count - 1) << 7 | index), part_counts: int64[M]; part_nbytes, part_sums
    (bits of XXH3): int64[P], the parts of all blocks one after another.
    """

    codes: I8
    slots: I64
    gens: I64
    offsets: I64
    nbytes: I64
    siblings: I64
    part_counts: I64
    part_nbytes: I64
    part_sums: I64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """Slots to be written. codes: int8[N]; slots, gens, offsets: int64[N], where the code is 0."""

    codes: I8
    slots: I64
    gens: I64
    offsets: I64


class Blocks(Protocol):
    """A pool, as reader and agent see it. Keys are (N, 32) uint8. Nothing here waits for long or raises when full."""

    @property
    def host(self) -> bytes:
        """The pool's identity, 16 bytes: another one after it was removed and created again."""

    @property
    def memory(self) -> U8:
        """The whole segment."""

    @property
    def data_bytes(self) -> int:
        """Bytes that the pool has for blocks."""

    def open_segment(self) -> int:
        """A descriptor of the segment, on a description of its own: the caller closes it."""

    def is_current(self) -> bool:
        """Whether the pool's name still leads to this segment."""

    def exists(self, keys: U8) -> npt.NDArray[np.bool_]:
        """Whether each key has a sealed block here."""

    def pin(self, keys: U8, *, prefix: bool, touch: bool = True) -> PinnedParts:
        """Pin these blocks (``prefix``: the leading ones; ``touch``: it is a use of them) and tell their parts."""

    def unpin(self, slots: I64) -> None:
        """Release one pin of each."""

    def reserve(self, keys: U8, part_nbytes: I64, siblings: tuple[int, int]) -> Reserved:
        """A slot for each key that is not there, with these parts."""

    def complete(self, slots: I64, gens: I64, offsets: I64, nbytes: I64, sums: I64) -> I8:
        """All parts of these slots are written: seal those whose bytes have these checksums.

        offsets (from the segment's start), nbytes, sums (XXH3's bits): int64[M, P]. OK, CORRUPT, STALE or TIMEOUT.
        """

    def abort(self, slots: I64, gens: I64, *, writers_done: bool) -> None:
        """Give these slots up; without ``writers_done`` they are quarantined until :meth:`acknowledge`."""

    def acknowledge(self, slots: I64, gens: I64) -> None:
        """Nobody can write to these any more."""

    def at_risk(self, most_bytes: int, most_blocks: int, *, anew: bool) -> tuple[U8, I64]:
        """(keys, bytes of each): blocks worth keeping that will be evicted soon, the most worth first.

        ``anew``: look at the whole pool; else the next of what the last look has found.
        """

    def offered(self, which: npt.NDArray[np.bool_]) -> None:
        """These of the last :meth:`at_risk` were offered, and are named again only once they were used."""
