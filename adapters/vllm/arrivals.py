"""What has come to a worker of the scheduler's jobs, and whose end the worker has yet to tell.

A step's metadata brings loads, which begin at once, and stores, which begin when the step has written their blocks.
Each rank tells the end of each load once: vLLM counts the ranks, and a second end from one would stand for another's.
Nothing of vLLM is needed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvplug.adapters.vllm.jobs import Job
    from kvplug.adapters.vllm.worker import LoadResult


class Arrivals:
    """Which steps and jobs have come. Numbers of steps and of jobs grow and are never used again."""

    def __init__(self) -> None:
        self.engine = ""
        """The session of the engine that this worker copies for; "" while it does without kvplug."""
        self.foreign = False
        """Whether the step is of another engine in this process, which has no worker's connector of its own. Nothing
        of such a step is carried out here, and nothing is told with it."""
        self._step = 0
        self._load = self._store = 0

    def begins(self, engine: str | None) -> None:
        """A step begins. ``engine``: the session that it is of; None: it brings nothing of kvplug's."""
        self.foreign = engine is not None and engine != self.engine

    def ends(self, step: int) -> bool:
        """A step has written its blocks. Whether that is news: its stores begin once, however often vLLM says it."""
        if self.foreign or step <= self._step:
            return False
        self._step = step
        return True

    def loads(self, jobs: Iterable[Job]) -> None:
        """Loads have come."""
        self._load = max([self._load, *(job.job_id for job in jobs)])

    def stores(self, jobs: Iterable[Job]) -> None:
        """Stores have come."""
        self._store = max([self._store, *(job.job_id for job in jobs)])

    def have(self, newest_load: int, newest_store: int) -> bool:
        """Whether these jobs, and with them all that were sent before, have come."""
        return self._load >= newest_load and self._store >= newest_store


class Ended(NamedTuple):
    """Loads whose end is told now."""

    finished: set[str]
    """Requests that need wait no longer."""
    failed: set[str]
    """Those of them that are computed as if there had been no load."""
    invalid: set[int]
    """Ids of blocks that do not hold what they should; requests are computed from the first of theirs on."""


class LoadEnds:
    """Which loads' ends this worker has yet to tell, to the engine (by request) and to the scheduler's side (by job).

    The copy threads tell the scheduler's side of each job that they were given. A job that did not get as far is
    unreported: it is told from here, as failed.
    """

    def __init__(self) -> None:
        self._loading: set[str] = set()
        """Requests whose load the copy threads were given."""
        self._unreported: set[str] = set()
        """Requests whose load's end comes from no copy thread: it is told next, as failed."""
        self._unreported_jobs: set[int] = set()

    def begun(self, jobs: Iterable[Job]) -> None:
        """The copy threads were given these loads."""
        self._loading |= {job.request_id for job in jobs if job.request_id}

    def lost(self, jobs: Iterable[Job]) -> None:
        """These loads came, and there is nobody who carries them out."""
        for job in jobs:
            self._unreported_jobs.add(job.job_id)
            if job.request_id:
                self._unreported.add(job.request_id)

    def take(self, results: Iterable[LoadResult]) -> list[LoadResult]:
        """The results, as the copy threads hand them over, that are to be told now.

        One that was given up after an error was told then: a second time it would stand for another rank's.
        """
        mine = [result for result in results if result.job.request_id in self._loading]
        self._loading -= {result.job.request_id for result in mine}
        return mine

    @property
    def loading(self) -> bool:
        """Whether the copy threads have any load whose end was not told."""
        return bool(self._loading)

    def give_up(self) -> None:
        """Results can't be had. Only once no copy runs any more: the requests go on without their loads."""
        self._unreported |= self._loading
        self._loading = set()

    def tell(self, results: Iterable[LoadResult], by_block: bool) -> Ended:
        """What the engine is told of these results, and of loads that nobody has carried out.

        Args:
            results: from :meth:`take`.
            by_block: whether the engine may be told which blocks were not loaded, instead of the request.
        """
        finished, self._unreported = self._unreported, set()
        failed, invalid = set(finished), set()
        for result in results:
            request_id = result.job.request_id or ""
            finished.add(request_id)
            if result.ok:
                continue
            if by_block and result.failed_blocks:
                invalid |= result.failed_blocks
            else:
                failed.add(request_id)
        return Ended(finished, failed, invalid)

    def take_unreported_jobs(self) -> set[int]:
        """Jobs of which the scheduler's side must hear that they failed, since the last call."""
        jobs, self._unreported_jobs = self._unreported_jobs, set()
        return jobs
