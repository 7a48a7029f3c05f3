"""A worker's side of the connector: copies between the engine's blocks and slots, on threads of its own.

One thread loads and one stores; both hand their results over to the engine's thread, which takes them along with the
next step's output. Stores are finished here as well: whoever completes the last part of a slot seals it, so a block is
sealed also if the engine never takes another step.

Before each copy into a slot its generation is looked at (a store may have been cancelled meanwhile), and a job that
was made before weights were changed in this worker is not carried out at all.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvplug.adapters.devices.base import DeviceCopy, Int64s
from kvplug.adapters.vllm.adapters import HeldAdapters
from kvplug.adapters.vllm.jobs import GroupBlocks, Job, Plan, Rank, WorkerReport
from kvplug.adapters.vllm.layout import GroupBytes
from kvplug.errors import Code
from kvplug.store import KvStore
from kvplug.threads import LivingThread

EMPTY_STEP_WAIT_S = 0.002
"""How long a step that runs no model waits for a load that is under way, which saves the engine another such step."""
DRAIN_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 5.0


@dataclass
class LoadResult:
    """How a load ended in this worker."""

    job: Job
    ok: bool
    failed_blocks: set[int] = field(default_factory=set)
    """Ids of the engine's blocks that do not hold what they should."""
    bad: set[tuple[int, int]] = field(default_factory=set)
    """(position of the group, position of the block) whose checksum was wrong."""


class WorkerSide:
    """One rank. Thread-safe where the engine's thread and the two copy threads meet, which is ``_lock``."""

    def __init__(
        self, store: KvStore, device: DeviceCopy, groups: list[GroupBytes], rank: Rank, warn: Callable[[str], None]
    ) -> None:
        self.store = store
        self.adapters: HeldAdapters | None = None
        """This rank's LoRA adapters, if the engine has any."""
        self._device = device
        self._groups = groups
        self._rank = rank
        self._warn = warn
        self._verify = store.config.verify == "always"
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._report = WorkerReport()
        self._loaded: list[LoadResult] = []
        self._under_way = {"load": 0, "store": 0}
        self._giving_up = threading.Event()
        self._changed = 0
        self._changed_told = 0
        self._queues: dict[str, queue.SimpleQueue[Any]] = {name: queue.SimpleQueue() for name in ("load", "store")}
        self._threads = [
            LivingThread(f"kvplug-{name}", functools.partial(self._serve, name, work))
            for name, work in (("load", self._load), ("store", self._store))
        ]
        for thread in self._threads:
            thread.start()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def submit_loads(self, jobs: tuple[Job, ...], plan: Plan | None) -> None:
        """Begins loads; never waits."""
        self._submit("load", jobs, plan)

    def submit_stores(self, jobs: tuple[Job, ...], plan: Plan | None) -> None:
        """Begins stores of blocks whose bytes the device has been told to write; never waits."""
        self._submit("store", jobs, plan)

    def _submit(self, name: str, jobs: tuple[Job, ...], plan: Plan | None) -> None:
        if not jobs:
            return
        after = self._device.mark()
        with self._lock:
            self._under_way[name] += len(jobs)
            stale = [job.epoch != self._changed or self._has_other_adapter(job) for job in jobs]
        for job, refused in zip(jobs, stale, strict=True):
            self._queues[name].put((job, plan, after, refused or job.hopeless))

    def _has_other_adapter(self, job: Job) -> bool:
        if self.adapters is None:
            return job.adapter_changes is not None
        return self.adapters.refuses(job)

    def take_loaded(self, wait: bool) -> list[LoadResult]:
        """Loads that ended since the last call. With ``wait``, a moment is spent on one that is under way."""
        with self._idle:
            if wait and self._under_way["load"] and not self._loaded:
                self._idle.wait_for(lambda: self._loaded or not self._under_way["load"], EMPTY_STEP_WAIT_S)
            loaded, self._loaded = self._loaded, []
        return loaded

    def look_again(self, result: LoadResult) -> None:
        """Fails a load that was for an adapter which was replaced while it ran."""
        if result.ok and self.adapters is not None and self.adapters.spoils(result.job):
            result.ok, result.failed_blocks = False, _all_blocks(result.job)

    def take_report(self) -> WorkerReport | None:
        """What the scheduler's side has to know; None if there is nothing new."""
        report = None
        with self._lock:
            if self._report.done or self._report.counts or self._changed != self._changed_told:
                report, self._report = self._report, WorkerReport()
                report.changed = self._changed_told = self._changed
        return self.adapters.add_to(report) if self.adapters is not None else report

    @property
    def changes_seen(self) -> int:
        """How often weights were about to change or had just changed."""
        return self._changed

    def weights_change(self, why: str) -> None:
        """Weights, or the cache's memory, are about to change or have just changed; copies under way are ended."""
        with self._lock:
            self._changed += 1
        self.drain()

    def drain(self) -> bool:
        """Gives up copies that have not begun and waits, within a bound, for those that run; whether all ended."""
        self._giving_up.set()
        with self._idle:
            done = self._idle.wait_for(lambda: not any(self._under_way.values()), DRAIN_TIMEOUT_S)
        self._giving_up.clear()
        if not done:
            self._warn(f"kvplug: copies did not end within {DRAIN_TIMEOUT_S:.0f} s")
        return done

    def quiesce(self) -> bool:
        """As :meth:`drain`. Loads whose end was not told are told as failed: the engine takes their blocks back."""
        done = self.drain()
        with self._lock:
            for result in self._loaded:
                result.ok, result.failed_blocks = False, set()
        return done

    def close(self) -> None:
        """Ends the threads and leaves the pool. What was not stored by now is given up."""
        self._giving_up.set()
        for name in self._queues:
            self._queues[name].put(None)
        for thread in self._threads:
            thread.end(SHUTDOWN_TIMEOUT_S)
        if any(thread.is_alive() for thread in self._threads):
            self._warn("kvplug: a copy did not end; the pool stays mapped")
            return
        self._device.close()
        self.store.close()

    # -- the copy threads --------------------------------------------------------------------------------------------

    def _serve(self, name: str, work: Callable[[Job, Plan, Any, bool], None]) -> None:
        while (item := self._queues[name].get()) is not None:
            job, plan, after, refused = item
            try:
                work(job, plan, after, refused)
            except Exception as error:  # noqa: BLE001 - the engine must be told that the job is over, whatever happened
                self._over(job, ok=False, counts=Counter({f"{name}_errors": 1}))
                if name == "load":
                    self._end_load(LoadResult(job, ok=False, failed_blocks=_all_blocks(job)))
                self._warn(f"kvplug: a {name} failed: {type(error).__name__}: {error}")
            finally:
                with self._idle:
                    self._under_way[name] -= 1
                    self._idle.notify_all()

    def _over(self, job: Job, *, ok: bool, counts: Counter[str], bad: set[tuple[int, int]] | None = None) -> None:
        with self._lock:
            self._report.done[job.job_id] += 1
            if not ok:
                self._report.failed.add(job.job_id)
            self._report.bad |= {(job.job_id, group, block) for group, block in bad or ()}
            self._report.counts.update(counts)

    def _end_load(self, result: LoadResult) -> None:
        with self._idle:
            self._loaded.append(result)

    def _load(self, job: Job, plan: Plan, after: Any, refused: bool) -> None:
        began = time.perf_counter()
        counts: Counter[str] = Counter()
        if refused or self._giving_up.is_set():
            result = LoadResult(job, ok=False, failed_blocks=_all_blocks(job))
        else:
            result = LoadResult(job, ok=True)
            for at, group in enumerate(job.groups):
                self._load_group(at, group, plan, after, result, counts)
            counts["load_ns"] += int((time.perf_counter() - began) * 1e9)
        self._over(job, ok=result.ok, counts=counts, bad=result.bad)
        self._end_load(result)

    def _load_group(
        self, at: int, group: GroupBlocks, plan: Plan, after: Any, result: LoadResult, counts: Counter[str]
    ) -> None:
        part = plan[group.group].get(self._rank)
        if part is None or not len(group.block_ids):
            return
        block_ids, offsets = group.block_ids, group.offsets
        if self._verify:
            codes = self.store.verify_parts(group.slots, group.gens, part.index)
            wrong = np.flatnonzero(codes != Code.OK)
            if len(wrong):
                result.ok = False
                result.failed_blocks |= set(block_ids[wrong].tolist())
                result.bad |= {(at, int(block)) for block in wrong if codes[block] == Code.CORRUPT}
                right = codes == Code.OK
                block_ids, offsets = block_ids[right], offsets[right]
        src = self.store.base_address + offsets + part.offset
        self._device.load(self._groups[group.group].runs, src, block_ids, after)
        counts["loaded_blocks"] += len(block_ids)
        counts["loaded_bytes"] += len(block_ids) * part.nbytes

    def _store(self, job: Job, plan: Plan, after: Any, refused: bool) -> None:
        began = time.perf_counter()
        counts: Counter[str] = Counter()
        ok = not refused
        for group in job.groups if ok else ():
            part = plan[group.group].get(self._rank)
            if part is None or not part.writer:
                continue
            chunk = max(1, self._device.chunk_bytes // part.nbytes)  # in between: was it cancelled?
            for start in range(0, len(group.block_ids), chunk):
                if self._giving_up.is_set():
                    ok = False
                    break
                some = slice(start, start + chunk)
                self._store_some(
                    group.group, group.block_ids[some], group.slots[some], group.gens[some], group.offsets[some],
                    part.index, part.offset, part.nbytes, after, counts,
                )  # fmt: skip
        counts["store_ns"] += int((time.perf_counter() - began) * 1e9)
        self._over(job, ok=ok, counts=counts)

    def _store_some(
        self, group: int, block_ids: Int64s, slots: Int64s, gens: Int64s, offsets: Int64s,
        part: int, part_offset: int, nbytes: int, after: Any, counts: Counter[str],
    ) -> None:  # fmt: skip
        ours = self.store.still_writing(slots, gens)
        if not ours.all():
            block_ids, slots, gens, offsets = block_ids[ours], slots[ours], gens[ours], offsets[ours]
        if not len(block_ids):
            return
        dst = self.store.base_address + offsets + part_offset
        checksums = self._device.store(self._groups[group].runs, block_ids, dst, after)
        codes = self.store.complete(slots, gens, part, checksums)
        counts["stored_blocks"] += int((codes == Code.OK).sum())
        counts["stored_bytes"] += len(block_ids) * nbytes
        late = int((codes == Code.TIMEOUT).sum())
        if late:
            counts["seals_queued"] += late


def _all_blocks(job: Job) -> set[int]:
    return {block for group in job.groups for block in group.block_ids.tolist()}
