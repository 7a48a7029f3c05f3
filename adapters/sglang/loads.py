"""Loads: pinned slots to device pages, layer by layer, on a thread of their own.

What SGLang queues while it puts a batch together is one load batch. The forward pass waits, layer by layer, for what
it needs (:class:`LayerCounter`), and the scheduler waits for the whole of it afterwards. Everything that a load needs
was promised and is pinned, so what makes it fail is an error in kvplug itself. Weights that change meanwhile do not: a
request that runs then has a prefix of the old ones, from the pool as well as from SGLang's own cache, which lets go of
both with its next flush; and nothing of it is stored.

Every wait has a deadline, with one exception that is on purpose: while a copy is still writing to device pages,
``finish`` does not return, since SGLang would give the pages to somebody else. After the deadline the copy thread stops
before the next layer, so that what is waited for is one memory copy.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplug.adapters.devices.base import DeviceCopy, Int64s
from kvplug.adapters.sglang.devicepools import DevicePools
from kvplug.adapters.sglang.engine import RankEngine
from kvplug.adapters.sglang.pins import Taken
from kvplug.store import KvStore
from kvplug.threads import LivingThread

LOAD_TIMEOUT_S = 60.0
"""A load that takes longer is given up, and its requests with it."""
TRIES = 2
"""A load that has begun has no way back: SGLang aborts its requests if it fails."""
SHUTDOWN_TIMEOUT_S = 5.0
NO_LOAD = -1


@dataclass(frozen=True)
class QueuedLoad:
    """What one request loads: per source the pages on the device (int64[N]) and the pinned slots."""

    pages: dict[str, Int64s]
    pinned: dict[str, Taken]

    @property
    def slots(self) -> Int64s:
        """All that is to be unpinned."""
        return np.concatenate([taken.slots for taken in self.pinned.values()])


class Batch:
    """Loads that begin together. The fields are guarded by the counter's condition."""

    def __init__(self, loads: list[QueuedLoad], after: Any) -> None:
        self.loads = loads
        self.after = after
        self.landed = 0
        """Layers that are there, from the first one on."""
        self.over = False
        """Nothing is written any more."""
        self.ok = False
        self.given_up = False


class LayerCounter:
    """What SGLang's page pools ask before they let a layer be read; it knows the batches by number."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.consumer_index = NO_LOAD
        """The batch that the forward pass waits for."""
        self.changed = threading.Condition()
        self._batches: dict[int, Batch] = {}
        self._last = NO_LOAD

    def add(self, batch: Batch) -> int:
        """Gives a batch its number."""
        with self.changed:
            self._last += 1
            self._batches[self._last] = batch
            return self._last

    def batch(self, index: int) -> Batch | None:
        """The batch of this number, unless it is finished."""
        return self._batches.get(index)

    def forget(self, index: int) -> None:
        """The batch is finished."""
        self._batches.pop(index, None)

    def set_consumer(self, index: int) -> None:
        """The next forward pass is that of batch ``index``; negative: nothing is loaded for it."""
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """Returns when layer ``threshold`` has landed, or when the batch is over or given up, which finish() tells."""
        batch = self._batches.get(self.consumer_index)
        if batch is None or batch.landed > threshold:
            return
        with self.changed:
            there = self.changed.wait_for(
                lambda: batch.landed > threshold or batch.over or batch.given_up, LOAD_TIMEOUT_S
            )
            batch.given_up |= not there

    def reset(self) -> None:
        """No batch is waited for, and none is known any more."""
        self.consumer_index = NO_LOAD
        self._batches.clear()


class Loads:
    """Queue and copy thread of one rank."""

    def __init__(
        self, engine: RankEngine, store: KvStore, pools: DevicePools, device: DeviceCopy, forward_stream: Any = None
    ) -> None:
        """``forward_stream``: on which passes run that may still read the pages to be loaded."""
        self.counter = LayerCounter(pools.num_layers)
        self._engine = engine
        self._store = store
        self._pools = pools
        self._device = device
        self._forward_stream = forward_stream
        self._queued: dict[str, QueuedLoad] = {}
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._started: list[Batch] = []
        self._thread = LivingThread("kvplug-load", self._serve)
        self._thread.start()

    # -- the scheduler's thread --------------------------------------------------------------------------------------

    def queue(self, rid: str, load: QueuedLoad) -> bool:
        """Makes a request's load part of the next batch; True."""
        self.cancel(rid)
        self._queued[rid] = load
        return True

    def cancel(self, rid: str) -> bool:
        """Gives up a load that has not begun; whether there was one."""
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        self.drop(load)
        return True

    def drop(self, load: QueuedLoad) -> None:
        """Gives up what was promised to a load."""
        self._store.unpin(load.slots)

    def start(self) -> int:
        """Begins what is queued, as one batch; its number, or NO_LOAD if there is nothing."""
        if not self._queued:
            return NO_LOAD
        loads, self._queued = list(self._queued.values()), {}
        batch = Batch(loads, None)
        index = self.counter.add(batch)
        try:
            batch.after = self._device.mark(self._forward_stream)
        except Exception as error:  # noqa: BLE001 - SGLang learns of it in finish()
            self._engine.caught("starting a load", error)
            self._over(batch, ok=False)
            return index
        self._started = [other for other in self._started if not other.over]
        self._started.append(batch)
        self._batches.put(batch)
        return index

    def finish(self, index: int) -> bool:
        """Waits until a batch writes nothing any more; whether all of it landed."""
        batch = self.counter.batch(index)
        if batch is None:
            return True
        self._wait(batch)
        self.counter.forget(index)
        return batch.ok

    def reset(self) -> None:
        """Gives up what has not begun and waits for what has."""
        for rid in list(self._queued):
            self.cancel(rid)
        for batch in self._started:
            self._wait(batch)
        self._started = []
        self.counter.reset()

    def close(self) -> None:
        """Ends the thread."""
        self.reset()
        self._batches.put(None)
        self._thread.end(SHUTDOWN_TIMEOUT_S)

    def _wait(self, batch: Batch) -> None:
        changed = self.counter.changed
        with changed:
            while not changed.wait_for(lambda: batch.over, LOAD_TIMEOUT_S):
                batch.given_up = True
                self._engine.say(f"kvplug: a load took longer than {LOAD_TIMEOUT_S:.0f} s; its requests are given up")

    # -- the copy thread ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (batch := self._batches.get()) is not None:
            began = time.perf_counter()
            ok = False
            for _ in range(TRIES):
                try:
                    ok = self._load(batch)
                    break
                except Exception as error:  # noqa: BLE001 - SGLang must be told that the batch is over
                    self._engine.caught("a load", error)
            self._over(batch, ok=ok)
            self._engine.counts["load_ns"] += int((time.perf_counter() - began) * 1e9)

    def _over(self, batch: Batch, *, ok: bool) -> None:
        if not ok:
            self._engine.counts["load_failures"] += len(batch.loads)
        try:
            self._store.unpin(np.concatenate([load.slots for load in batch.loads]))
        except Exception as error:  # noqa: BLE001 - the pool is gone; the bytes have landed
            self._engine.caught("releasing a load's pins", error)
        with self.counter.changed:
            batch.ok, batch.over = ok, True
            self.counter.changed.notify_all()

    def _load(self, batch: Batch) -> bool:
        base = self._store.base_address
        parts = []
        for name, pool in self._pools.sources.items():
            loads = [load for load in batch.loads if name in load.pages]
            if loads:
                ids = np.concatenate([load.pages[name] for load in loads])
                src = base + np.concatenate([load.pinned[name].offsets for load in loads])
                parts.append((pool, ids, src))
        for layer in range(self._pools.num_layers):
            if batch.given_up:
                return False
            for pool, ids, src in parts:
                runs = pool.layers[layer]
                if runs is not None:
                    self._device.load(runs.runs, src + runs.offset, ids, batch.after)
            with self.counter.changed:
                batch.landed = layer + 1
                self.counter.changed.notify_all()
        self._engine.counts["loaded_pages"] += sum(len(ids) for _, ids, _ in parts)
        self._engine.counts["loaded_bytes"] += sum(len(ids) * pool.block_nbytes for pool, ids, _ in parts)
        return True
