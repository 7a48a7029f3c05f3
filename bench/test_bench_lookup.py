"""Looking up, and pinning: 2048 keys a call, every call other keys, so that tables come from wherever they are by then.

Blocks are as small as the pool's tables are laid out for (16 KiB), which makes tables and probe lengths as large as
they get. "Turned over": as many bytes as the pool holds were stored in it 20 times more, each evicting another block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.harness import GIB, KIB, CacheFlusher, config, draw, keys, pool_name, remove_pool, room_for, wait_for_memory
from kvplug import KvStore
from tests.inside import pool_of

POOL_BYTES = GIB
BLOCK = 16 * KIB
BATCH = 2048
TURNOVERS = 20
ROUNDS = 100
COLD_ROUNDS = 31

Figure = Callable[..., None]
U8 = np.ndarray[Any, np.dtype[np.uint8]]


class Filled:
    """A full pool, and the keys of what is in it."""

    def __init__(self, pool: str) -> None:
        self.store = KvStore(config=config(pool, POOL_BYTES))
        wait_for_memory(self.store)
        self.capacity = pool_of(self.store).geometry.n_rows
        self._source = np.ones((BATCH, BLOCK), np.uint8)
        self._seed = 100
        self.known = np.empty((0, 32), np.uint8)
        self.store_once_over()

    def store_once_over(self) -> None:
        """Put as many new blocks as the pool has slots."""
        self._seed += 1
        new = keys(self.capacity, self._seed)
        for at in range(0, len(new), BATCH):
            part = new[at : at + BATCH]
            codes = self.store.put(part, self._source[: len(part)])
            assert not codes.any(), np.unique(codes)
        self.known = new[self.store.exists(new)]


@pytest.fixture(scope="module")
def fresh() -> Iterator[Filled]:
    if not room_for(POOL_BYTES):
        pytest.skip("not enough memory to spare")
    name = pool_name()
    filled = Filled(name)
    yield filled
    filled.store.close()
    remove_pool(name)


@pytest.fixture(scope="module")
def turned() -> Iterator[Filled]:
    if not room_for(POOL_BYTES):
        pytest.skip("not enough memory to spare")
    name = pool_name()
    filled = Filled(name)
    for _ in range(TURNOVERS):
        filled.store_once_over()
    assert filled.store.stats().evicted_blocks >= TURNOVERS * filled.capacity * 0.99
    yield filled
    filled.store.close()
    remove_pool(name)


def batches(filled: Filled, found: str, count: int) -> list[U8]:
    if found == "hit":
        return [filled.known[i] for i in draw(len(filled.known), BATCH, count, seed=5)]
    return list(keys(count * BATCH, 6).reshape(count, BATCH, 32))


@pytest.mark.parametrize("age", ["fresh", "turned"])
@pytest.mark.parametrize("call", ["exists", "match_prefix"])
@pytest.mark.parametrize("found", ["hit", "miss"])
def test_lookup(benchmark: Any, request: Any, figure: Figure, age: str, call: str, found: str) -> None:
    filled: Filled = request.getfixturevalue(age)
    wanted = iter(batches(filled, found, ROUNDS + 2))
    ask = getattr(filled.store, call)
    answers: list[Any] = []

    def look_up(batch: U8) -> None:
        answers.append(ask(batch))

    benchmark.pedantic(look_up, setup=lambda: ((next(wanted),), {}), rounds=ROUNDS, warmup_rounds=2)
    right = {"exists": BATCH if found == "hit" else 0, "match_prefix": BATCH if found == "hit" else 0}[call]
    assert all(int(np.sum(a)) == right for a in answers)
    figure(f"{call}_{found}_{age}", benchmark.stats.stats.median * 1e3, rounds=ROUNDS)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_pin_and_release(
    benchmark: Any, turned: Filled, figure: Figure, flush_caches: CacheFlusher, cold: bool
) -> None:
    rounds = COLD_ROUNDS if cold else ROUNDS
    wanted = iter(batches(turned, "hit", rounds + 2))
    pinned: list[int] = []

    def setup() -> tuple[tuple[U8], dict[str, Any]]:
        batch = next(wanted)
        if cold:
            flush_caches()
        return (batch,), {}

    def pin(batch: U8) -> None:
        b = turned.store.pin_batch(batch, prefix=True)
        turned.store.unpin(b.slots, b.gens)
        pinned.append(int((b.codes == 0).sum()))

    benchmark.pedantic(pin, setup=setup, rounds=rounds, warmup_rounds=2)
    assert set(pinned) == {BATCH}
    assert turned.store.stats().pinned_slots == 0
    figure("pin_cold" if cold else "pin", benchmark.stats.stats.median * 1e3, rounds=rounds)
