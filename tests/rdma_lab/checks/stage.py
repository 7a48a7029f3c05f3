"""A read between two hosts at which something is done, and what must hold afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvplug.errors import Code
from kvplug.rdma.data.datapath import Arrived, Landing, Wanted
from kvplug.rdma.reader.choice import ChosenPath
from kvplug.rdma.verbs.verbs import VerbsPath
from tests.rdma.hosts import Host, keys, until
from tests.rdma_lab.far import Far

NOTICED_S: Final = 2.0
"""From the instant of a fault, on the guest's clock, to the end of the read."""
FETCH_S: Final = 60.0
SETS_UP_S: Final = 60.0
SEED, KIB, MIB = 11, 1 << 10, 1 << 20
ENDINGS: Final = {Code.OK, Code.EXISTS, Code.MISSING, Code.TIMEOUT, Code.CORRUPT, Code.BUDGET}


def _nothing() -> None:
    return


class Stage:
    """An owner with blocks, a reader with one lane, and hooks before a read's first byte and at its first blocks."""

    def __init__(
        self,
        make_host: Callable[..., Host],
        far: Far,
        settings: dict[str, Any],
        *,
        n: int = 64,
        nbytes: int = 64 * KIB,
        **changes: Any,
    ) -> None:
        settings = settings | {"peer_timeout_s": 1.0, "peer_connections": 1} | changes
        self.far, self.n, self.nbytes = far, n, nbytes
        self.keys = keys(n, SEED)
        self.reader = make_host(**settings)
        self.peer = self.reader.peer(far.begin(settings))
        assert far.put(n, SEED, nbytes) == n
        path = self.peer._path
        assert isinstance(path, ChosenPath)
        self.verbs: VerbsPath = path.verbs
        self.before: Callable[[], object] = _nothing
        """Runs between lease and read, once."""
        self.on_arrival: Callable[[], object] = _nothing
        """Runs when the first blocks have arrived, once, beside the read, which goes on meanwhile."""
        self.last_arrival = 0.0
        self._happening: threading.Thread | None = None
        self.fault_at = 0.0
        """time.monotonic() of the fault: the hooks set it by :meth:`fault`."""
        reading = path.read

        def read(wanted: Wanted, deadline: float, arrived: Arrived) -> Landing:
            self.lease = wanted.lease
            before, self.before = self.before, _nothing
            before()

            def noted(which: Any) -> None:
                arrived(which)
                self.last_arrival = time.monotonic()
                happening, self.on_arrival = self.on_arrival, _nothing
                if happening is not _nothing:
                    self._happening = threading.Thread(target=happening)
                    self._happening.start()

            return reading(wanted, deadline, noted)

        path.read = read  # type: ignore[method-assign]
        # A first read by itself: what follows finds a queue pair and the keys of the memory.
        # Until then both ends register their memory, which an emulated machine does not do in the time for it.
        until(lambda: same(self.peer.fetch(self.keys[:1], FETCH_S), Code.OK), SETS_UP_S)
        assert self.reader.store.remove(self.keys[:1]).tolist() == [Code.OK]

    def fault(self, do: Callable[[], object]) -> Callable[[], None]:
        """A hook that does it, and notes when: before it began, so that the bound holds whenever it took effect."""

        def hook() -> None:
            self.fault_at = time.monotonic()
            do()

        return hook

    def fetch(self, timeout_s: float = FETCH_S) -> Any:
        """Fetch all. Codes."""
        return self.peer.fetch(self.keys, timeout_s)

    def fetch_and_check(self, timeout_s: float = FETCH_S, *, within_s: float = NOTICED_S) -> tuple[int, Any]:
        """Fetch all, with a fault in it: (how many came, codes). Right bytes or a miss, in time, nothing left over."""
        self.fault_at = 0.0
        codes = self.fetch(timeout_s)
        ended = time.monotonic()
        until(lambda: not self._happening or not self._happening.is_alive(), FETCH_S)
        assert self.fault_at, "the fault did not happen"
        took = ended - self.fault_at
        print(f"ended {took:.3f} s after the fault: {(codes >= 0).sum()} of {self.n} blocks came")
        assert took < within_s, f"noticed after {took:.3f} s"
        return self.check(codes), codes

    def check(self, codes: Any) -> int:
        """What is said to be here is, with its bytes; nothing stays in writing or out of use. How many are here."""
        assert set(codes.tolist()) <= ENDINGS, codes.tolist()
        said = int((codes >= 0).sum())
        assert self.reader.holds(self.keys, self.nbytes) == said
        stats = self.reader.store.stats
        until(lambda: stats().writing_slots + stats().quarantined_slots == 0, 10)
        return said

    def works_again(self) -> None:
        """All blocks come, at the latest when the peer was left alone for long enough."""

        def fetched() -> bool:
            return bool((self.fetch() >= 0).all())

        until(fetched, SETS_UP_S)
        assert self.reader.holds(self.keys, self.nbytes) == self.n
        self.reader.store.check_integrity(deep=True)

    def other_keys(self, n: int) -> Any:
        """Keys that are nobody's."""
        return keys(n, SEED + 1)


def same(codes: Any, code: Code) -> bool:
    """Whether all are that."""
    return bool((np.asarray(codes) == code).all())
