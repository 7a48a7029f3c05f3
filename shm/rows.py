"""What slots' rows say, decoded for whole batches by numpy, without the lock.

The one place that knows rows and part entries besides the kernels: what is outside of this folder asks for parts and
keys, and never for words. A pinned slot's row and parts are still; any other row may change while it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvplug.shm import layout as lay
from kvplug.shm.layout import Geometry

__all__ = ["BlockParts", "block_parts", "row_table", "sealed_keys", "slab_table"]

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

SCAN_ROWS: Final = 1 << 16


class BlockParts(NamedTuple):
    """The parts of M blocks, P of them together, one block's after another's."""

    siblings: I64
    """Of each block, (count - 1) << 7 | index: which of how many blocks that go together it is. int64[M]."""
    counts: I64
    """How many parts each block has, int64[M]."""
    nbytes: I64
    """Bytes of each part, int64[P]."""
    sums: I64
    """XXH3 of each part, its bits, int64[P]."""


def row_table(T: I64, geometry: Geometry) -> I64:
    """All rows, a view of (n_rows, ROW_WORDS)."""
    g = geometry
    return T[g.o_row : g.o_row + g.n_rows * lay.ROW_WORDS].reshape(-1, lay.ROW_WORDS)


def slab_table(T: I64, geometry: Geometry) -> I64:
    """All slabs' entries, a view of (n_slabs, SLAB_WORDS)."""
    g = geometry
    return T[g.o_slab : g.o_slab + g.n_slabs * lay.SLAB_WORDS].reshape(-1, lay.SLAB_WORDS)


def block_parts(T: I64, geometry: Geometry, slots: I64) -> BlockParts:
    """The parts of the blocks in these slots, int64[M], which the caller has pinned or is writing."""
    size_words = T[geometry.o_row + slots * lay.ROW_WORDS + lay.R_SIZE]
    counts = (size_words >> lay.SIZE_BITS) & lay.PARTS_MASK
    starts = np.cumsum(counts) - counts
    which = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)
    words = geometry.o_part + (np.repeat(slots, counts) + which) * lay.PART_WORDS
    return BlockParts(size_words >> lay.SIBLING_SHIFT, counts, T[words + lay.PART_NBYTES], T[words + lay.PART_XXH3])


def sealed_keys(T: I64, geometry: Geometry, wanted: Callable[[U8], Bools] | None = None) -> U8:
    """Keys of the sealed blocks, (N, 32) uint8; ``wanted``: which of some keys (M, 32) to keep, bool[M].

    A hint by the time it is returned: each key had a sealed block while its piece of the table was read.
    """
    rows = row_table(T, geometry)
    found = [np.empty((0, 32), np.uint8)]
    for at in range(0, len(rows), SCAN_ROWS):
        some = rows[at : at + SCAN_ROWS]
        words = some[:, lay.R_WORD].copy()
        sealed = np.flatnonzero(words & lay.STATE_MASK == lay.SEALED)
        keys = some[sealed, lay.R_KEY : lay.R_KEY + 4]
        same = some[sealed, lay.R_WORD] == words[sealed]
        named: U8 = np.ascontiguousarray(keys[same]).view(np.uint8).reshape(-1, 32)
        found.append(named if wanted is None else named[wanted(named)])
    return np.concatenate(found)
