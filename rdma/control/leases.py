"""Leases: how long an agent keeps blocks in place for a reader, and how long that reader may count on it.

The two ends never compare clocks. The owner counts from when it grants, on its own monotonic clock, and keeps the
pins until then. The reader counts from *before it asked*, on its own, and takes a margin off for clocks that do not
run alike: whatever the network did in between, the reader's lease is over before the owner's.

A lease ends by itself, by a release, or with the connection of its reader. Then its pins go; who still reads finds
bytes that do not fit their checksum, and a clock that says so first.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvplug.rdma.control.protocol import I64

MAX_LEASES_A_READER: Final = 256
READER_SHARE: Final = 0.5
"""Share of what all leases may keep in place that one reader's may."""
MARGIN_SHARE: Final = 0.05
MARGIN_LEAST_S: Final = 0.02

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as its reader counts it."""

    id: int
    ends: float  # time.monotonic() here

    @classmethod
    def counted(cls, lease: int, asked: float, seconds: float) -> HeldLease:
        """``asked``: the monotonic time before the request was sent; ``seconds``: what was granted."""
        return cls(lease, asked + seconds - max(MARGIN_LEAST_S, seconds * MARGIN_SHARE))

    def holds(self) -> bool:
        """Whether it can be counted on still."""
        return time.monotonic() < self.ends


@dataclasses.dataclass(eq=False, slots=True)
class Lease:
    """A lease at its owner: blocks pinned for one reader. Arrays are int64[M], of its blocks in the answer's order."""

    id: int
    reader: int
    ends: float
    slots: I64
    offsets: I64
    nbytes: I64
    total_bytes: int
    over: bool = False


class LeaseTable:
    """All leases of one agent. Thread-safe; ``unpin`` is called without its lock."""

    def __init__(self, unpin: Callable[[I64], None], *, most_bytes: int, clock: Clock = time.monotonic) -> None:
        self._unpin = unpin
        self._clock = clock
        self._most_bytes = most_bytes
        self._reader_most_bytes = max(1, int(most_bytes * READER_SHARE))
        self._mutex = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._bytes_of: dict[int, int] = {}
        self._count_of: dict[int, int] = {}
        self._next = 1
        self._bytes = 0

    def room(self, reader: int) -> int:
        """Bytes that one more lease of this reader may keep in place; 0: none."""
        with self._mutex:
            return self._room(reader)

    def _room(self, reader: int) -> int:
        if self._count_of.get(reader, 0) >= MAX_LEASES_A_READER:
            return 0
        mine = self._bytes_of.get(reader, 0)
        return max(0, min(self._reader_most_bytes - mine, self._most_bytes - self._bytes))

    def grant(self, reader: int, seconds: float, slots: I64, offsets: I64, nbytes: I64) -> Lease | None:
        """A lease on these pinned blocks, whose pins are the lease's from now on. None: over a bound, nothing taken."""
        total = int(nbytes.sum())
        with self._mutex:
            if total > self._room(reader):
                return None
            lease = Lease(self._next, reader, self._clock() + seconds, slots, offsets, nbytes, total)
            self._next += 1
            self._leases[lease.id] = lease
            self._account(lease, 1)
        return lease

    def _account(self, lease: Lease, sign: int) -> None:
        self._bytes += sign * lease.total_bytes
        for table, by in ((self._bytes_of, lease.total_bytes), (self._count_of, 1)):
            table[lease.reader] = table.get(lease.reader, 0) + sign * by
            if not table[lease.reader]:
                del table[lease.reader]

    def of(self, lease: int, reader: int) -> Lease | None:
        """This reader's lease of that number, if it has not ended."""
        with self._mutex:
            found = self._leases.get(lease)
            if found is None or found.reader != reader or found.ends <= self._clock():
                return None
            return found

    def holds(self, lease: Lease) -> bool:
        """Whether it has not ended."""
        return not lease.over and lease.ends > self._clock()

    def extend(self, lease: int, reader: int, seconds: float) -> bool:
        """Let it end so long from now. False: it has ended already."""
        with self._mutex:
            found = self._leases.get(lease)
            if found is None or found.reader != reader or found.ends <= self._clock():
                return False
            found.ends = self._clock() + seconds
            return True

    def release(self, leases: Sequence[int], reader: int) -> int:
        """End these leases of this reader. How many there were."""
        with self._mutex:
            mine = [self._leases[i] for i in dict.fromkeys(leases) if i in self._leases]
            ended = self._end([lease for lease in mine if lease.reader == reader])
        return self._let_go(ended)

    def release_reader(self, reader: int) -> int:
        """End all leases of a reader that has gone. How many there were."""
        with self._mutex:
            ended = self._end([lease for lease in self._leases.values() if lease.reader == reader])
        return self._let_go(ended)

    def expire(self) -> int:
        """End what has run out. How many there were."""
        with self._mutex:
            now = self._clock()
            ended = self._end([lease for lease in self._leases.values() if lease.ends <= now])
        return self._let_go(ended)

    def release_all(self) -> int:
        """End every lease: the agent stops."""
        with self._mutex:
            ended = self._end(list(self._leases.values()))
        return self._let_go(ended)

    def _end(self, leases: list[Lease]) -> list[Lease]:
        for lease in leases:
            lease.over = True
            del self._leases[lease.id]
            self._account(lease, -1)
        return leases

    def _let_go(self, ended: list[Lease]) -> int:
        if ended:
            self._unpin(np.concatenate([lease.slots for lease in ended]))  # queued where the pool's lock is busy
        return len(ended)

    def held(self) -> tuple[int, int]:
        """(leases, bytes that they keep in place)."""
        with self._mutex:
            return len(self._leases), self._bytes
