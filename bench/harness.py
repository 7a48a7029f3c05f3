"""What the pool's benchmarks share: pools of their own, other processes at work on them, timing in pairs.

A ratio is the median over rounds of (the reference's time ÷ ours), measured one right after the other, so that a busy
neighbour slows both. The reference copies the same bytes between the same buffers with as few calls as it can.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvplug import KvStore, hostmem
from kvplug.config import Config
from kvplug.shm import segment

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WORKER: Final = Path(__file__).resolve().parent / "worker.py"
WORKER_ANSWER_S: Final = 180.0
FLUSH_BYTES: Final = 96 * MIB  # three times a common last-level cache
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

_numbers = itertools.count()


def keys(n: int, seed: int) -> U8:
    """``n`` random keys, (n, 32) uint8; the same for the same seed, in every process."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def pool_name() -> str:
    """A name that no other pool has."""
    return f"bench-{os.getpid()}-{next(_numbers)}"


def room_for(nbytes: int) -> bool:
    """Whether shared memory and memory have this much to spare, and some."""
    memory, space = hostmem.memory(), hostmem.shm_space()
    spare = memory.limit_bytes - memory.used_bytes if memory.limit_bytes else nbytes * 2
    return min(spare, space.free_bytes) > nbytes + GIB


def config(pool: str, size: int, **settings: Any) -> Config:
    """Settings that no environment or file of this machine changes."""
    return Config(pool=pool, size=size, **settings)


def remove_pool(pool: str) -> None:
    """Remove the pool, whoever is attached, and the lock file of its name."""
    path = segment.segment_path(pool)
    if os.path.exists(path):
        segment.remove_segment_file(path)
    Path(segment.lock_path(pool)).unlink(missing_ok=True)


def wait_for_memory(store: KvStore, timeout_s: float = 60.0) -> None:
    """Until the pool has all its memory: nothing is to be faulted in while a clock runs."""
    deadline = time.monotonic() + timeout_s
    while store.stats().reserved_slabs < store.stats().slabs and time.monotonic() < deadline:
        time.sleep(0.05)
    touch_all(store)


def touch_all(store: KvStore) -> None:
    """Map every page of the pool's data into this process."""
    store.mapping[store.data_offset :: 4096].max()


class Worker:
    """Another process, which takes commands: see worker.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("KVPLUG_")},
        )

    def begin(self, command: str, **arguments: Any) -> None:
        """Send a command and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What the command answered."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}; its last words are above")
        return json.loads(line)

    def do(self, command: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        self.begin(command, **arguments)
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def together(workers: Sequence[Worker], command: str, **arguments: Any) -> list[Any]:
    """The command in all of them at once, and their answers."""
    for w in workers:
        w.begin(command, **arguments)
    return [w.answer() for w in workers]


def in_pairs(
    benchmark: Any, ours: Callable[[int], None], reference: Callable[[int], None], *, rounds: int, warmup: int = 2
) -> tuple[float, float, float]:
    """(median of reference ÷ ours, median seconds of ours, of the reference). Both get the round's number."""
    numbers = itertools.count()
    reference_s: list[float] = []

    def setup() -> tuple[tuple[int], dict[str, Any]]:
        i = next(numbers)
        start = time.perf_counter()
        reference(i)
        reference_s.append(time.perf_counter() - start)
        return (i,), {}

    benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=warmup)
    ours_s = list(benchmark.stats.stats.data)
    del reference_s[:-rounds]
    ratio = statistics.median(r / o for r, o in zip(reference_s, ours_s, strict=True))
    return ratio, statistics.median(ours_s), statistics.median(reference_s)


def runs(offsets: I64, size: int) -> list[tuple[int, int, int]]:
    """(first, last + 1, offset) of blocks that lie one behind the other: each such run is one memcpy."""
    breaks = np.flatnonzero(np.diff(offsets) != size) + 1
    edges = [0, *breaks.tolist(), len(offsets)]
    return [(a, b, int(offsets[a])) for a, b in itertools.pairwise(edges)]


def offsets_of(store: KvStore, wanted: U8, step: int = 64) -> I64:
    """Where the blocks with these keys lie in the mapping; all must be there."""
    out = np.empty(len(wanted), np.int64)
    for at in range(0, len(wanted), step):
        b = store.pin_batch(wanted[at : at + step])
        assert (b.codes == 0).all(), np.unique(b.codes)
        out[at : at + step] = b.offsets
        store.unpin(b.slots)
    return out


class CacheFlusher:
    """Pushes everything else out of the caches."""

    def __init__(self) -> None:
        self._memory = np.zeros(FLUSH_BYTES, np.uint8)

    def __call__(self) -> None:
        self._memory += 1


def draw(n: int, size: int, count: int, seed: int) -> Iterator[I64]:
    """``count`` draws of ``size`` different numbers below ``n``."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.choice(n, size, replace=False)
