"""Where there is no room, or a client has had its share, keys get a code; nothing waits, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvplug import errors
from kvplug.errors import Code
from kvplug.shm import layout as lay
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.stopwatch import Stopwatch

MakeStore = Callable[..., KvStore]
BLOCK = 16 * 1024
AT_ONCE_S = 2.0  # a deadline of the lock is 0.1 s; generous for a busy machine


def some_keys(n: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def some_blocks(n: int, nbytes: int = BLOCK) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, nbytes), np.uint8)


def rows(store: KvStore) -> int:
    return pool_of(store).geometry.n_rows


def fill(store: KvStore) -> npt.NDArray[np.uint8]:
    """As many blocks of the smallest size as there are slots."""
    keys = some_keys(rows(store), seed=77)
    assert (store.put(keys, some_blocks(len(keys))) == Code.OK).all()
    assert store.stats().sealed_blocks == rows(store)
    return keys


def test_a_pool_full_of_pinned_blocks_refuses_counts_and_does_not_wait(make_store: MakeStore) -> None:
    a = make_store(size="8mib", pin_budget_share=1.0, reserve_budget_share=1.0)
    b = make_store(size="8mib", reserve_budget_share=1.0)
    keys = fill(a)
    held = a.pin_batch(keys)
    assert (held.codes == Code.OK).all()
    new = some_keys(10, seed=2)
    watch = Stopwatch()
    assert (b.put(new, some_blocks(10)) == Code.FULL).all()
    assert (b.reserve(new[:3], BLOCK).codes == Code.FULL).all()
    assert (b.put(new[:1], some_blocks(1, 100_000)) == Code.FULL).all()  # nor does another size get a slab
    assert watch.took_s() < AT_ONCE_S
    stats = b.stats()
    assert (stats.refused_full, stats.evicted_blocks, stats.sealed_blocks) == (14, 0, len(keys))
    assert b.put(keys[:4], some_blocks(4)).tolist() == [Code.EXISTS] * 4
    mixed = np.concatenate((new[:1], keys[:1], new[1:2]))
    assert b.put(mixed, some_blocks(3)).tolist() == [Code.FULL, Code.EXISTS, Code.FULL]
    out = np.zeros((len(keys), BLOCK), np.uint8)
    assert (b.get_into(keys, out) == Code.OK).all()
    a.unpin(held.slots[:5])
    codes = b.put(new, some_blocks(10))
    assert (codes == Code.OK).sum() == 5
    assert (codes == Code.FULL).sum() == 5
    assert a.exists(keys).sum() == len(keys) - 5
    assert a.exists(keys[5:]).all()
    b.check_integrity()


def test_a_pool_full_of_unfinished_blocks_refuses_until_they_are_given_up(make_store: MakeStore) -> None:
    a = make_store(size="8mib", reserve_budget_share=1.0)
    b = make_store(size="8mib")
    held = a.reserve_batch(some_keys(rows(a)), [BLOCK])
    assert (held.codes == Code.OK).all()
    new = some_keys(2, seed=2)
    assert (b.put(new, some_blocks(2)) == Code.FULL).all()
    assert (a.abort_batch(held.slots, held.gens, False) == Code.OK).all()
    assert (b.put(new, some_blocks(2)) == Code.FULL).all()  # in quarantine: somebody may still be writing
    assert (a.acknowledge(held.slots, held.gens) == Code.OK).all()
    assert (b.put(new, some_blocks(2)) == Code.OK).all()
    b.check_integrity()


def test_the_pin_budget_is_each_clients_own(make_store: MakeStore) -> None:
    a = make_store(size="8mib", pin_budget_share=0.25)
    b = make_store(size="8mib", pin_budget_share=0.5)
    keys = fill(a)
    n, share = len(keys), rows(a) // 4
    first = a.pin_batch(keys)
    assert (first.codes[:share] == Code.OK).all()
    assert (first.codes[share:] == Code.BUDGET).all()
    again = a.pin_batch(keys[:share])  # the same blocks again cost nothing
    assert (again.codes == Code.OK).all()
    other = b.pin_batch(keys)
    assert (other.codes == Code.OK).sum() == rows(b) // 2
    a.unpin(again.slots)
    assert (a.pin_batch(keys[n // 2 :], prefix=True).codes == Code.BUDGET)[0]
    a.unpin(first.slots)
    assert (a.pin_batch(keys).codes == Code.OK).sum() == share
    # Both budgets together leave room: a stranger's put goes through.
    assert (make_store(size="8mib").put(some_keys(20, seed=5), some_blocks(20)) == Code.OK).all()
    a.check_integrity()


def test_a_large_block_costs_as_many_pins_as_it_has_room_for(make_store: MakeStore) -> None:
    store = make_store(size="8mib", pin_budget_share=0.25)
    keys = some_keys(20)
    large = 8 * BLOCK
    store.put(keys, some_blocks(20, large))
    assert (store.pin_batch(keys).codes == Code.OK).sum() == rows(store) // 4 // 8


def test_one_block_can_be_pinned_and_written_whatever_the_budget(make_store: MakeStore) -> None:
    store = make_store(size="8mib", pin_budget_share=1e-6, reserve_budget_share=1e-6)
    keys = some_keys(3)
    slab = store.stats().slab_bytes
    assert (store.put(keys, some_blocks(3, slab)) == Code.OK).all()
    b = store.pin_batch(keys)
    assert b.codes.tolist() == [Code.OK, Code.BUDGET, Code.BUDGET]
    store.unpin(b.slots)
    assert store.pin_batch(keys[1:2]).codes.tolist() == [Code.OK]


def test_the_reserve_budget_is_each_clients_own(make_store: MakeStore) -> None:
    a = make_store(size="8mib", reserve_budget_share=0.25)
    b = make_store(size="8mib", reserve_budget_share=0.5)
    share = rows(a) // 4
    keys = some_keys(share + 10)
    mine = a.reserve_batch(keys, [BLOCK])
    assert (mine.codes[:share] == Code.OK).all()
    assert (mine.codes[share:] == Code.BUDGET).all()
    assert a.put(some_keys(1, seed=3), some_blocks(1)).tolist() == [Code.BUDGET]
    assert (b.put(keys[share:], some_blocks(10)) == Code.OK).all()
    sums = np.zeros(share, np.uint64)
    assert (a.complete(mine.slots[:share], mine.gens[:share], 0, sums) == Code.OK).all()
    assert (a.put(some_keys(5, seed=3), some_blocks(5)) == Code.OK).all()
    b.check_integrity(deep=False)


def test_given_up_slots_count_against_the_budget_no_longer(make_store: MakeStore) -> None:
    store = make_store(size="8mib", reserve_budget_share=0.25)
    share = rows(store) // 4
    for _ in range(3):
        held = store.reserve_batch(some_keys(share), [BLOCK])
        assert (held.codes == Code.OK).all()
        store.abort_batch(held.slots, held.gens, True)
    store.check_integrity()


def test_a_batch_of_any_length_keeps_to_the_budget_by_itself(make_store: MakeStore) -> None:
    """put has only part of a batch in writing at a time."""
    store = make_store(size="8mib", reserve_budget_share=0.05)
    keys = some_keys(2000)
    assert (store.put(keys, some_blocks(2000)) == Code.OK).all()
    store.check_integrity()


def test_the_129th_client_is_told_so_and_a_place_that_becomes_free_is_given_away(make_store: MakeStore) -> None:
    stores = [make_store(size="8mib", prefault=False) for _ in range(lay.MAX_CLIENTS)]
    assert stores[0].stats().clients == lay.MAX_CLIENTS == 128
    assert len({s.session_id for s in stores}) == 128
    with pytest.raises(errors.ClientLimitError, match="128"):
        make_store(size="8mib")
    key = some_keys(1)
    stores[0].put(key, some_blocks(1))
    pins = [s.pin_batch(key) for s in stores]  # a bit for each of them
    for s, b in zip(stores[:-1], pins[:-1], strict=True):
        assert b.codes[0] == Code.OK
        s.unpin(b.slots)
    assert stores[0].remove(key).tolist() == [Code.PINNED]
    stores[-1].close()
    assert stores[0].remove(key).tolist() == [Code.OK]
    late = make_store(size="8mib")
    assert late.session_id not in {s.session_id for s in stores}
    late.check_integrity()
