"""What it takes to begin: attaching, creating, loading the kernels; and what the tables take of the pool."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.harness import GIB, KIB, Worker, config, keys, pool_name, remove_pool, room_for, wait_for_memory
from kvplug import KvStore
from kvplug.shm.jit import warm_up
from kvplug.shm.layout import Geometry

POOL_BYTES = 4 * GIB
ATTACH_ROUNDS = 31
CREATE_ROUNDS = 9
PROCESS_ROUNDS = 3
POOL_SIZES_GIB = (1, 2, 4, 8, 16, 30, 64, 100, 256, 500)

Figure = Callable[..., None]
Workers = Callable[[int], list[Worker]]


@pytest.fixture(autouse=True)
def _room() -> None:
    if not room_for(POOL_BYTES):
        pytest.skip("not enough memory to spare")


def test_attach(benchmark: Any, pool: str, workers: Workers, figure: Figure) -> None:
    """To a pool that another process made and fills behind; kernels are loaded, as by a process at its start."""
    warm_up()
    owner = KvStore(config=config(pool, POOL_BYTES))
    wait_for_memory(owner)
    attached: list[KvStore] = []

    def settled() -> tuple[tuple[()], dict[str, Any]]:
        while attached:
            attached.pop().close()
        return (), {}

    benchmark.pedantic(
        lambda: attached.append(KvStore(config=config(pool, POOL_BYTES), create=False)),
        setup=settled,
        rounds=ATTACH_ROUNDS,
        warmup_rounds=1,
    )
    settled()
    figure("attach", benchmark.stats.stats.median * 1e3, rounds=ATTACH_ROUNDS)
    times, in_new = [], []
    for _ in range(PROCESS_ROUNDS):
        (fresh,) = workers(1)
        times.append(fresh.do("times"))
        in_new.append(fresh.do("attach", pool=pool, size=POOL_BYTES))
        fresh.stop()
    owner.close()
    figure(
        "kernels",
        statistics.median(t["kernels_s"] for t in times) * 1e3,
        rounds=PROCESS_ROUNDS,
        beside=f"import of kvplug {statistics.median(t['import_s'] for t in times) * 1e3:.0f} ms; "
        f"the first attach after that {statistics.median(in_new) * 1e3:.0f} ms",
    )


def test_create(benchmark: Any, figure: Figure) -> None:
    """Until the first 256 KiB block is stored. The rest of the memory is reserved and faulted in behind."""
    warm_up()
    block = [np.ones(256 * KIB, np.uint8)]
    key = keys(1, 1)
    made: list[tuple[KvStore, str]] = []

    def away() -> tuple[tuple[()], dict[str, Any]]:
        while made:
            store, name = made.pop()
            store.close()
            remove_pool(name)
        return (), {}

    def create() -> None:
        name = pool_name()
        store = KvStore(config=config(name, POOL_BYTES))
        made.append((store, name))
        assert store.put(key, block)[0] == 0

    try:
        benchmark.pedantic(create, setup=away, rounds=CREATE_ROUNDS, warmup_rounds=1)
    finally:
        away()
    figure("create", benchmark.stats.stats.median * 1e3, rounds=CREATE_ROUNDS)


def test_tables(benchmark: Any, figure: Figure) -> None:
    """Tables, index and event ring of the default layout, at the worst of many pool sizes."""

    def share(gib: int) -> float:
        g = Geometry.plan(gib * GIB)
        return g.data_offset / g.segment_bytes * 100

    shares = {gib: share(gib) for gib in POOL_SIZES_GIB}
    benchmark.pedantic(share, (4,), rounds=9)
    figure(
        "tables",
        max(shares.values()),
        rounds=len(shares),
        beside=f"4 GiB: {shares[4]:.2f} %, {POOL_SIZES_GIB[-1]} GiB: {shares[POOL_SIZES_GIB[-1]]:.2f} %",
    )
