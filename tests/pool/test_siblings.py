"""Blocks that leave together: what one rank of an engine has stored of a span is worth nothing without the others."""

from __future__ import annotations

import numpy as np
import pytest

from kvplug import KvStore, errors
from kvplug.errors import Code
from kvplug.identity.keys import fold
from kvplug.shm import copy as copies
from kvplug.shm import failpoints
from kvplug.shm import layout as lay
from kvplug.shm.evict import SIBLINGS_A_SECTION
from tests.inside import pool_of
from tests.pool.children import GRACE_S, U8, another, blocks, check_nothing_left, die_at, keys, put, quiet, settle
from tests.pool.sample import MakeStore

SMALL, LARGE = 16 << 10, 64 << 10


def member(of: U8, index: int) -> U8:
    """Their keys under another sibling's number."""
    return fold(of, 0, index)


def put_as(store: KvStore, of: U8, nbytes: int, count: int, index: int) -> np.ndarray:
    """Store sibling ``index`` of each of these groups of ``count``; codes."""
    mine = member(of, index)
    b = store.reserve_batch(mine, [nbytes], siblings=(count, index))
    ok = b.codes == Code.OK
    slots, gens, at = b.slots[ok], b.gens[ok], b.offsets[ok]
    for offset, data in zip(at.tolist(), blocks(mine[ok], nbytes), strict=True):
        store.mapping[offset : offset + nbytes] = data
    sums = np.empty(len(slots), np.int64)
    copies.hash_batch(store.base_address + at, np.full(len(at), nbytes, np.int64), sums)
    b.codes[ok] = store.complete(slots, gens, 0, sums)
    return b.codes


def put_groups(store: KvStore, of: U8, nbytes: int, count: int) -> None:
    """Store all siblings of each group."""
    for index in range(count):
        assert (put_as(store, of, nbytes, count, index) == Code.OK).all()


def there(store: KvStore, of: U8, count: int) -> np.ndarray:
    """bool (groups, count): which siblings have a sealed block."""
    return np.stack([store.exists(member(of, index)) for index in range(count)], axis=1)


def broken(store: KvStore, of: U8, count: int) -> int:
    """Groups of which some are there and some are not."""
    found = there(store, of, count)
    return int((found.any(axis=1) & ~found.all(axis=1)).sum())


def small_pool(make_store: MakeStore) -> KvStore:
    return quiet(make_store("8mib", slab="1mib", quarantine_grace_s=GRACE_S, prefault=False))


@pytest.mark.parametrize("count", [2, 3, 8, lay.MAX_SIBLINGS])
@pytest.mark.parametrize("who", ["first", "last"])
def test_removing_one_removes_all(count: int, who: str, make_store: MakeStore) -> None:
    store = small_pool(make_store)
    of = keys(3, count)
    alone = keys(2, 99)
    put(store, alone, SMALL)
    put_groups(store, of, 4096, count)
    index = 0 if who == "first" else count - 1
    assert store.remove(member(of[:2], index)).tolist() == [Code.OK, Code.OK]
    assert there(store, of, count).tolist() == [[False] * count] * 2 + [[True] * count]
    assert store.exists(alone).all()
    assert store.stats().removed_blocks == 2 * count
    check_nothing_left(store)


def test_a_pinned_sibling_stays_and_changes_no_code(make_store: MakeStore) -> None:
    store = small_pool(make_store)
    of = keys(2, 1)
    put_groups(store, of, SMALL, 3)
    with store.pin(member(of[:1], 1)):
        assert store.remove(of).tolist() == [Code.OK, Code.OK]
        assert there(store, of, 3).tolist() == [[False, True, False], [False] * 3]
        assert store.remove(member(of[:1], 1)).tolist() == [Code.PINNED]
    assert store.remove(member(of[:1], 1)).tolist() == [Code.OK]
    check_nothing_left(store)


def test_a_sibling_in_writing_is_let_alone(make_store: MakeStore) -> None:
    store = small_pool(make_store)
    of = keys(1, 1)
    assert put_as(store, of, SMALL, 2, 0)[0] == Code.OK
    b = store.reserve_batch(member(of, 1), [SMALL], siblings=(2, 1))
    assert store.remove(of).tolist() == [Code.OK]
    assert store.still_writing(b.slots, b.gens).all()
    assert store.abort_batch(b.slots, b.gens, True).tolist() == [Code.OK]
    check_nothing_left(store)


def test_blocks_that_only_look_like_siblings_stay(make_store: MakeStore) -> None:
    """Another number of siblings is another engine's layout; a plain block has none."""
    store = small_pool(make_store)
    of = keys(1, 1)
    assert put_as(store, of, SMALL, 4, 0)[0] == Code.OK
    assert put_as(store, of, SMALL, 4, 3)[0] == Code.OK
    assert put_as(store, of, SMALL, 3, 2)[0] == Code.OK
    assert (put(store, member(of, 1), SMALL) == 0).all()
    assert store.remove(of).tolist() == [Code.OK]
    assert there(store, of, 4).tolist() == [[False, True, True, False]]
    assert store.remove(member(of, 1)).tolist() == [Code.OK]
    assert store.exists(member(of, 2)).all()
    check_nothing_left(store)


def test_no_victim_leaves_its_siblings_behind(make_store: MakeStore) -> None:
    """A full pool of groups, several turnovers: at no time is a part of one there."""
    store = small_pool(make_store)
    of = keys(400, 1)
    for at in range(0, 400, 20):
        for index in range(3):
            assert (put_as(store, of[at : at + 20], SMALL, 3, index) == Code.OK).all()
        assert broken(store, of[: at + 20], 3) == 0
    assert store.stats().evicted_blocks >= 400
    assert there(store, of, 3).all(axis=1).sum() >= 120
    check_nothing_left(store)


def test_siblings_of_another_size_go_too(make_store: MakeStore) -> None:
    store = small_pool(make_store)
    of = keys(40, 1)
    assert (put_as(store, of, SMALL, 2, 0) == Code.OK).all()
    assert (put_as(store, of, LARGE, 2, 1) == Code.OK).all()
    store.touch(member(of, 1))  # the large ones are worth more than anything
    for seed in range(30):
        put(store, keys(20, 100 + seed), SMALL)
    found = there(store, of, 2)
    assert not found.all(), "nothing was evicted"
    assert broken(store, of, 2) == 0
    check_nothing_left(store)


def test_a_drained_slab_takes_the_siblings_of_its_blocks(make_store: MakeStore) -> None:
    store = small_pool(make_store)
    of = keys(200, 1)
    put_groups(store, of, SMALL, 2)
    moves = store.stats().slab_moves
    put(store, keys(40, 2), LARGE)
    assert store.stats().slab_moves > moves
    found = there(store, of, 2)
    assert found.any()
    assert not found.all()
    assert broken(store, of, 2) == 0
    check_nothing_left(store)


def test_corrupt_blocks_take_their_siblings_along(make_store: MakeStore) -> None:
    store = quiet(make_store("8mib", slab="1mib", verify="always", prefault=False))
    of = keys(2, 1)
    put_groups(store, of, SMALL, 2)
    b = store.pin_batch(of[:1])
    store.mapping[int(b.offsets[0]) + 5] ^= 1
    store.unpin(b.slots)
    got = np.empty((2, SMALL), np.uint8)
    assert store.get_into(of, got).tolist() == [Code.CORRUPT, Code.OK]
    assert there(store, of, 2).tolist() == [[False, False], [True, True]]


def test_large_groups_are_done_in_several_sections(make_store: MakeStore) -> None:
    """127 siblings for each of many victims: the lock is let go in between, and all is done all the same."""
    store = quiet(make_store("32mib", slab="8mib", min_block=4096, prefault=False))
    count = lay.MAX_SIBLINGS
    of = keys(3 * SIBLINGS_A_SECTION // count, 1)
    put_groups(store, of, 4096, count)
    sections = pool_of(store).hold_times_ns().size
    assert (store.remove(of) == Code.OK).all()
    assert pool_of(store).hold_times_ns().size - sections >= 3
    assert not there(store, of, count).any()
    put_groups(store, of, 4096, count)
    codes = store.put(keys(7000, 9), blocks(keys(7000, 9), 4096))
    assert (codes == Code.OK).all()
    assert broken(store, of, count) == 0
    check_nothing_left(store)


@pytest.mark.parametrize("siblings", [(0, 0), (129, 0), (2, 2), (2, -1), (1, 1)])
def test_impossible_siblings_are_refused(siblings: tuple[int, int], make_store: MakeStore) -> None:
    with pytest.raises(errors.ConfigError, match="siblings"):
        small_pool(make_store).reserve_batch(keys(1, 1), [SMALL], siblings=siblings)


NEW = keys(32, 77)


def _evict(store: KvStore) -> None:
    put(store, NEW, SMALL)


def _remove(store: KvStore) -> None:
    store.remove(keys(200, 1))


def _drain(store: KvStore) -> None:
    put(store, NEW, LARGE)


@pytest.mark.parametrize("operation", [_evict, _remove, _drain], ids=["evict", "remove", "drain"])
@pytest.mark.parametrize(
    ("name", "skip"),
    [(name, skip) for name in ("evict_word", "evict_unindexed", "freed_listed") for skip in (0, 1, 2, 6)]
    + [("index_shift", 0)],
)
def test_death_while_a_group_leaves(name: str, skip: int, operation: object, make_store: MakeStore) -> None:
    """Wherever it is: tables whole, at most one group broken, and what is left of that is worth no more than a miss."""
    store = small_pool(make_store)
    of = keys(200, 1)
    for at in range(0, 200, 20):
        for index in range(3):
            assert set(put_as(store, of[at : at + 20], SMALL, 3, index).tolist()) == {Code.OK}
    assert broken(store, of, 3) == 0
    before = there(store, of, 3).sum()
    die_at(store, name, operation, skip=skip)  # type: ignore[arg-type]
    assert pool_of(store).T[lay.H_DIRTY]
    others = keys(1, 5)
    assert (put(store, others, SMALL) == 0).all()
    assert broken(store, of, 3) <= 1
    assert 0 < there(store, of, 3).sum() < before
    settle(store)
    check_nothing_left(store)
    for seed in range(40):  # what was left behind is evicted like anything else
        put(store, keys(20, 100 + seed), SMALL)
    assert not there(store, of, 3).any()
    check_nothing_left(store)


def test_the_evicting_failpoints_are_all_tried() -> None:
    assert {n for n in failpoints.NAMES if n.startswith(("evict_", "index_", "freed_"))} == {
        "evict_word",
        "evict_unindexed",
        "index_shift",
        "freed_listed",
    }


def test_another_process_finds_the_group_gone(make_store: MakeStore) -> None:
    """Ranks are processes of their own: one removes, the other's blocks are gone."""
    store = small_pool(make_store)
    other = another(store)
    of = keys(4, 1)
    put_as(store, of, SMALL, 2, 0)
    put_as(other, of, SMALL, 2, 1)
    assert other.remove(member(of[:2], 1)).tolist() == [Code.OK, Code.OK]
    assert store.exists(of).tolist() == [False, False, True, True]
    other.close()
