"""What is about to be evicted and worth keeping: found without the lock, in eviction's own order, named once."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from kvplug import KvStore
from kvplug.errors import Code
from kvplug.shm.forecast import AtRisk, Forecast
from tests.inside import pool_of
from tests.pool.children import U8, another, check_bytes, die_at, fill, keys, put
from tests.pool.sample import MakeStore
from tests.pool.test_siblings import member, put_as, put_groups

BLOCK = 64 << 10
MANY = 1 << 40


def watch(store: KvStore) -> Forecast:
    """A forecast that has seen the pool as it is now, and gives nothing that comes later the benefit of the doubt."""
    pool = pool_of(store)
    made = Forecast(pool.T, pool.L, pool.geometry, pool.policy)
    made.look(MANY, 1)
    return made


def named(found: AtRisk) -> set[bytes]:
    return {key.tobytes() for key in found.keys}


def use(store: KvStore, forecast: Forecast, of: U8, times: int = 2) -> AtRisk:
    """Read these so often, each time seen by the forecast; what it says at last."""
    for _ in range(times):
        check_bytes(store, of, BLOCK)
        found = forecast.look(MANY, 1024)
    return found


def test_nothing_is_at_risk_while_there_is_room(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    forecast = watch(store)
    of = keys(100, 1)
    put(store, of, BLOCK)
    forecast.look(MANY, 1024)
    assert not len(use(store, forecast, of).keys)
    assert forecast.free_bytes() > pool_of(store).geometry.data_bytes / 2


@pytest.mark.parametrize("policy", ["tail_first", "lru"])
def test_what_was_used_and_goes_next_is_named_the_most_worth_first(make_store: MakeStore, policy: str) -> None:
    store = make_store(size="32mib", policy=policy)
    forecast = watch(store)
    of = fill(store, BLOCK, 1)
    forecast.look(MANY, 1024)
    old = of[:16]
    use(store, forecast, old)
    store.touch(of[16:])  # one use is none, but all the others are fresher than the first now
    found = forecast.look(MANY, 1024)
    assert named(found) == {key.tobytes() for key in old}
    assert (found.nbytes == BLOCK).all()
    order = [key.tobytes() for key in found.keys]
    gone = []
    new = keys(16, 9)
    for one in new:  # what really goes, one after another
        before = store.exists(old)
        put(store, one[None], BLOCK)
        gone += [key.tobytes() for key in old[before & ~store.exists(old)]]
    assert gone == order[::-1]


def test_blocks_that_were_never_used_again_are_not_named(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    forecast = watch(store)
    of = fill(store, BLOCK, 1)
    assert not len(forecast.look(MANY, 1024).keys)
    store.touch(of)  # as an engine does when the request is over
    assert not len(forecast.look(MANY, 1024).keys)
    store.touch(of)
    assert len(forecast.look(MANY, 1024).keys) > 0


def test_what_was_there_before_is_given_the_benefit_of_the_doubt(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    of = fill(store, BLOCK, 1)
    pool = pool_of(store)
    found = Forecast(pool.T, pool.L, pool.geometry, pool.policy).look(MANY, 1024)
    share = len(found.keys) * BLOCK / pool.geometry.data_bytes
    assert 0.1 < share < 0.2
    assert named(found) <= {key.tobytes() for key in of}


def test_a_pin_of_somebody_elses_is_a_use_and_ones_own_is_not(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    forecast = watch(store)
    of = fill(store, BLOCK, 1)
    forecast.look(MANY, 1024)
    other = another(store)
    theirs, ours = of[:4], of[4:8]
    pinned = [(other, other.pin_batch(theirs, touch=False)), (store, store.pin_batch(ours, touch=False))]
    store.touch(keys(1, 5))  # so that there is a reason to look
    forecast.look(MANY, 1024)
    for owner, batch in pinned:
        owner.unpin(batch.slots)
    store.touch(of[8:])
    assert named(forecast.look(MANY, 1024)) == {key.tobytes() for key in theirs}
    other.close()


def test_what_was_offered_is_named_again_only_after_another_use(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    forecast = watch(store)
    of = fill(store, BLOCK, 1)
    forecast.look(MANY, 1024)
    use(store, forecast, of[:8])
    store.touch(of[8:])
    found = forecast.look(MANY, 1024)
    assert len(found.keys) == 8
    forecast.offered(np.arange(8) < 5)
    rest = forecast.look(MANY, 1024)
    assert named(rest) == {key.tobytes() for key in found.keys[5:]}
    forecast.offered(np.ones(3, np.bool_))
    assert not len(forecast.look(MANY, 1024).keys)
    use(store, forecast, found.keys[:1], 1)
    store.touch(of[8:])
    assert named(forecast.look(MANY, 1024)) & {key.tobytes() for key in of[:8]} == {found.keys[0].tobytes()}


def test_an_offer_of_a_block_that_was_stored_anew_meanwhile_marks_nothing(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    of = fill(store, BLOCK, 1)
    pool = pool_of(store)
    forecast = Forecast(pool.T, pool.L, pool.geometry, pool.policy)
    found = forecast.look(MANY, 1024)
    put(store, keys(len(found.keys), 2), BLOCK)  # takes their slots
    assert not store.exists(found.keys).any()
    pool_wide = forecast._windows(choosing=False)
    assert len(pool_wide.slots) == 0
    forecast.offered(np.ones(len(found.keys), np.bool_))
    assert not (forecast._seen & 4).any()
    assert store.exists(of).sum() == len(of) - len(found.keys)


def test_bounds_are_kept_and_one_block_is_always_named(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    fill(store, BLOCK, 1)
    pool = pool_of(store)
    for most_bytes, most_blocks, n in ((MANY, 7, 7), (3 * BLOCK + 1, 1024, 3), (1, 1024, 1)):
        found = Forecast(pool.T, pool.L, pool.geometry, pool.policy).look(most_bytes, most_blocks)
        assert len(found.keys) == n


def test_one_look_is_named_piece_by_piece_without_what_has_gone(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    of = fill(store, BLOCK, 1)
    pool = pool_of(store)
    all_at_once = Forecast(pool.T, pool.L, pool.geometry, pool.policy).look(MANY, 1024)
    forecast = Forecast(pool.T, pool.L, pool.geometry, pool.policy)
    first = forecast.look(MANY, 10)
    assert named(first) == {key.tobytes() for key in all_at_once.keys[:10]}
    assert (store.remove(all_at_once.keys[10:13]) == Code.OK).all()
    second = forecast.more(4 * BLOCK, 1024)
    assert [key.tobytes() for key in second.keys] == [key.tobytes() for key in all_at_once.keys[13:17]]
    rest = forecast.more(MANY, 1024)
    assert named(rest) == {key.tobytes() for key in all_at_once.keys[17:]}
    assert not len(forecast.more(MANY, 1024).keys)
    assert len(of) > len(all_at_once.keys)


def test_siblings_are_named_together_or_not_at_all(make_store: MakeStore) -> None:
    store = make_store(size="32mib")
    whole, half = keys(10, 1), keys(10, 2)
    put_groups(store, whole, BLOCK, 4)
    for index in range(3):
        put_as(store, half, BLOCK, 4, index)
    pool = pool_of(store)
    forecast = Forecast(pool.T, pool.L, pool.geometry, pool.policy)
    put(store, keys(forecast.free_bytes() // BLOCK, 3), BLOCK)
    found = forecast.look(MANY, 1024)
    order = {key.tobytes(): at for at, key in enumerate(found.keys)}
    assert not named(found) & {key.tobytes() for index in range(3) for key in member(half, index)}
    for f in range(len(whole)):
        places = [order[member(whole[f : f + 1], index)[0].tobytes()] for index in range(4)]
        assert places == list(range(places[0], places[0] + 4))
    assert len(forecast.look(MANY, 7).keys) == 4, "a family that does not fit waits for its turn"


def test_looking_takes_no_lock(make_store: MakeStore) -> None:
    """Whoever holds it may be stopped."""
    store = make_store(size="32mib", lock_timeout_s=0.1)
    fill(store, BLOCK, 1)
    with die_at(store, "locked", lambda own: own.pin_batch(keys(1, 1)), sig=signal.SIGSTOP):
        pool = pool_of(store)
        assert store.pin_batch(keys(1, 1)).codes[0] == Code.TIMEOUT
        assert len(Forecast(pool.T, pool.L, pool.geometry, pool.policy).look(MANY, 1024).keys) > 0
