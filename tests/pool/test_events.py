"""The event ring: in order, and who lags or meets a rebuild is told that something was lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code
from kvplug.shm import layout as lay
from kvplug.store import KvStore
from tests.inside import pool_of

MakeStore = Callable[..., KvStore]
BLOCK = 16 * 1024
CHILD_TIMEOUT_S = 120


def some_keys(n: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def blocks(n: int) -> npt.NDArray[np.uint8]:
    return np.zeros((n, BLOCK), np.uint8)


def test_a_reader_sees_what_happens_from_now_on_in_order(make_store: MakeStore) -> None:
    store, other = make_store(size="8mib"), make_store(size="8mib")
    keys = some_keys(6)
    store.put(keys[:1], blocks(1))
    reader = pool_of(other).events()
    assert len(reader.read().kinds) == 0
    store.put(keys[1:4], blocks(3))
    other.put(keys[:5], blocks(5))
    store.remove(keys[[3, 0]])
    batch = reader.read()
    assert not batch.lapped
    assert batch.kinds.tolist() == [lay.E_SEALED] * 4 + [lay.E_CLEARED] * 2
    assert (batch.keys == keys[[1, 2, 3, 4, 3, 0]]).all()
    assert batch.slots[2] == batch.slots[4]
    assert batch.next_after == store.stats().event_seq
    assert len(reader.read().kinds) == 0


def test_an_event_names_the_slot_and_generation_that_a_pin_would(make_store: MakeStore) -> None:
    store = make_store(size="8mib")
    reader = pool_of(store).events()
    keys = some_keys(3)
    store.put(keys, blocks(3))
    batch = reader.read()
    pins = store.pin_batch(keys)
    assert (batch.slots == pins.slots).all()
    assert (batch.gens == pins.gens).all()
    store.unpin(pins.slots)


def test_what_is_in_writing_or_given_up_is_no_event(make_store: MakeStore) -> None:
    store = make_store(size="8mib")
    reader = pool_of(store).events()
    b = store.reserve_batch(some_keys(2), [100, 100])
    store.complete(b.slots, b.gens, 0, np.zeros(2, np.uint64))
    store.abort_batch(b.slots, b.gens, True)
    store.touch(some_keys(2))
    assert len(reader.read().kinds) == 0


def test_replaying_the_events_gives_what_the_pool_has(make_store: MakeStore) -> None:
    """Also while blocks are evicted, and with a reader that takes a few at a time."""
    store = make_store(size="8mib")
    reader = pool_of(store).events(max_events=7)
    keys = some_keys(900)
    there: set[bytes] = set()
    kinds: list[int] = []
    for at in range(0, len(keys), 20):
        assert (store.put(keys[at : at + 20], blocks(20)) == Code.OK).all()
        if at % 60 == 0:
            store.remove(keys[at + 3 : at + 9])
        while len((batch := reader.read()).kinds):
            assert not batch.lapped
            kinds += batch.kinds.tolist()
            for kind, key in zip(batch.kinds.tolist(), batch.keys, strict=True):
                if kind == lay.E_SEALED:
                    assert key.tobytes() not in there
                    there.add(key.tobytes())
                else:
                    there.remove(key.tobytes())
    assert lay.E_EVICTED in kinds
    assert there == {k.tobytes() for k in keys[store.exists(keys)]}
    stats = store.stats()
    assert kinds.count(lay.E_SEALED) == stats.stored_blocks
    assert kinds.count(lay.E_EVICTED) == stats.evicted_blocks
    assert kinds.count(lay.E_CLEARED) == stats.removed_blocks


def test_a_reader_that_was_lapped_is_told_and_goes_on_from_now(make_store: MakeStore) -> None:
    store = make_store(size="8mib")
    capacity = pool_of(store).geometry.event_cap
    reader, exact = pool_of(store).events(), pool_of(store).events()
    key = some_keys(1)
    for _ in range(capacity // 2):
        store.put(key, blocks(1))
        store.remove(key)
    batch = exact.read()
    assert (batch.lapped, len(batch.kinds)) == (False, capacity)  # a whole ring may be read, not one more
    store.put(key, blocks(1))
    batch = reader.read()
    assert batch.lapped
    assert len(batch.kinds) == 0
    assert batch.next_after == store.stats().event_seq
    store.remove(key)
    batch = reader.read()
    assert (batch.lapped, batch.kinds.tolist()) == (False, [lay.E_CLEARED])


def test_after_a_rebuild_every_reader_starts_over(make_store: MakeStore, pool_name: str) -> None:
    store = make_store(size="8mib")
    reader = pool_of(store).events()
    keys = some_keys(4)
    store.put(keys[:2], blocks(2))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DIE_IN_A_SECTION), pool_name],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    epoch = store.stats().epoch
    assert store.put(keys[2:3], blocks(1)).tolist() == [Code.OK]  # the next to come in finds it and rebuilds
    assert store.stats().epoch == epoch + 1
    batch = reader.read()
    assert batch.lapped
    assert len(batch.kinds) == 0
    store.put(keys[3:], blocks(1))
    batch = reader.read()
    assert not batch.lapped
    assert (batch.keys == keys[3:]).all()
    store.check_integrity()


DIE_IN_A_SECTION = """
    import sys
    import numpy as np
    from kvplug.config import Config
    from kvplug.shm import failpoints
    from kvplug.store import KvStore
    from tests.inside import pool_of
    store = KvStore(config=Config(pool=sys.argv[1], size="8mib"))
    failpoints.arm(pool_of(store).L, "sealed_word")
    store.put([bytes(32)], [bytes(100)])
"""
