"""Who goes first when the pool is full, by policy; and that it matters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvplug import errors
from kvplug.config import Config
from kvplug.errors import Code
from kvplug.shm.policies import by_name, by_number
from kvplug.store import KvStore
from tests.inside import pool_of

MakeStore = Callable[..., KvStore]
Keys = npt.NDArray[np.uint8]
BLOCK = 16 * 1024
POLICIES = ("tail_first", "lru", "fifo")


def some_keys(n: int, seed: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def blocks(n: int) -> npt.NDArray[np.uint8]:
    return np.zeros((n, BLOCK), np.uint8)


def full_pool(make_store: MakeStore, policy: str, n: int = 64) -> tuple[KvStore, list[Keys]]:
    """A pool full of four prefixes of ``n`` blocks, stored one after another, and then of odd blocks."""
    store = make_store(size="8mib", policy=policy, prefault=False, reserve_budget_share=1.0)
    odd = pool_of(store).geometry.n_rows - 4 * n
    assert odd >= 0
    prefixes = [some_keys(n, seed) for seed in range(4)]
    for keys in prefixes:
        assert (store.put(keys, blocks(n)) == Code.OK).all()
    assert (store.put(some_keys(odd, 99), blocks(odd)) == Code.OK).all()
    assert store.stats().evicted_blocks == 0
    return store, prefixes


def evict(store: KvStore, n: int, seed: int) -> None:
    """Put new blocks one by one, so that each costs one."""
    before = store.stats().evicted_blocks
    for key in some_keys(n, seed):
        assert store.put(key[None], blocks(1)).tolist() == [Code.OK]
    assert store.stats().evicted_blocks == before + n


def test_tail_first_eats_the_oldest_prefix_from_its_end(make_store: MakeStore) -> None:
    store, (a, b, *_) = full_pool(make_store, "tail_first")
    for gone in range(1, 11):
        evict(store, 1, 1000 + gone)
        assert store.match_prefix(a) == len(a) - gone
        assert store.exists(a).sum() == len(a) - gone
    assert store.exists(b).all()


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_lru_and_fifo_eat_it_from_its_head(make_store: MakeStore, policy: str) -> None:
    store, (a, b, *_) = full_pool(make_store, policy)
    evict(store, 10, 50)
    assert store.exists(a).tolist() == [False] * 10 + [True] * (len(a) - 10)
    assert store.match_prefix(a) == 0
    assert store.exists(b).all()


USES: dict[str, Callable[[KvStore, Keys], object]] = {
    "touch": lambda store, keys: store.touch(keys),
    "get_into": lambda store, keys: store.get_into(keys, blocks(len(keys))),
    "pin": lambda store, keys: store.pin(keys).release(),
    "put again": lambda store, keys: store.put(keys, blocks(len(keys))),
}


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_used_stays_except_with_fifo(make_store: MakeStore, policy: str, how: str) -> None:
    store, (a, b, c, _) = full_pool(make_store, policy)
    USES[how](store, a)
    evict(store, len(a), 50)
    assert store.exists(a).all() == (policy != "fifo")
    assert store.exists(b).any() == (policy == "fifo")
    assert store.exists(c).all()
    store.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_look_is_no_use(make_store: MakeStore, policy: str) -> None:
    store, (a, *_) = full_pool(make_store, policy)
    assert store.exists(a).all()
    assert store.match_prefix(a) == len(a)
    evict(store, len(a), 50)
    assert not store.exists(a).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_blocks_are_passed_over(make_store: MakeStore, policy: str) -> None:
    store, (a, b, c, d) = full_pool(make_store, policy)
    pins = store.pin_batch(a[::2])
    for keys in (a[1::2], b, c, d):  # pinning dates them; let these be younger
        store.touch(keys)
    evict(store, pool_of(store).geometry.n_rows - len(pins), 50)
    assert store.exists(a).tolist() == [True, False] * (len(a) // 2)
    store.unpin(pins.slots)
    evict(store, len(pins), 51)
    assert not store.exists(a).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_pool_keeps_the_policy_it_was_made_with(make_store: MakeStore, policy: str) -> None:
    make_store(size="8mib", policy=policy)
    other = make_store(size="8mib", policy="lru" if policy != "lru" else "fifo")
    assert other.stats().policy == policy


def test_policies_have_their_numbers_for_good() -> None:
    assert [(by_number(n).name, by_name(by_number(n).name).number) for n in range(3)] == [
        ("tail_first", 0),
        ("lru", 1),
        ("fifo", 2),
    ]
    with pytest.raises(errors.ConfigError, match="tail_first, lru, fifo"):
        by_name("clock")
    with pytest.raises(errors.ConfigError):
        by_number(77)
    with pytest.raises(errors.ConfigError):
        Config(policy="clock")


def replay(store: KvStore, seed: int = 7, agents: int = 3, turns: int = 8, rounds: int = 40) -> float:
    """Agents that each take a turn per round, with a prefix that grows at every turn. Share of blocks reused.

    What counts as reused is what an engine can use: the leading run of hits.
    """
    rng = np.random.default_rng(seed)
    head, step = 60, 10
    born = 0

    def new_agent() -> Keys:
        nonlocal born
        born += 1
        return some_keys(head + step * turns, seed=1000 + born)

    chains = [new_agent() for _ in range(agents)]
    turn = rng.integers(0, turns, agents)
    asked = hit = 0
    for _ in range(rounds):
        for i in rng.permutation(agents).tolist():
            keys = chains[i][: head + step * turn[i]]
            n = store.match_prefix(keys)
            store.touch(keys[:n])
            if n < len(keys):
                store.put(keys[n:], blocks(len(keys) - n))
            asked, hit = asked + len(keys), hit + n
            turn[i] += 1
            if turn[i] > turns:
                chains[i], turn[i] = new_agent(), 0
    return hit / asked


def test_tail_first_reuses_more_than_lru_where_agents_take_turns(make_store: MakeStore, pool_name: str) -> None:
    share = {}
    for policy in POLICIES:
        store = make_store(size="6mib", pool=f"{pool_name}.v-{policy}", policy=policy, prefault=False)
        share[policy] = replay(store)
        assert store.stats().evicted_blocks > 1000
        store.check_integrity()
    print(f"blocks reused: {share}")
    assert share["tail_first"] > 1.1 * share["lru"]
    assert share["tail_first"] > 1.1 * share["fifo"]
