"""From blocks to one-sided READs: where they are cut, where they are joined, and which of them report.

The bytes of a read are one *stream*: its blocks one after another, in order. Neighbours at both ends are joined to one
READ; a READ is cut where a registered region ends at either end, and where it would be longer than READ_BYTES or the
device's longest message. The READs of one queue pair complete in order, so that one that reports speaks for all before
it, and the blocks that have arrived are those whose end lies at or before that READ's end in the stream.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from kvplug.rdma.control.protocol import I64

READ_BYTES: Final = 1 << 20
"""Longest READ: long enough for any line's full speed, short enough to see that it moves."""
SIGNAL_BYTES: Final = 512 << 10
SIGNAL_READS: Final = 32
"""At the latest after so many bytes or READs one of them reports: progress, and room in the queue."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """READs, int64[R]: local and remote offsets in the two segments, nbytes, ends in the stream. signalled: bool[R].

    block_ends: int64[K], of the blocks in the stream.
    """

    local: I64
    remote: I64
    nbytes: I64
    ends: I64
    signalled: npt.NDArray[np.bool_]
    block_ends: I64

    def __len__(self) -> int:
        return len(self.local)

    def arrived(self, reads: int) -> int:
        """How many blocks have arrived once that many READs have completed."""
        return int(np.searchsorted(self.block_ends, self.ends[reads - 1], "right")) if reads else 0


def plan(sources: I64, targets: I64, nbytes: I64, *, regions: tuple[int, int], longest: int) -> Plan:
    """READs for blocks (int64[K] each). ``regions``: bytes of a region here and there; ``longest``: of one READ."""
    ends = np.cumsum(nbytes)
    local, remote, length = _joined(targets, sources, nbytes)
    local, remote, length = _cut(local, remote, length, local, regions[0])
    local, remote, length = _cut(local, remote, length, remote, regions[1])
    local, remote, length = _cut(local, remote, length, np.zeros_like(length), min(longest, READ_BYTES))
    read_ends = np.cumsum(length)
    marks = (read_ends - 1) // SIGNAL_BYTES + np.arange(len(length)) // SIGNAL_READS
    signalled = np.ones(len(length), np.bool_)
    signalled[:-1] = marks[1:] != marks[:-1]
    return Plan(local, remote, length, read_ends, signalled, ends)


def _joined(targets: I64, sources: I64, nbytes: I64) -> tuple[I64, I64, I64]:
    """Stretches that lie one behind the other at both ends."""
    if not len(nbytes):
        return targets, sources, nbytes
    apart = (targets[1:] != targets[:-1] + nbytes[:-1]) | (sources[1:] != sources[:-1] + nbytes[:-1])
    firsts = np.concatenate(([0], np.flatnonzero(apart) + 1)).astype(np.int64)
    return targets[firsts], sources[firsts], np.add.reduceat(nbytes, firsts)


def _cut(local: I64, remote: I64, nbytes: I64, at: I64, period: int) -> tuple[I64, I64, I64]:
    which, ahead, pieces = split(at, nbytes, period)
    return local[which] + ahead, remote[which] + ahead, pieces


def split(at: I64, nbytes: I64, period: int) -> tuple[I64, I64, I64]:
    """Cut ranges at the multiples of ``period``: (range that each piece is of, how far into it, bytes), in order."""
    first, last = at // period, (at + nbytes - 1) // period
    counts = last - first + 1
    which = np.repeat(np.arange(len(at)), counts)
    step = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    low = np.maximum(at[which], step * period)
    high = np.minimum((at + nbytes)[which], (step + 1) * period)
    return which, low - at[which], high - low
