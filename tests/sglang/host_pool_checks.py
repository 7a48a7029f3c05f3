"""Checks of KvplugStorage against SGLang's own host pools: one process, one check after another.

Run as ``python -m tests.sglang.host_pool_checks POOL`` in a lab's environment. Prints one line of JSON for each check:
its name, and what went wrong or null.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
from sglang.srt.observability.metrics_collector import StorageMetrics

from kvplug.adapters.sglang.engine import Shard
from kvplug.shm.local import L_FD
from tests.inside import pool_of
from tests.sglang import host_pools
from tests.sglang.host_pools import (
    PAGE,
    POISON,
    POOLS,
    TOKENS,
    fill,
    flat,
    hashes,
    indices,
    mamba,
    mha,
    mla,
    paged,
    storage,
)
from tests.stopwatch import Stopwatch
from tests.vllm.common import eventually


def carried(kind: str) -> None:
    """Bytes go from scattered pages to other scattered pages, all of them and no others."""
    make, replicated = POOLS[kind]
    pool = make()
    name = PoolName.MAMBA if kind.startswith("mamba") else PoolName.KV
    side = mha("page_first") if name == PoolName.MAMBA else pool
    made = storage(side, (name, pool), mla=replicated)
    fill(pool, 7)
    source, target, names = [5, 1, 12, 8], [3, 14, 2, 9], hashes(kind, 4)
    before = [flat(pool, page) for page in source]
    assert len(set(before)) == 4
    moves = lambda pages: [PoolTransfer(name=name, host_indices=indices(pool, pages), keys=names)]  # noqa: E731
    if name == PoolName.KV:
        assert made.batch_exists(names) == 0
        assert made.batch_set_v1(names, indices(pool, source)) == [True] * 4
        assert made.batch_exists(names) == 4
    else:
        assert made.batch_set_v2(moves(source)) == {name: [True] * 4}
    fill(pool, None)
    if name == PoolName.KV:
        assert made.batch_get_v1(names, indices(pool, target)) == [True] * 4
    else:
        assert made.batch_get_v2(moves(target)) == {name: [True] * 4}
    assert [flat(pool, page) for page in target] == before
    others = [page for page in range(pool.size // pool.page_size) if page not in target]
    assert {flat(pool, page) for page in others} == {bytes([POISON]) * len(before[0])}, "other bytes were touched"
    if name == PoolName.KV:
        assert made.batch_set_v1(names, indices(pool, source)) == [True] * 4, "what is there already counts as stored"
        assert made.batch_get_v1(names, indices(pool, target)) == [True] * 4
        assert [flat(pool, page) for page in target] == before, "what is there already is not overwritten"
    assert made._engine.counts["errors"] == 0
    made.close()


def through_both_interfaces_of_one_page() -> None:
    """Pages as flat tensors come back as SGLang's own way of cutting pages has them."""
    for layout in ("layer_first", "page_first_direct"):
        pool = mha(layout)
        made = storage(pool, v1=False)
        fill(pool, 3)
        names = hashes(f"flat {layout}", 3)
        before = [flat(pool, page) for page in (4, 5, 6)]
        assert made.batch_set(names, [pool.get_data_page(page * PAGE, flat=True) for page in (4, 5, 6)])
        assert made.batch_exists([*names, *hashes("other", 1)]) == 3
        assert made.exists(names[1])
        fill(pool, None)
        for page, data in enumerate(made.batch_get(names, [pool.get_dummy_flat_data_page() for _ in names])):
            pool.set_from_flat_data_page(page * PAGE, data)
        assert [flat(pool, page) for page in range(3)] == before
        lone = pool.get_dummy_flat_data_page()
        assert made.get(names[2], lone) is lone
        assert lone.contiguous().view(torch.uint8).numpy().tobytes() == before[2]
        assert made.get(hashes("nobody's", 1)[0], lone) is None
        assert made.set(hashes("one", 1)[0], lone)
        made.close()
        zero_copy = storage(pool)
        assert zero_copy.batch_exists(names) == 0, "a tensor's bytes may be ordered otherwise than fragments"
        assert zero_copy.batch_get_v1(names, indices(pool, [0, 1, 2])) == [False] * 3
        zero_copy.close()


def another_layout_or_pool_finds_nothing() -> None:
    names = hashes("layouts", 2)
    first, other = mha("page_first"), mha("page_first_direct")
    one, two = storage(first), storage(other, (PoolName.DRAFT, mha("page_first_direct")))
    assert one.batch_set_v1(names, indices(first, [1, 2])) == [True] * 2
    assert two.batch_exists(names) == 0
    assert two.batch_set_v1(names, indices(other, [1, 2])) == [True] * 2
    draft = PoolTransfer(name=PoolName.DRAFT, host_indices=indices(other, [1, 2]), keys=names)
    assert two.batch_get_v2([draft]) == {PoolName.DRAFT: [False] * 2}
    result = two.batch_exists_v2(names, [dataclasses.replace(draft, hit_policy=PoolHitPolicy.ALL_PAGES)])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages) == (0, {PoolName.KV: 2})
    one.close()
    two.close()


def each_rank_has_its_own_pages_but_for_replicated_ones() -> None:
    names = hashes("ranks", 2)
    pools = [mha("page_first"), mha("page_first")]
    ranks = [storage(pool, shard=Shard(i, 2)) for i, pool in enumerate(pools)]
    assert ranks[0].batch_set_v1(names, indices(pools[0], [0, 1])) == [True] * 2
    assert [rank.batch_exists(names) for rank in ranks] == [2, 0]
    latent = [mla("page_first"), mla("page_first")]
    states = [mamba("page_first"), mamba("page_first")]
    ranks += [
        storage(pool, (PoolName.MAMBA, state), shard=Shard(i, 2), mla=True)
        for i, (pool, state) in enumerate(zip(latent, states, strict=True))
    ]
    fill(latent[0], 5)
    before = flat(latent[0], 3)
    assert ranks[2].batch_set_v1(names[:1], indices(latent[0], [3])) == [True]
    assert ranks[3].batch_get_v1(names[:1], indices(latent[1], [7])) == [True]
    assert flat(latent[1], 7) == before
    state = [PoolTransfer(name=PoolName.MAMBA, host_indices=indices(p, [4]), keys=names[:1]) for p in states]
    assert ranks[2].batch_set_v2([state[0]]) == {PoolName.MAMBA: [True]}
    assert ranks[3].batch_get_v2([state[1]]) == {PoolName.MAMBA: [False]}
    for rank in ranks:
        rank.close()


def hit_policies_of_side_pools() -> None:
    """The window is there at the ends of 2 and 5 pages, the state after 2 and 3: 2 pages can be restored."""
    kv, window, state = mha("page_first"), mha("page_first"), mamba("page_first")
    made = storage(kv, (PoolName.SWA, window), (PoolName.MAMBA, state))
    names = hashes("policies", 8)
    assert made.batch_set_v1(names[:6], indices(kv, list(range(6)))) == [True] * 6

    def put(name: Any, pool: Any, pages: list[int]) -> None:
        keys = [names[page] for page in pages]
        done = made.batch_set_v2([PoolTransfer(name=name, host_indices=indices(pool, pages), keys=keys)])
        assert done == {name: [True] * len(pages)}

    put(PoolName.SWA, window, [0, 1, 3, 4])
    put(PoolName.MAMBA, state, [1, 2])
    trailing = PoolHitPolicy.TRAILING_PAGES
    swa = PoolTransfer(name=PoolName.SWA, keys=names[:2], hit_policy=trailing)
    mamba_one = PoolTransfer(name=PoolName.MAMBA, keys=names[:1], hit_policy=trailing)
    result = made.batch_exists_v2(names, [swa])
    assert result.restorable_prefix_pages == [1, 2, 5], result
    assert (result.kv_hit_pages, result.extra_pool_hit_pages) == (5, {PoolName.KV: 6, PoolName.SWA: 5})
    result = made.batch_exists_v2(names, [swa, mamba_one])
    assert result.restorable_prefix_pages == [2], result
    assert result.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.SWA: 5, PoolName.MAMBA: 3}
    every = PoolTransfer(name=PoolName.SWA, hit_policy=PoolHitPolicy.ALL_PAGES)
    result = made.batch_exists_v2(names, [every])
    assert (result.kv_hit_pages, result.restorable_prefix_pages) == (2, [1, 2])
    groups = PoolTransfer(name=PoolName.SWA, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=2, group_pages=1)
    result = made.batch_exists_v2(names, [groups])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages[PoolName.SWA]) == (6, 4)
    assert made.batch_exists_v2(names, []).kv_hit_pages == 6
    assert made.batch_exists_v2([], [swa]).kv_hit_pages == 0
    unheard = PoolTransfer(name=PoolName.INDEXER, hit_policy=PoolHitPolicy.ALL_PAGES)
    assert made.batch_exists_v2(names, [unheard]).kv_hit_pages == 0
    assert made._engine.counts["errors"] == 0
    assert made.batch_exists_v2(names, [dataclasses.replace(swa, hit_policy="of tomorrow")]).kv_hit_pages == 0
    assert made._engine.counts["errors"] == 1
    made.close()


def a_pool_that_only_counts_pages() -> None:
    anchor, side = LogicalHostPool(TOKENS, PAGE), paged("page_first")
    made = storage(anchor, (PoolName.DEEPSEEK_V4_C4, side), mla=True)
    names = hashes("logical", 4)
    move = PoolTransfer(name=PoolName.DEEPSEEK_V4_C4, host_indices=indices(side, [1, 2]), keys=names[:2])
    assert made.batch_exists(names) == 0
    assert made.batch_exists_v2(names, [move]).kv_hit_pages == 0
    assert made.batch_set_v1(names[:2], indices(anchor, [1, 2])) == [True] * 2
    assert made.batch_set_v2([move]) == {PoolName.DEEPSEEK_V4_C4: [True] * 2}
    assert made.batch_exists_v2(names, [move]).kv_hit_pages == 2
    assert made.batch_exists_v2(names, []).kv_hit_pages == 0, "nothing vouches for a page that holds no bytes"
    assert made.batch_get_v1(names[:2], indices(anchor, [1, 2])) == [True] * 2
    made.close()


def a_hole_ends_the_prefix_and_is_not_read() -> None:
    pool = mha("page_first_direct")
    made = storage(pool)
    names = hashes("hole", 4)
    fill(pool, 11)
    assert made.batch_set_v1([names[0], names[2]], indices(pool, [0, 2])) == [True] * 2
    assert made.batch_exists(names) == 1
    fill(pool, None)
    untouched = flat(pool, 1)
    assert made.batch_get_v1(names, indices(pool, [0, 1, 2, 3])) == [True, False, True, False]
    assert flat(pool, 1) == untouched
    made.close()


def a_zeroed_page_is_a_miss() -> None:
    pool = mha("page_first")
    made = storage(pool)
    store = made._engine.store
    names = hashes("zeroed", 3)
    fill(pool, 13)
    assert made.batch_set_v1(names, indices(pool, [0, 1, 2])) == [True] * 3
    pinned = store.pin_batch(made._keys(made._pools["kv"], names))
    at = int(pinned.offsets[1])
    store.mapping[at : at + int(pinned.nbytes[1])] = 0
    store.unpin(pinned.slots)
    assert made.batch_get_v1(names, indices(pool, [5, 6, 7])) == [True, False, True]
    assert made._engine.counts["corrupt_pages"] == 1
    assert made.batch_exists(names) == 1, "a corrupt page is dropped"
    made.close()


def what_changes_meanwhile_is_dropped() -> None:
    """Weights change while bytes are being copied: what was read is not used, what was stored is taken out."""
    pool = mha("page_first")
    made = storage(pool)
    rank, store = made._engine, made._engine.store
    names = hashes("meanwhile", 4)
    assert made.batch_set_v1(names[:2], indices(pool, [0, 1])) == [True] * 2
    plain = {name: getattr(store, name) for name in ("get_fragments", "put_fragments")}

    def during(name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            codes = plain[name](*args, **named)
            rank.weights_changed("a check")
            return codes

        return call

    for name in plain:
        setattr(store, name, during(name))
    old = made._keys(made._pools["kv"], names)
    assert made.batch_get_v1(names[:2], indices(pool, [2, 3])) == [False] * 2
    assert made._keys(made._pools["kv"], names) is None
    assert made.batch_exists(names) == 0
    assert made.batch_set_v1(names, indices(pool, [0, 1, 2, 3])) == [False] * 4
    rank.flushed()
    assert made.batch_exists(names) == 0, "pages of the old weights are found after a change"
    before = store.exists(old).tolist()
    key = made._keys(made._pools["kv"], names[2:])
    assert made.batch_set_v1(names[2:], indices(pool, [2, 3])) == [False] * 2
    assert not store.exists(key).any()
    assert store.exists(old).tolist() == before == [True, True, False, False]
    made.close()


def clearing_hides_and_does_not_delete() -> None:
    pool = mha("page_first")
    made, other = storage(pool), storage(pool)
    names = hashes("clear", 2)
    assert made.batch_set_v1(names, indices(pool, [0, 1])) == [True] * 2
    made.clear()
    assert (made.batch_exists(names), other.batch_exists(names)) == (0, 2)
    assert made.batch_set_v1(names, indices(pool, [0, 1])) == [True] * 2
    assert made.batch_exists(names) == 2
    made.close()
    other.close()


def a_full_pool_stores_what_it_can() -> None:
    pool = mha("page_first")
    made = storage(
        pool, pool=f"{host_pools.POOL}.full", size="1mib", slab="64kib", min_block="4kib", pin_budget_share=1.0
    )
    store = made._engine.store
    names, first = hashes("full", 4000), indices(pool, list(range(20)))
    stored = 0
    held = []
    for start in range(0, len(names), 20):
        done = made.batch_set_v1(names[start : start + 20], first)
        stored += sum(done)
        held.append(store.pin_batch(made._keys(made._pools["kv"], names[start : start + 20])))
        if not all(done):
            break
    assert 0 < stored < len(names)
    assert done == sorted(done, reverse=True), "the head of a prefix goes first"
    assert made._engine.counts["not_stored:full"] > 0, dict(made._engine.counts)
    assert made._engine.counts["errors"] == 0
    made.close()


def a_lock_that_somebody_holds_is_waited_for_within_a_bound() -> None:
    """As by a process that was stopped inside a section."""
    pool = mha("page_first")
    made = storage(pool, lock_timeout_s=0.2)
    names = hashes("locked", 40)
    assert made.batch_set_v1(names[:2], indices(pool, [0, 1])) == [True] * 2
    # A file description of its own: flock knows no other owner.
    held = os.open(f"/proc/self/fd/{int(pool_of(made._engine.store).L[L_FD])}", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    watch = Stopwatch()
    try:
        assert made.batch_exists(names) == 2, "looking needs no lock"
        for start in range(2, 40, 2):
            assert made.batch_set_v1(names[start : start + 2], indices(pool, [0, 1])) == [False] * 2
        assert made.batch_get_v1(names[:2], indices(pool, [2, 3])) == [True] * 2
    finally:
        os.close(held)
    assert watch.took_s() < 5, "each call waited for its own"
    assert made._engine.counts["not_stored:timeout"] == 38, dict(made._engine.counts)
    assert made._engine.counts["errors"] == 0
    eventually("the lock is used again", lambda: made.batch_set_v1(names[2:4], indices(pool, [0, 1])) == [True] * 2)
    made.close()


def nonsense_is_a_miss_and_counted() -> None:
    pool = mha("page_first")
    made = storage(pool)
    names = hashes("nonsense", 2)
    errors = lambda: made._engine.counts["errors"]  # noqa: E731
    assert made.batch_set_v1(names, indices(pool, [0])) == [False] * 2
    assert errors() == 1
    assert made.batch_get_v1(names, None) == [False] * 2
    assert errors() == 2
    assert made.batch_exists(["not a hash"]) == 0
    assert made.batch_get_v1(["0" * 63, "0"], indices(pool, [0, 1])) == [False] * 2
    assert errors() == 4
    assert made.batch_set(names, ["not a tensor", 1]) is False
    assert made.batch_get(names, None) == [None, None]
    assert made.batch_set_v1([], indices(pool, [0])[:0]) == []
    assert made.batch_get_v2([PoolTransfer(name=PoolName.SWA, keys=names)]) == {PoolName.SWA: [False] * 2}
    assert errors() == 5
    made.close()
    assert made.batch_exists(names) == 0
    assert made.batch_get_v1(names, indices(pool, [0, 1])) == [False] * 2
    made.close()
    assert errors() == 5


def what_is_not_supported_is_off_in_one_line() -> None:
    split = storage(mha("page_head"), tp_lcm_size=4, should_split_heads=True)
    assert "tp_lcm_size" in (split._engine.off_reason or "")
    fused = storage(mha("page_unified"))
    assert "page_unified" in (fused._engine.off_reason or "")
    for made in (split, fused):
        assert made.batch_exists(hashes("off", 2)) == 0
        assert made.batch_set_v1(hashes("off", 2), indices(made.mem_pool_host, [0, 1])) == [False] * 2
        assert made._engine.counts["errors"] == 0
        assert "\n" not in made._engine.off_reason
        made.close()
    sided = storage(mha("page_first"), (PoolName.SWA, mha("page_unified")))
    assert sided._engine.off_reason is None
    names = hashes("off", 2)
    swa = PoolTransfer(name=PoolName.SWA, keys=names[:1], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    assert sided.batch_set_v1(names, indices(sided.mem_pool_host, [0, 1])) == [True] * 2
    assert sided.batch_exists_v2(names, [swa]).kv_hit_pages == 0
    sided.close()


def figures_for_sglangs_metrics() -> None:
    pool = mha("page_first")
    made = storage(pool)
    names = hashes("figures", 3)
    made.batch_set_v1(names, indices(pool, [0, 1, 2]))
    made.batch_get_v1(names[:2], indices(pool, [0, 1]))
    stats = made.get_stats()
    assert isinstance(stats, StorageMetrics)
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [2])
    assert len(stats.backup_bandwidth) == len(stats.prefetch_bandwidth) == 1
    assert made.get_stats().backup_pgs == []
    made.close()


CHECKS: dict[str, Callable[[], None]] = {
    **{f"carried: {kind}": (lambda kind=kind: carried(kind)) for kind in POOLS},
    **{
        check.__name__: check
        for check in (
            through_both_interfaces_of_one_page,
            another_layout_or_pool_finds_nothing,
            each_rank_has_its_own_pages_but_for_replicated_ones,
            hit_policies_of_side_pools,
            a_pool_that_only_counts_pages,
            a_hole_ends_the_prefix_and_is_not_read,
            a_zeroed_page_is_a_miss,
            what_changes_meanwhile_is_dropped,
            clearing_hides_and_does_not_delete,
            a_full_pool_stores_what_it_can,
            a_lock_that_somebody_holds_is_waited_for_within_a_bound,
            nonsense_is_a_miss_and_counted,
            what_is_not_supported_is_off_in_one_line,
            figures_for_sglangs_metrics,
        )
    },
}


def main() -> None:
    host_pools.POOL = sys.argv[1]
    for name, check in CHECKS.items():
        try:
            check()
            wrong = None
        except Exception:  # noqa: BLE001 - told to the test
            wrong = traceback.format_exc(limit=-4)
        print(json.dumps({"check": name, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
