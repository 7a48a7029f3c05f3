"""A read that is spread over several *lanes*: connections or queue pairs, each with a thread while it is at work.

A lane carries one share of a read at a time, and is dropped after any error: nobody knows what is still under way on
it. A share that has ended can write no more, since its lane has delivered everything or is gone; so a read is settled
when its shares have ended.
"""

from __future__ import annotations

import abc
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, Generic, Protocol, TypeVar

import numpy as np

from kvplug.errors import PeerError, PeerTimeoutError, PoolError
from kvplug.rdma.control.link import Link
from kvplug.rdma.control.protocol import I64
from kvplug.rdma.data.datapath import Arrived, DataPath, Landing, Wanted
from kvplug.threads import note

SHARE_BYTES: Final = 2 << 20
"""A lane is not worth its thread for less."""
LET_GO_S: Final = 0.5


class Lane(Protocol):
    """What carries a share."""

    generation: int
    """Of the link that it belongs to."""

    def interrupt(self) -> None:
        """From another thread: the share that it carries ends soon, with an error."""

    def close(self) -> bool:
        """Drop it. Whether nothing can be written by it any more. Idempotent."""


L = TypeVar("L", bound=Lane)


class SpreadPath(DataPath, Generic[L]):
    """Reads over up to ``lanes`` lanes, opened when they are first needed."""

    def __init__(self, link: Link, lanes: int) -> None:
        self._link, self._most = link, lanes
        self._mutex = threading.Lock()
        self._idle: list[L] = []
        self._busy: set[L] = set()
        self._closed = False
        self._threads: ThreadPoolExecutor | None = None

    @abc.abstractmethod
    def _open_lane(self, deadline: float) -> L:
        """A new lane. Raises PeerError."""

    @abc.abstractmethod
    def _carry(self, lane: L, wanted: Wanted, part: I64, deadline: float, arrived: Arrived) -> None:
        """Read the blocks ``part`` of ``wanted`` over this lane. Raises PeerError, and what ``arrived`` raises."""

    def _lanes(self) -> int:
        """How many lanes are worth having, now that the link is up."""
        return self._most

    def read(self, wanted: Wanted, deadline: float, arrived: Arrived) -> Landing:
        """As the interface says. A share of the blocks goes to each lane, in order."""
        landing = Landing()
        if not len(wanted):
            landing.settle()
            return landing
        late = time.monotonic() >= deadline
        if late or not wanted.lease.holds():
            landing.error = PeerTimeoutError(f"the {'time' if late else 'lease'} had run out before the read began")
            landing.settle()
            return landing
        ends = np.cumsum(wanted.nbytes)
        shares = int(min(self._lanes(), max(1, ends[-1] // SHARE_BYTES), len(wanted)))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shares) // shares, "right")
        at_work: list[L] = []
        stuck: list[L] = []
        jobs: list[Future[PeerError | None]] = []
        closed = None
        threads = self._workers()
        try:
            for part in np.split(np.arange(len(wanted)), cuts):
                if len(part):
                    jobs.append(threads.submit(self._share, wanted, part, deadline, arrived, at_work, stuck))
        except RuntimeError:
            closed = PeerError("the path was closed")
        pending: set[Future[PeerError | None]] = wait(jobs, max(0.0, deadline - time.monotonic())).not_done
        if pending:
            with self._mutex:
                for lane in at_work:
                    lane.interrupt()
            # One that had not begun is over with that, also before a thread has taken note of it.
            pending = wait({job for job in pending if not job.cancel()}, LET_GO_S).not_done
        # A share that is done can't write; one that is not has an interrupted lane and a deadline.
        remaining = [len(pending)]
        if not pending and not stuck:
            landing.settle()
        for job in pending:
            job.add_done_callback(lambda _: self._count_down(remaining, stuck, landing))
        landing.error = closed or _first_error(f"kvplug-{self.name}", jobs)
        return landing

    def _workers(self) -> ThreadPoolExecutor:
        """Threads for as many lanes as there are, whatever number of reads is under way."""
        with self._mutex:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._lanes(), f"kvplug-{self.name}")
                if self._closed:
                    self._threads.shutdown(wait=False)
            return self._threads

    def _count_down(self, remaining: list[int], stuck: list[L], landing: Landing) -> None:
        with self._mutex:
            remaining[0] -= 1
            last = remaining[0] == 0
        if last and not stuck:
            landing.settle()

    def _share(
        self, wanted: Wanted, part: I64, deadline: float, arrived: Arrived, at_work: list[L], stuck: list[L]
    ) -> PeerError | None:
        lane: L | None = None
        whole = False
        try:
            lane = self._take(deadline)
            with self._mutex:
                at_work.append(lane)
                self._busy.add(lane)
                if self._closed:
                    lane.interrupt()
            self._carry(lane, wanted, part, deadline, arrived)
            whole = True
        except PeerError as e:
            return e
        finally:
            if lane is not None:
                with self._mutex:
                    at_work.remove(lane)
                    self._busy.discard(lane)
                    keep = whole and not self._closed
                    if keep:
                        self._idle.append(lane)
                if not keep and not lane.close():
                    stuck.append(lane)  # what it may still write to is never settled
        return None

    def _take(self, deadline: float) -> L:
        """A lane that belongs to the link as it is now."""
        while True:
            with self._mutex:
                if self._closed:
                    raise PeerError("the path was closed")
                if not self._idle:
                    break
                lane = self._idle.pop()
            if lane.generation == self._link.generation:
                return lane
            lane.close()
        return self._open_lane(deadline)

    def close(self) -> None:
        """Drop all lanes; shares under way end at once."""
        with self._mutex:
            self._closed = True
            threads = self._threads
            idle, self._idle = self._idle, []
            for lane in self._busy:
                lane.interrupt()
        for lane in idle:
            lane.close()
        if threads is not None:
            threads.shutdown(wait=False)  # shares that have not begun end at once, and whoever waits for them


def _first_error(name: str, jobs: list[Future[PeerError | None]]) -> PeerError | None:
    """Raises PoolError, if this host's pool is not to be written to any more."""
    for job in jobs:
        if job.cancelled() or not job.done():
            return PeerTimeoutError("the blocks had not arrived at the deadline")
        unforeseen = job.exception()
        if isinstance(unforeseen, PoolError):
            raise unforeseen
        if unforeseen is not None:
            note(name, unforeseen, "the blocks that it was reading are misses")
            return PeerError(f"an error of kvplug's own ended the read: {unforeseen}")
        error = job.result()
        if error is not None:
            return error
    return None
