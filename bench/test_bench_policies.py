"""Hit rates of the eviction policies, on a trace like an agent's and on one that is given.

The pool under test is a real one, with as many slots as the trace's cache is to have. For each request the leading hits
are counted (what an engine could reuse), then those that are not there get a slot, in one batch, as an adapter does.

``KVPLUG_BENCH_TRACE`` names a file with one JSON object a line, of which ``hash_ids`` lists the request's blocks in
order (the form of the published Mooncake traces). ``KVPLUG_BENCH_TRACE_SHARE`` is the cache's share of its distinct
blocks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.harness import KIB, config
from kvplug import KvStore
from kvplug.shm.layout import Geometry
from tests import inside

Figure = Callable[..., None]
Trace = Sequence[Sequence[int]]

POLICIES = ("tail_first", "lru", "fifo")
BLOCK = 16 * KIB
AGENT_SLOTS, SHARED_BLOCKS = 60, 6
AGENTS = {"one": (1, 50, 6), "six": (6, 10, 5)}
"""How many agents, how many turns each, how many blocks a turn adds: 306 blocks either way."""
TRACE_ENV, SHARE_ENV = "KVPLUG_BENCH_TRACE", "KVPLUG_BENCH_TRACE_SHARE"
TRACE_SHARE = 0.05


def agent_trace(agents: int, turns: int, added: int) -> Trace:
    """Agents by turns: a request is one system prompt, the same for all, and the agent's whole conversation so far."""
    trace = []
    for turn in range(1, turns + 1):
        for agent in range(agents):
            first = SHARED_BLOCKS + agent * turns * added
            trace.append([*range(SHARED_BLOCKS), *range(first, first + turn * added)])
    return trace


def pool_of(pool: str, slots: int, policy: str) -> KvStore:
    """A pool with exactly this many slots for blocks of BLOCK bytes, in one slab."""
    slab = slots * BLOCK
    size = slab
    while True:
        size += 64 * KIB
        try:
            g = Geometry.plan(size, min_block=BLOCK, slab_bytes=slab)
            break
        except ValueError:
            continue
    assert g.n_rows == slots
    store = KvStore(
        config=config(
            pool, size, policy=policy, min_block=BLOCK, slab=slab, pin_budget_share=1.0, reserve_budget_share=1.0
        )
    )
    assert inside.pool_of(store).geometry.n_rows == slots
    return store


def replay(store: KvStore, trace: Trace) -> float:
    """Share of the requests' blocks that were leading hits. Slots are sealed unwritten: only the tables matter here."""
    n = 1 + max(max(r) for r in trace)
    names = np.random.default_rng(1).integers(0, 256, (n, 32), np.uint8)
    hits = asked = 0
    for request in trace:
        wanted = names[np.asarray(request)]
        hits += store.match_prefix(wanted)
        asked += len(request)
        b = store.reserve_batch(wanted, [BLOCK])
        new = b.codes == 0
        store.complete(b.slots[new], b.gens[new], 0, np.zeros(int(new.sum()), np.uint64))
    return hits / asked


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("agents", AGENTS)
def test_agent_trace(benchmark: Any, pool: str, figure: Figure, agents: str, policy: str) -> None:
    trace = agent_trace(*AGENTS[agents])
    distinct = len({b for r in trace for b in r})
    with pool_of(pool, AGENT_SLOTS, policy) as store:
        rate = benchmark.pedantic(replay, (store, trace), rounds=1)
    figure(
        f"trace_{agents}_{policy}",
        rate * 100,
        rounds=1,
        beside=f"{AGENT_SLOTS} slots, {distinct} blocks, {len(trace)} requests",
    )


@pytest.mark.skipif(TRACE_ENV not in os.environ, reason=f"{TRACE_ENV} names no trace")
@pytest.mark.parametrize("policy", POLICIES)
def test_given_trace(benchmark: Any, pool: str, figure: Figure, policy: str) -> None:
    trace = [json.loads(line)["hash_ids"] for line in Path(os.environ[TRACE_ENV]).read_text().splitlines() if line]
    trace = [r for r in trace if r]
    distinct = len({b for r in trace for b in r})
    slots = max(int(distinct * float(os.environ.get(SHARE_ENV, TRACE_SHARE))), *map(len, trace))
    with pool_of(pool, slots, policy) as store:
        rate = benchmark.pedantic(replay, (store, trace), rounds=1)
    figure(
        f"trace_given_{policy}",
        rate * 100,
        rounds=1,
        beside=f"{Path(os.environ[TRACE_ENV]).stem}: {slots} slots, {distinct} blocks, {len(trace)} requests",
    )
