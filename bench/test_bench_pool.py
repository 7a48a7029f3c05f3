"""A second process puts and gets, against memcpy between the same buffers.

Another process has made and filled the pool; this one is the second. Bytes are checked, round by round where that is
outside the clock. The reference copies the batch with one ``np.copyto`` for each run of blocks that lie side by side:
no Python per block, so it is the fastest memcpy there is for these bytes.
"""

from __future__ import annotations

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
    in_pairs,
    keys,
    offsets_of,
    room_for,
    runs,
    touch_all,
)
from bench.worker import pattern
from kvplug import KvStore

POOL_BYTES = GIB
BATCH_BYTES = 128 * MIB
SIZES = {"256KiB": 256 * KIB, "2MiB": 2 * MIB, "32KiB": 32 * KIB}
ROUNDS = 31
SEED = 7
ONE_GET_ROUNDS = 3000

Figure = Callable[..., None]
Workers = Callable[[int], list[Worker]]


def speed(seconds: float, nbytes: int = BATCH_BYTES) -> str:
    return f"{nbytes / seconds / GIB:.1f} GiB/s"


def filled(pool: str, workers: Workers, block: int) -> tuple[KvStore, np.ndarray[Any, Any]]:
    """This process's store on a pool that another one has filled to the brim, and the keys of what is in it."""
    if not room_for(POOL_BYTES + 3 * BATCH_BYTES):
        pytest.skip("not enough memory to spare")
    (writer,) = workers(1)
    rows = BATCH_BYTES // block
    count = POOL_BYTES // block  # a little more than there is room for
    writer.do("fill", pool=pool, size=POOL_BYTES, block=block, count=count, seed=SEED, rows=rows)
    store = KvStore(config=config(pool, POOL_BYTES), create=False)
    touch_all(store)
    wanted = keys(count, SEED)
    there = store.exists(wanted)
    whole = [a for a in range(0, count - rows + 1, rows) if there[a : a + rows].all()]
    assert len(whole) * BATCH_BYTES >= POOL_BYTES // 2, "working set too small"
    return store, np.concatenate([wanted[a : a + rows] for a in whole])


@pytest.mark.parametrize("size", SIZES)
def test_get(benchmark: Any, pool: str, workers: Workers, figure: Figure, size: str) -> None:
    block = SIZES[size]
    store, known = filled(pool, workers, block)
    rows = BATCH_BYTES // block
    batches = len(known) // rows
    where = offsets_of(store, known)
    own = np.ones((2, rows, block), np.uint8)
    expected = pattern(block, rows)
    told: list[Any] = []

    def memcpy(i: int) -> None:
        j, to = i % batches, own[i % 2]
        for a, b, at in runs(where[j * rows : (j + 1) * rows], block):
            np.copyto(to[a:b], store.mapping[at : at + (b - a) * block].reshape(b - a, block))

    def get(i: int) -> None:
        j = (i + batches // 2) % batches
        told[:] = store.get_into(known[j * rows : (j + 1) * rows], own[i % 2])

    get(0)
    assert not any(told)
    assert (own[0] == expected).all(), "wrong bytes"
    ratio, ours_s, memcpy_s = in_pairs(benchmark, get, memcpy, rounds=ROUNDS)
    assert not any(told)
    store.close()
    figure(f"get_{size}", ratio, rounds=ROUNDS, beside=f"get {speed(ours_s)}, memcpy {speed(memcpy_s)}")


@pytest.mark.parametrize("size", SIZES)
def test_put_into_a_full_pool(benchmark: Any, pool: str, workers: Workers, figure: Figure, size: str) -> None:
    block = SIZES[size]
    store, known = filled(pool, workers, block)
    rows = BATCH_BYTES // block
    batches = len(known) // rows
    where = offsets_of(store, known)
    source = np.stack([pattern(block, rows), pattern(block, rows)])
    evicted = store.stats().evicted_blocks
    new = [keys(rows, 1000 + i) for i in range(ROUNDS + 2)]
    told: list[Any] = []

    def memcpy(i: int) -> None:  # spoils the blocks that lie there: nobody reads them any more
        j = i % batches
        for a, b, at in runs(where[j * rows : (j + 1) * rows], block):
            np.copyto(store.mapping[at : at + (b - a) * block].reshape(b - a, block), source[i % 2, a:b])

    def put(i: int) -> None:
        told[:] = store.put(new[i], source[i % 2])

    ratio, ours_s, memcpy_s = in_pairs(benchmark, put, memcpy, rounds=ROUNDS)
    assert not any(told)
    assert store.stats().evicted_blocks - evicted >= ROUNDS * rows, "the pool was not full"
    got = np.zeros_like(source[0])
    store.put(final := keys(rows, 999), source[0])
    assert not store.get_into(final, got).any()
    assert (got == source[0]).all(), "wrong bytes"
    store.close()
    figure(f"put_{size}", ratio, rounds=ROUNDS, beside=f"put {speed(ours_s)}, memcpy {speed(memcpy_s)}")


def test_one_get(benchmark: Any, pool: str, workers: Workers, figure: Figure) -> None:
    """One 256 KiB block a call, source and destination cold, key and buffer given as ``[bytes]`` and ``[array]``."""
    block = 256 * KIB
    store, known = filled(pool, workers, block)
    where = offsets_of(store, known)
    own = np.ones((2 * BATCH_BYTES // block, block), np.uint8)
    rng = np.random.default_rng(0)
    theirs, mine = rng.integers(0, len(known), (2, ONE_GET_ROUNDS + 50)).tolist()
    sources = [store.mapping[at : at + block] for at in where[theirs].tolist()]
    wanted = [[known[i].tobytes()] for i in mine]
    buffers = list(own)

    def memcpy(i: int) -> None:
        np.copyto(buffers[i % len(buffers)], sources[i])

    def get(i: int) -> None:
        store.get_into(wanted[i], [buffers[(i + len(buffers) // 2) % len(buffers)]])

    _, ours_s, memcpy_s = in_pairs(benchmark, get, memcpy, rounds=ONE_GET_ROUNDS, warmup=50)
    store.close()
    figure(
        "one_get",
        ours_s / memcpy_s,
        rounds=ONE_GET_ROUNDS,
        beside=f"get {ours_s * 1e6:.1f} µs, memcpy {memcpy_s * 1e6:.1f} µs",
    )
