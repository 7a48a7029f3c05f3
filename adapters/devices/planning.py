"""What a device's copies are made of, worked out with numpy alone: descriptors, pieces, groups, scratch layouts.

A copy of N blocks of R runs is N·R ranges of bytes. Copy engines want them written out (:func:`descriptors`); a kernel
works them out itself from one table per layout (:class:`Pieces`) and two numbers per block. Nothing here touches a
device, so all of it is tested where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvplug.adapters.devices.base import ByteRuns, Int64s

MOST_WORD_BYTES = 8
"""What a kernel's thread moves at once, where everything is aligned to it."""


@dataclass(frozen=True)
class HostMemory:
    """The pool's mapping in this process: slabs of one size that begin at ``base + first``. No slot lies in two."""

    base: int
    nbytes: int
    first: int
    slab_bytes: int

    @property
    def num_slabs(self) -> int:
        """Whole slabs."""
        return (self.nbytes - self.first) // self.slab_bytes

    def slabs_of(self, addresses: Int64s) -> Int64s:
        """The slab that each address lies in; negative, or too large, for what lies in none."""
        slabs: Int64s = (addresses - (self.base + self.first)) // self.slab_bytes
        return slabs

    def slab_address(self, slab: int) -> int:
        """Where a slab begins."""
        return self.base + self.first + slab * self.slab_bytes


@dataclass(frozen=True)
class Layout:
    """The runs of a block that are not empty, with where they begin in a slot part."""

    runs: ByteRuns
    offset: Int64s

    @staticmethod
    def of(runs: ByteRuns) -> Layout:
        """Laid out one after another, as a part is."""
        offset = np.cumsum(runs.nbytes) - runs.nbytes
        some = runs.nbytes > 0
        return Layout(ByteRuns(runs.base[some], runs.stride[some], runs.nbytes[some]), offset[some])

    def only(self, which: npt.NDArray[np.bool_]) -> Layout:
        """Some of the runs, which stay where they are in the part."""
        runs = self.runs
        return Layout(ByteRuns(runs.base[which], runs.stride[which], runs.nbytes[which]), self.offset[which])

    def __len__(self) -> int:
        return len(self.offset)


def descriptors(layout: Layout, block_ids: Int64s, slots: Int64s, memory: HostMemory) -> tuple[Int64s, Int64s, Int64s]:
    """Every range of a batch, as (address in a block, address in a slot, bytes), int64[M] each.

    Where all of a block is one run, neighbours both on the device and in the same slab are joined to one range. Not
    over the edge of a slab: a slab is registered by itself, and a copy may not lie in two registrations.
    """
    runs = layout.runs
    near = runs.base[:, None] + runs.stride[:, None] * block_ids
    far = layout.offset[:, None] + slots
    nbytes = np.repeat(runs.nbytes, len(block_ids))
    near, far = near.reshape(-1), far.reshape(-1)
    if len(runs.nbytes) != 1 or len(block_ids) < 2:
        return near, far, nbytes
    length, slabs = int(runs.nbytes[0]), memory.slabs_of(slots)
    joins = (np.diff(near) == length) & (np.diff(far) == length) & (np.diff(slabs) == 0)
    if not joins.any():
        return near, far, nbytes
    at = np.flatnonzero(np.append(True, ~joins))
    return near[at], far[at], np.add.reduceat(nbytes, at)


@dataclass(frozen=True)
class Pieces:
    """A layout cut into pieces that one turn of a kernel moves. The table's rows are base, stride, offset, words."""

    table: Int64s
    """(4, P)."""
    word_bytes: int
    lanes: int
    """Words that a turn moves at most; a power of two."""

    @property
    def count(self) -> int:
        """Pieces of one block."""
        return int(self.table.shape[1])


def word_bytes(*numbers: Int64s) -> int:
    """The largest word, at most MOST_WORD_BYTES, that divides all of these addresses and lengths."""
    bits = MOST_WORD_BYTES
    for some in numbers:
        bits |= int(np.bitwise_or.reduce(some)) if len(some) else 0
    return bits & -bits


def alignment(layout: Layout) -> int:
    """:func:`word_bytes` of everything in a layout; what is left of a batch are its slots."""
    runs = layout.runs
    return word_bytes(runs.base, runs.stride, runs.nbytes, layout.offset)


def cut(layout: Layout, word: int, most_bytes: int) -> Pieces:
    """Cuts a layout into pieces of at most ``most_bytes``, a power of two, in words of ``word`` bytes."""
    runs = layout.runs
    parts = -(-runs.nbytes // most_bytes)
    which = np.repeat(np.arange(len(parts)), parts)
    begin = (np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)) * most_bytes
    length = np.minimum(runs.nbytes[which] - begin, most_bytes)
    table = np.stack([runs.base[which] + begin, runs.stride[which], layout.offset[which] + begin, length // word])
    longest = int(length.max()) if len(length) else word
    lanes = 1 << max(0, (longest // word - 1).bit_length())
    return Pieces(np.ascontiguousarray(table), word, lanes)


def groups(count: int, part_nbytes: int, group_bytes: int, most_groups: int | None = None) -> list[slice]:
    """Cuts a batch of ``count`` blocks into groups of about ``group_bytes``, and into no more than ``most_groups``."""
    each = max(1, group_bytes // max(1, part_nbytes))
    if most_groups is not None:
        each = max(each, -(-count // most_groups))
    return [slice(at, min(at + each, count)) for at in range(0, count, each)]


def dma_from_bytes(sizes: Sequence[int], dma_s: Sequence[float], kernel_s: Sequence[float], tie: float = 1.05) -> int:
    """The length from which on runs are left to the copy engines: from there on these were never slower.

    Args:
        sizes: lengths of runs that were measured, ascending.
        dma_s: how long the copy engines took for the same bytes in runs of each length.
        kernel_s: how long the kernel took.
        tie: the copy engines may be slower by this factor, since they take nothing from the compute kernels.

    Returns:
        A length; one more than the largest of ``sizes`` if the kernel was faster there too.
    """
    best = sizes[-1] + 1
    for size, dma, kernel in zip(reversed(sizes), reversed(dma_s), reversed(kernel_s), strict=True):
        if dma > kernel * tie:
            break
        best = size
    return best


def like(runs: ByteRuns, blocks: int, base: int) -> tuple[ByteRuns, int]:
    """The same runs, as long and aligned as these, for a few blocks of scratch memory; and how much it must have.

    Args:
        runs: an engine's.
        blocks: how many blocks the scratch memory shall hold.
        base: its address, a multiple of 256.

    Returns:
        (runs over the scratch memory, bytes needed). Addresses and strides are the same as the engine's modulo 256.
    """
    if not len(runs.nbytes):
        return runs, 0
    stride = runs.nbytes + (runs.stride - runs.nbytes) % 256
    room = stride * blocks + 512
    starts = (np.cumsum(room) - room + 255) // 256 * 256 + runs.base % 256
    return ByteRuns(base + starts, stride, runs.nbytes), int(room.sum() + 512)


def as_words(values: Int64s) -> Int64s:
    """C-contiguous int64, as a driver reads addresses and sizes."""
    return np.ascontiguousarray(values, dtype=np.int64)


def signature(runs: ByteRuns) -> bytes:
    """Equal for layouts that a device can't tell apart but by their addresses."""
    table: Int64s = np.concatenate([runs.base % 256, runs.stride % 256, runs.nbytes]).astype(np.int64)
    return table.tobytes()
