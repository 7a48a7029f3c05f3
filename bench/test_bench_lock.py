"""The lock under load: how long it is held, what a death inside costs, and eight processes at once."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.harness import (
    GIB,
    KIB,
    MIB,
    Worker,
    config,
    keys,
    room_for,
    together,
    wait_for_memory,
)
from bench.worker import BUFFERS
from kvplug import KvStore
from tests.inside import pool_of

Figure = Callable[..., None]
Workers = Callable[[int], list[Worker]]

BUSY_ROUNDS = 600
REBUILD_SLOTS = 100_000
REBUILD_BLOCK = 16 * KIB
REBUILD_ROUNDS = 9
PROCESSES = 8
EIGHT_ROUNDS = 9
EIGHT_SLICE_S = 0.5
EIGHT_BLOCK = 256 * KIB
EIGHT_BATCH = 32
EIGHT_POOL_BYTES = GIB
MIXED_S = 5.0


def test_hold_time_beside_a_busy_thread(benchmark: Any, pool: str, figure: Figure) -> None:
    """Puts that evict, pins and releases, while another thread of this process keeps the interpreter busy."""
    block = 64 * KIB
    store = KvStore(config=config(pool, 256 * MIB))
    wait_for_memory(store)
    source = np.ones((256, block), np.uint8)
    known = keys(4096, 3)
    for at in range(0, len(known), 256):
        store.put(known[at : at + 256], source)
    stop = threading.Event()

    def spin() -> None:
        n = 0
        while not stop.is_set():
            n += 1

    thread = threading.Thread(target=spin, daemon=True)
    rng = np.random.default_rng(4)

    def work() -> None:
        store.put(rng.integers(0, 256, (64, 32), np.uint8), source[:64])
        b = store.pin_batch(known[rng.integers(0, len(known), 256)])
        store.unpin(b.slots, b.gens)

    thread.start()
    try:
        benchmark.pedantic(work, rounds=BUSY_ROUNDS, warmup_rounds=5)
    finally:
        stop.set()
        thread.join()
    holds = pool_of(store).hold_times_ns()
    store.close()
    p50, p99, worst = (float(x) / 1e6 for x in np.percentile(holds, [50, 99, 100]))
    figure("hold_p99", p99, rounds=len(holds), beside=f"p50 {p50:.3f} ms, longest {worst:.2f} ms")


def test_rebuild_after_a_death_inside_a_section(benchmark: Any, pool: str, workers: Workers, figure: Figure) -> None:
    """A process is killed inside a section; the next to take the lock makes index and lists anew; others look up."""
    size = (REBUILD_SLOTS + 8192) * REBUILD_BLOCK + 64 * MIB
    if not room_for(size):
        pytest.skip("not enough memory to spare")
    store = KvStore(config=config(pool, size))
    wait_for_memory(store)
    source = np.ones((2048, REBUILD_BLOCK), np.uint8)
    known = keys(REBUILD_SLOTS, 8)
    for at in range(0, REBUILD_SLOTS, 2048):
        part = known[at : at + 2048]
        assert not store.put(part, source[: len(part)]).any()
    (killer,) = workers(1)
    looked_up = missed = 0
    during: list[float] = []
    go, stop = threading.Event(), threading.Event()

    def look_up() -> None:
        nonlocal looked_up, missed
        sample = known[:: REBUILD_SLOTS // 256][:256]
        while not stop.is_set():
            go.wait()
            while go.is_set() and not stop.is_set():
                began = time.perf_counter()
                there = store.exists(sample)
                during.append(time.perf_counter() - began)
                looked_up += len(there)
                missed += int((~there).sum())

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    rebuilds = store.stats().rebuilds

    def die() -> tuple[tuple[()], dict[str, Any]]:
        assert killer.do("die_inside", pool=pool, size=size, failpoint="reserve_indexed") == signal.SIGKILL
        go.set()
        return (), {}

    def next_section() -> None:
        store.unpin(np.zeros(1, np.int64))
        go.clear()

    benchmark.pedantic(next_section, setup=die, rounds=REBUILD_ROUNDS, warmup_rounds=1)
    stop.set()
    go.set()
    thread.join()
    done = store.stats().rebuilds - rebuilds
    assert store.exists(known).all(), "a rebuild lost blocks"
    store.check_integrity(deep=False)
    store.close()
    longest = pool_of(store).hold_times_ns()
    # Whoever takes the lock first rebuilds: that may be the maintenance thread, so the sections' own times count too.
    times = sorted(longest.tolist(), reverse=True)[:done]
    assert done >= REBUILD_ROUNDS
    figure(
        "rebuild",
        max(statistics.median(times) / 1e6, benchmark.stats.stats.median * 1e3),
        rounds=done,
        beside=f"longest {max(times) / 1e6:.1f} ms; {missed / max(looked_up, 1):.0%} of look-ups meanwhile missed",
    )
    p99, slowest = (float(x) * 1e3 for x in np.percentile(during, [99, 100]))
    figure("rebuild_lookup", p99, rounds=len(during), beside=f"longest {slowest:.1f} ms")


def test_eight_processes(benchmark: Any, pool: str, workers: Workers, figure: Figure) -> None:
    """One process's gets and eight processes' by turns; then all eight get, put into the full pool, pin and look up."""
    if not room_for(EIGHT_POOL_BYTES + PROCESSES * BUFFERS * EIGHT_BATCH * EIGHT_BLOCK):
        pytest.skip("not enough memory to spare")
    crew = workers(PROCESSES)
    count = EIGHT_POOL_BYTES // EIGHT_BLOCK
    asked = {"pool": pool, "size": EIGHT_POOL_BYTES, "block": EIGHT_BLOCK, "seed": 9, "count": count}
    crew[0].do("fill", **asked, rows=256)
    together(crew, "prepare", **asked, batch=EIGHT_BATCH)
    ratios, alone, all_eight, slowest_get = [], [], [], 0.0

    def rate(answers: list[dict[str, float]]) -> float:
        return sum(a["bytes"] / a["seconds"] for a in answers)

    def one() -> tuple[tuple[()], dict[str, Any]]:
        alone.append(rate([crew[0].do("get", seconds=EIGHT_SLICE_S, batch=EIGHT_BATCH)]))
        return (), {}

    def eight() -> None:
        nonlocal slowest_get
        answers = together(crew, "get", seconds=EIGHT_SLICE_S, batch=EIGHT_BATCH)
        all_eight.append(rate(answers))
        ratios.append(all_eight[-1] / alone[-1])
        slowest_get = max(slowest_get, *(a["slowest"] for a in answers))
        assert all(a["hits"] == a["asked"] > 0 for a in answers)

    benchmark.pedantic(eight, setup=one, rounds=EIGHT_ROUNDS)
    copy_one = rate([crew[0].do("memcpy", seconds=EIGHT_SLICE_S, batch=EIGHT_BATCH)])
    copy_all = rate(together(crew, "memcpy", seconds=EIGHT_SLICE_S, batch=EIGHT_BATCH))
    mixed = together(crew, "mixed", seconds=MIXED_S, batch=EIGHT_BATCH)
    together(crew, "close")
    figure(
        "eight_get",
        statistics.median(ratios),
        rounds=EIGHT_ROUNDS,
        beside=f"one {statistics.median(alone) / GIB:.1f} GiB/s, eight {statistics.median(all_eight) / GIB:.1f} GiB/s; "
        f"memcpy by one {copy_one / GIB:.1f}, by eight {copy_all / GIB:.1f}",
    )
    by_call = {name: max(m["slowest"][name] for m in mixed) * 1e3 for name in mixed[0]["slowest"]}
    figure(
        "eight_slowest",
        max(*by_call.values(), slowest_get * 1e3),
        rounds=sum(m["calls"] for m in mixed),
        beside=", ".join(f"{name} {ms:.0f} ms" for name, ms in by_call.items()),
    )
    figure(
        "hold_p99_eight",
        max(m["holds_ns"][1] for m in mixed) / 1e6,
        rounds=sum(m["calls"] for m in mixed),
        beside=f"longest {max(m['holds_ns'][2] for m in mixed) / 1e6:.1f} ms",
    )
