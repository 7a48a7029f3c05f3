"""A process beside the one that measures. Reads ``[command, arguments]`` as JSON lines, answers each with one."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

PR_SET_PDEATHSIG = 1
BUFFERS = 16  # private batches used by turns, so that no cache holds them all
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

BEGAN = time.perf_counter()

from kvplug import KvStore  # noqa: E402 -- what the import takes is one of the answers
from kvplug.config import Config  # noqa: E402
from kvplug.shm import failpoints  # noqa: E402
from kvplug.shm.jit import warm_up  # noqa: E402

IMPORTED = time.perf_counter()
U8 = Any


def keys(n: int, seed: int) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def pattern(block: int, rows: int) -> U8:
    """Blocks to store: the same random bytes, the row's number in front."""
    out = np.tile(np.random.default_rng(block).integers(0, 256, block, np.uint8), (rows, 1))
    out[:, :8] = np.arange(rows, dtype=np.int64).view(np.uint8).reshape(rows, 8)
    return out


class Hands:
    """One method per command."""

    def __init__(self) -> None:
        self.store: KvStore | None = None
        self.keys: U8 = keys(0, 0)
        self.buffers: U8 = np.zeros((0, 0), np.uint8)
        self.rng = np.random.default_rng(os.getpid())

    def times(self) -> dict[str, float]:
        """Seconds that importing kvplug and loading its kernels took in this fresh process."""
        start = time.perf_counter()
        warm_up()
        return {"import_s": IMPORTED - BEGAN, "kernels_s": time.perf_counter() - start}

    def attach(self, pool: str, size: int) -> float:
        """Attach (or create); seconds."""
        warm_up()
        start = time.perf_counter()
        self.store = KvStore(config=Config(pool=pool, size=size))
        return time.perf_counter() - start

    def fill(self, pool: str, size: int, block: int, count: int, seed: int, rows: int) -> int:
        """Store ``count`` blocks in batches of ``rows``, of which every batch has the same bytes. Number stored."""
        self.attach(pool, size)
        store = self.store
        assert store is not None
        deadline = time.monotonic() + 120
        while store.stats().reserved_slabs < store.stats().slabs and time.monotonic() < deadline:
            time.sleep(0.02)
        wanted, blocks, stored = keys(count, seed), pattern(block, rows), 0
        for at in range(0, count, rows):
            part = wanted[at : at + rows]
            stored += int((store.put(part, blocks[: len(part)]) == 0).sum())
        return stored

    def prepare(self, pool: str, size: int, block: int, count: int, seed: int, batch: int) -> bool:
        """Attach, and have private buffers ready, and those of the keys whose blocks are there."""
        self.attach(pool, size)
        assert self.store is not None
        wanted = keys(count, seed)
        self.keys = wanted[self.store.exists(wanted)]
        self.buffers = np.ones((BUFFERS * batch, block), np.uint8)
        self.store.mapping[self.store.data_offset :: 4096].max()
        return True

    def get(self, seconds: float, batch: int) -> dict[str, float]:
        """get_into of batches of known keys for so long: bytes, seconds, hits, slowest call."""
        store, n = self.store, len(self.keys)
        assert store is not None
        moved = hits = calls = 0
        slowest = 0.0
        start = now = time.perf_counter()
        while now - start < seconds:
            at = int(self.rng.integers(0, n - batch))
            to = self.buffers[calls % BUFFERS * batch : (calls % BUFFERS + 1) * batch]
            began = time.perf_counter()
            codes = store.get_into(self.keys[at : at + batch], to)
            now = time.perf_counter()
            slowest = max(slowest, now - began)
            hit = int((codes == 0).sum())
            hits += hit
            moved += hit * to.shape[1]
            calls += 1
        return {
            "bytes": moved,
            "seconds": now - start,
            "asked": calls * batch,
            "hits": hits,
            "slowest": slowest,
        }

    def memcpy(self, seconds: float, batch: int) -> dict[str, float]:
        """np.copyto out of the mapping for so long: bytes, seconds."""
        store = self.store
        assert store is not None
        block = self.buffers.shape[1]
        data, first = store.mapping, store.data_offset
        n = (len(data) - first) // block - batch
        moved = calls = 0
        start = now = time.perf_counter()
        while now - start < seconds:
            at = first + int(self.rng.integers(0, n)) * block
            to = self.buffers[calls % BUFFERS * batch : (calls % BUFFERS + 1) * batch]
            np.copyto(to, data[at : at + batch * block].reshape(batch, block))
            now = time.perf_counter()
            moved += batch * block
            calls += 1
        return {"bytes": moved, "seconds": now - start}

    def mixed(self, seconds: float, batch: int) -> dict[str, Any]:
        """Gets, puts of new blocks, pins and look-ups in turn: slowest call of each, hold times in ns."""
        store, n = self.store, len(self.keys)
        assert store is not None
        slowest = {"get": 0.0, "put": 0.0, "pin": 0.0, "exists": 0.0}
        calls = 0
        few = max(1, batch // 4)
        start = now = time.perf_counter()
        while now - start < seconds:
            at = int(self.rng.integers(0, n - batch))
            known = self.keys[at : at + batch]
            new = self.rng.integers(0, 256, (few, 32), np.uint8)
            for name, call in (
                ("get", lambda k=known: store.get_into(k, self.buffers[:batch])),
                ("put", lambda k=new: store.put(k, self.buffers[:few])),
                ("pin", lambda k=known: store.unpin(store.pin_batch(k).slots)),
                ("exists", lambda k=known: store.exists(k)),
            ):
                began = time.perf_counter()
                call()
                now = time.perf_counter()
                slowest[name] = max(slowest[name], now - began)
                calls += 1
        holds = store._pool.hold_times_ns()
        return {"slowest": slowest, "calls": calls, "holds_ns": [int(x) for x in np.percentile(holds, [50, 99, 100])]}

    def die_inside(self, pool: str, size: int, failpoint: str) -> int:
        """A child attaches and is killed inside a section. The signal that ended it."""
        warm_up()
        child = os.fork()
        if child == 0:
            store = KvStore(config=Config(pool=pool, size=size, prefault=False))
            failpoints.arm(store._pool.L, failpoint)
            store.put(keys(1, os.getpid() + time.time_ns()), [np.ones(4096, np.uint8)])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return -os.waitstatus_to_exitcode(status)

    def close(self) -> bool:
        """Leave the pool."""
        if self.store is not None:
            self.store.close()
            self.store = None
        return True


def main() -> None:
    """Until standard input ends."""
    hands = Hands()
    for line in sys.stdin:
        command, arguments = json.loads(line)
        print(json.dumps(getattr(hands, command)(**arguments)), flush=True)
    threading.Timer(5.0, os._exit, (0,)).start()
    hands.close()
    os._exit(0)


if __name__ == "__main__":
    main()
