"""Offloads: device pages to slots, on a thread of their own, answered in the order in which they were asked for.

SGLang keeps the pages of an offload in its cache until it has taken the answer, so their number is bounded: beyond a
share of the device's pages an offload is refused, and SGLang comes back to it when the pages are used again. What
counts is what SGLang has not taken the answer of, which is the same on all ranks, and so is the refusal.

An offload that is given up (SGLang empties its cache, weights change) is never sealed, even if its pages are already
being copied: whether it still stands is looked at once more when they have been.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplug.adapters.devices.base import DeviceCopy, Int64s
from kvplug.adapters.sglang.devicepools import DevicePools, SourcePool
from kvplug.adapters.sglang.engine import RankEngine
from kvplug.adapters.sglang.pins import Keys
from kvplug.errors import Code
from kvplug.store import KvStore
from kvplug.threads import LivingThread

RESET_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 5.0
_REASONS = {
    Code.FULL: "full", Code.BUDGET: "budget", Code.TIMEOUT: "timeout", Code.IN_PROGRESS: "in_progress",
    Code.RETIRED: "retired",
}  # fmt: skip


@dataclass(frozen=True)
class Pages:
    """Pages of one source: their keys, and SGLang's indices of them, which may still be on the device."""

    source: str
    keys: Keys
    indices: Any


class Offload:
    """One request to store something, from the asking to the taking of the answer."""

    def __init__(self, num_pages: int, epoch: int) -> None:
        self.num_pages = num_pages
        """Pages of full attention that SGLang keeps meanwhile."""
        self.epoch = epoch
        self.answer: bool | None = None
        self.given_up = False


class Ledger:
    """What SGLang has asked for and not taken the answer of, oldest first."""

    def __init__(self, most_pages: int) -> None:
        self.lock = threading.Lock()
        self._most = most_pages
        self._open: collections.deque[Offload] = collections.deque()

    @property
    def num_pages(self) -> int:
        """Device pages that SGLang keeps for offloads."""
        return sum(offload.num_pages for offload in self._open)

    def has_room(self, num_pages: int) -> bool:
        """Whether so many more pages may be kept; always if none are, or a long prompt would never be stored."""
        return not self._open or self.num_pages + num_pages <= self._most

    def add(self, offload: Offload) -> None:
        """SGLang waits for this one's answer."""
        self._open.append(offload)

    def answered(self) -> int:
        """How many of the oldest have an answer."""
        count = 0
        for offload in self._open:
            if offload.answer is None:
                break
            count += 1
        return count

    def take(self) -> bool:
        """The oldest one's answer, which SGLang takes."""
        return bool(self._open.popleft().answer)

    def refuse(self) -> None:
        """Nothing that is not sealed by now ever will be; SGLang is told so as it asks."""
        with self.lock:
            for offload in self._open:
                offload.given_up = True
                offload.answer = offload.answer or False

    def give_up(self) -> None:
        """The same, and SGLang does not wait for answers any more."""
        self.refuse()
        self._open.clear()


class Offloads:
    """Queue and copy thread of one rank."""

    def __init__(
        self, engine: RankEngine, store: KvStore, pools: DevicePools, device: DeviceCopy, ledger: Ledger
    ) -> None:
        self._engine = engine
        self._store = store
        self._pools = pools
        self._device = device
        self._ledger = ledger
        self._siblings = engine.siblings(pools.replicated)
        self._todo: collections.deque[tuple[Offload, list[Pages], list[Any]]] = collections.deque()
        self._more = threading.Condition()
        self._busy = False
        self._ending = False
        self._thread = LivingThread("kvplug-store", self._serve)
        self._thread.start()

    # -- the scheduler's thread --------------------------------------------------------------------------------------

    def submit(self, offload: Offload, pages: list[Pages], ready: list[Any]) -> None:
        """Begins an offload when all events of ``ready`` have happened; never waits."""
        with self._more:
            self._todo.append((offload, pages, ready))
            self._more.notify()

    def quiesce(self) -> None:
        """After all were given up: forgets what has not begun and waits, within a bound, for the copy that runs."""
        with self._more:
            self._todo.clear()
            if not self._more.wait_for(lambda: not self._busy, RESET_TIMEOUT_S):
                self._engine.say(f"kvplug: a store did not end within {RESET_TIMEOUT_S:.0f} s; it will not be sealed")

    def close(self) -> bool:
        """Ends the thread; whether it has ended."""
        self.quiesce()
        with self._more:
            self._ending = True
            self._more.notify()
        return self._thread.end(SHUTDOWN_TIMEOUT_S)

    # -- the copy thread ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._more:
                self._busy = False
                self._more.notify_all()
                self._more.wait_for(lambda: self._todo or self._ending)
                if self._ending:
                    return
                offload, pages, ready = self._todo.popleft()
                self._busy = True
            began = time.perf_counter()
            answer = False
            try:
                answer = self._store_all(offload, pages, ready)
            except Exception as error:  # noqa: BLE001 - SGLang waits for an answer, whatever happened
                self._engine.caught("a store", error)
            finally:
                with self._ledger.lock:
                    if not offload.given_up:
                        offload.answer = answer
            self._engine.counts["store_ns"] += int((time.perf_counter() - began) * 1e9)

    def _stands(self, offload: Offload) -> bool:
        return not offload.given_up and offload.epoch == self._engine.epoch

    def _store_all(self, offload: Offload, pages: list[Pages], ready: list[Any]) -> bool:
        for event in ready:
            event.synchronize()
        answer = True
        for some in pages:
            pool = self._pools.sources[some.source]
            answer &= self._store_pages(offload, pool, some.keys, pool.block_ids(some.indices))
        return answer

    def _store_pages(self, offload: Offload, pool: SourcePool, keys: Keys, block_ids: Int64s) -> bool:
        """Stores what is not there yet; whether all of it is there now."""
        if not self._stands(offload):
            return False
        counts, store = self._engine.counts, self._store
        batch = store.reserve_batch(keys, [pool.block_nbytes], siblings=self._siblings)
        codes, numbers = np.unique(batch.codes, return_counts=True)
        for code, number in zip(codes.tolist(), numbers.tolist(), strict=True):
            if code == Code.EXISTS:
                counts["already_stored_pages"] += number
            elif code != Code.OK:
                counts[f"not_stored:{_REASONS.get(code, 'other')}"] += number
        mine = np.flatnonzero(batch.codes == Code.OK)
        there = int((batch.codes == Code.EXISTS).sum())
        chunk = max(1, self._device.chunk_bytes // pool.block_nbytes)
        done = 0
        try:
            for at in range(0, len(mine), chunk):
                some = mine[at : at + chunk]
                if not self._stands(offload):
                    break
                dst = store.base_address + batch.offsets[some]
                checksums = self._device.store(pool.runs, block_ids[some], dst, None)
                with self._ledger.lock:  # giving up is either seen here, or comes after the seal
                    if not self._stands(offload):
                        break
                    sealed = store.complete(batch.slots[some], batch.gens[some], 0, checksums)
                done = at + len(some)
                there += int((sealed == Code.OK).sum())
                counts["stored_pages"] += int((sealed == Code.OK).sum())
                counts["stored_bytes"] += len(some) * pool.block_nbytes
        finally:
            left = mine[done:]
            if len(left):
                store.abort_batch(batch.slots[left], batch.gens[left], writers_done=True)
                counts["not_stored:given_up"] += len(left)
        return there == len(batch)


def refuse(offload: Offload, count: Callable[[str, int], None], reason: str) -> None:
    """Answers at once that an offload is not stored."""
    offload.answer = False
    count(f"not_stored:{reason}", offload.num_pages)
