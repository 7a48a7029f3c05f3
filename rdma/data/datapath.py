"""What a data path is: the way blocks come from another host's segment into slots of this one.

A path moves bytes and knows nothing of keys, checksums or seals. It reports blocks as their last byte arrives, and
says when it can no longer write into the memory that it was given: until then a slot whose block did not arrive must
not be anybody's (:meth:`kvplug.rdma.blocks.Blocks.abort`). tests/rdma/conformance.py runs over every path.
"""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from kvplug.errors import PeerError
from kvplug.rdma.control.leases import HeldLease
from kvplug.rdma.control.protocol import I64

Arrived = Callable[[I64], None]
"""Called with positions in a :class:`Wanted` whose last byte has arrived; on any thread, each position once."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Blocks of one lease to be read. All int64[K].

    index: position among the lease's blocks. sources: offset in the owner's segment, which a path that reads by itself
    needs, and gens. nbytes: payload. targets: offset in this host's segment, of slots reserved by the caller.
    """

    lease: HeldLease
    index: I64
    sources: I64
    nbytes: I64
    targets: I64

    def __len__(self) -> int:
        return len(self.index)


class Landing:
    """How a read ended, and whether something of it can still arrive."""

    def __init__(self) -> None:
        self.error: PeerError | None = None
        """What went wrong; None: every block has arrived."""
        self._mutex = threading.Lock()
        self._settled = threading.Event()
        self._then: list[Callable[[], None]] = []

    @property
    def is_settled(self) -> bool:
        """Whether the path can no longer write to any target of this read."""
        return self._settled.is_set()

    def wait_settled(self, timeout_s: float) -> bool:
        """Wait for that. Whether it is so."""
        return self._settled.wait(timeout_s)

    def settle(self) -> None:
        """For paths: from now on nothing more can arrive."""
        with self._mutex:
            self._settled.set()
            todo, self._then = self._then, []
        for callback in todo:
            callback()

    def then(self, callback: Callable[[], None]) -> None:
        """Call this as soon as nothing more can arrive: at once, if it is so already."""
        with self._mutex:
            if not self._settled.is_set():
                self._then.append(callback)
                return
        callback()


class DataPath(abc.ABC):
    """A way to one peer's segment. Thread-safe."""

    name: ClassVar[str]
    """As the agent's Welcome lists it."""

    @abc.abstractmethod
    def read(self, wanted: Wanted, deadline: float, arrived: Arrived) -> Landing:
        """Read these blocks into their targets; return when all have arrived, something broke, or at the deadline.

        ``deadline`` is of time.monotonic(). Raises nothing but a PoolError of ``arrived``, after which this host's
        pool is not to be written to. Any other fault is the landing's ``error``, noticed within the peer's time-out;
        blocks that were reported before it count.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give up connections and threads; reads under way end with an error. Idempotent."""


def runs(offsets: I64, nbytes: I64) -> tuple[I64, I64]:
    """(first position, of each stretch of ranges that lie one behind the other; bytes of each stretch)."""
    if not len(offsets):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + nbytes[:-1]) + 1
    firsts = np.concatenate(([0], breaks)).astype(np.int64)
    return firsts, np.add.reduceat(nbytes, firsts)
