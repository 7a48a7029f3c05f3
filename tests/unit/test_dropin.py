"""The calls under other stores' names answer as docs/dropin.md and its table say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.errors import Code, PoolNotFoundError
from kvplug.shm import layout, segment
from tests.inside import pool_of
from tests.pool.children import die_at, quiet
from tests.upstream import dropin, dropin_calls

BLOCK = 16 << 10


@pytest.fixture
def store() -> Iterator[KvStore]:
    pool = f"dropin-unit-{os.getpid()}"
    with KvStore(pool, "64mib") as made:
        yield made
    with contextlib.suppress(PoolNotFoundError):
        segment.remove_pool(pool, force=True)


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    return dropin.of_kvplug()


@pytest.mark.parametrize("case", [*dropin_calls.CASES, dropin_calls.LAST_CASE])
def test_an_answer_is_the_recorded_one(case: str, answers: dict[str, str]) -> None:
    assert answers[case] == dropin.recorded()[case]["kvplug"]


def test_every_call_is_recorded_of_all_and_stands_on_the_page() -> None:
    recorded = dropin.recorded()
    assert list(recorded) == [*dropin_calls.CASES, dropin_calls.LAST_CASE]
    assert all(set(by) == set(dropin.SYSTEMS) for by in recorded.values())
    assert dropin.PAGE.read_text() == dropin.page_with(recorded)


@pytest.mark.parametrize("verify", ["never", "always"])
def test_what_is_behind_the_block_stays_as_it_was_at_every_size(verify: str, store: KvStore) -> None:
    """Small, and large enough to be streamed; ends inside of fragments and between them."""
    rng = np.random.default_rng(7)
    source = rng.integers(0, 256, 8 << 20, np.uint8)
    target = np.zeros(12 << 20, np.uint8)
    with KvStore(config=store.config.with_changes(verify=verify)) as reader:
        for one in (store, reader):
            one.register_buffer(source.ctypes.data, source.nbytes)
            one.register_buffer(target.ctypes.data, target.nbytes)
        for nbytes in (1, 63, 4096, BLOCK + 1, 300_001, 1 << 20):
            name = f"{verify}-{nbytes}"
            assert store.batch_put_from_multi_buffers([name], [[source.ctypes.data]], [[nbytes]]) == [0]
            for cuts in ([nbytes], [nbytes + 1], [nbytes, 5], [0, nbytes // 2, nbytes], [2 * nbytes, 7, 0]):
                target[:] = 170
                starts = np.cumsum([0, *cuts[:-1]]) + 100
                at = (target.ctypes.data + starts).tolist()
                told = reader.batch_get_into_multi_buffers([name, "none", name], [at] * 3, [cuts] * 3)
                assert told == [nbytes, Code.MISSING, nbytes]
                assert (target[100 : 100 + nbytes] == source[:nbytes]).all()
                assert (target[:100] == 170).all()
                assert (target[100 + nbytes :] == 170).all()
            assert reader.batch_get_into_multi_buffers([name], [[target.ctypes.data]], [[nbytes - 1]]) == [Code.SIZE]


def test_what_can_not_be_said_after_a_death_is_no_no(store: KvStore) -> None:
    """A process dies while it makes the index anew; the next one that takes the lock does it again."""
    source = np.zeros(BLOCK, np.uint8)
    store.register_buffer(source.ctypes.data, BLOCK)
    names = [f"n{i}" for i in range(200)]
    rows = [[source.ctypes.data]] * len(names)
    assert store.batch_put_from_multi_buffers(names, rows, [[BLOCK]] * len(names)) == [0] * len(names)
    assert store.batch_is_exist(["n0", "other"]) == [1, 0]
    quiet(store)  # no thread of this store makes the index anew before it was looked at

    def remake(own: KvStore) -> None:
        pool_of(own).T[layout.H_DIRTY] = 1
        own.remove(np.zeros((1, 32), np.uint8))

    die_at(store, "rebuild_half", remake)
    assert store.batch_is_exist(["other"]) == [-1]
    store.remove(np.zeros((1, 32), np.uint8))  # takes the lock, and so makes the index anew
    assert store.batch_is_exist(["n0", "other"]) == [1, 0]


def test_nobody_says_no_for_a_pool_that_was_removed(store: KvStore) -> None:
    source = np.zeros(BLOCK, np.uint8)
    store.register_buffer(source.ctypes.data, BLOCK)
    store.batch_put_from_multi_buffers(["a"], [[source.ctypes.data]], [[BLOCK]])
    segment.remove_pool(store.pool_name, force=True)
    pool_of(store).maintain()
    assert store.batch_is_exist(["a", "b"]) == [1, -1]
    assert store.batch_put_from_multi_buffers(["b"], [[source.ctypes.data]], [[BLOCK]]) == [Code.RETIRED]
