"""Which full blocks are stored when there is not room for all, on vLLM's own block pool and a pool of kvplug's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool

from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.jobs import Job, Part
from kvplug.adapters.vllm.requests import Record
from kvplug.adapters.vllm.state import EngineState
from kvplug.adapters.vllm.stores import Stores
from kvplug.config import Config
from kvplug.identity.keys import KeyChain
from kvplug.store import KvStore
from tests.lab.env import temporary_pool

SPAN = 32
NBYTES = 16384
RULES = [GroupRule("sliding", SPAN, 64), GroupRule("full", SPAN), GroupRule("sliding", SPAN, 64)]


class Engine:
    """The scheduler's share of an engine with three cache groups; copies are made by :meth:`copied`."""

    def __init__(self, store: KvStore, blocks: int, share: float) -> None:
        plan = tuple({(0, 0): Part(0, 0, NBYTES, True)} for _ in RULES)
        self.pool = BlockPool(blocks, True, SPAN)
        self.store = store
        self.state = EngineState(store, Config(store_hold_share=share), RULES, plan, 1)
        self.state.block_pool = self.pool
        self.blocks: dict[str, tuple[list[Any], ...]] = {}
        self.state.manager = SimpleNamespace(get_blocks=lambda name: SimpleNamespace(blocks=self.blocks[name]))
        self.stores = Stores(self.state)

    def request(self, tokens: list[int]) -> Record:
        """A request all of whose tokens have blocks."""
        name = f"r{len(self.blocks)}"
        count = len(tokens) // SPAN
        self.blocks[name] = tuple(self.pool.get_new_blocks(count) for _ in RULES)
        request: Any = SimpleNamespace(request_id=name)
        step = self.state.step_tokens
        chain = KeyChain(b"r" * 32, None, step_tokens=step)
        return Record(request, chain, tokens, step, 0, stored=[0] * len(RULES), next_at=SPAN)

    def copied(self, job: Job | None) -> dict[int, int]:
        """Carries a job out and lets go of its blocks; how many blocks of each group it had."""
        if job is None:
            return {}
        for group in job.groups:
            sums = np.zeros(len(group.slots), np.int64)
            assert (self.store.complete(group.slots, group.gens, 0, sums) == 0).all()
        pending = self.state.pending.pop(job.job_id)
        self.stores.finished(pending)
        self.stores.let_go(pending)
        return {group.group: len(group.block_ids) for group in job.groups}


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    with temporary_pool("unitstores") as name, KvStore(name, "64mib") as store:
        yield lambda blocks=200, share=0.1: Engine(store, blocks, share)


def tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


def test_room_is_shared_by_prefix_and_the_rest_is_stored_in_later_steps(engine: Callable[..., Engine]) -> None:
    """Room for 20 blocks, 3 groups of 16: each step takes the next spans of all groups, until nothing is due."""
    one = engine()
    record = one.request(tokens(1, 16 * SPAN))
    steps = []
    while record.next_at <= 16 * SPAN:
        steps.append(one.copied(one.stores.plan([(record, 16 * SPAN)])))
        assert max(record.stored) - min(record.stored) <= 1, "one group has run ahead of the others"
        assert len(steps) < 10
    assert [sum(step.values()) for step in steps] == [20, 20, 8]
    assert record.stored == [16, 16, 16]
    assert one.stores.without_room(record) == 0
    assert one.stores.held == 0


def test_what_is_in_the_pool_needs_no_room(engine: Callable[..., Engine]) -> None:
    one = engine()
    prompt = tokens(2, 16 * SPAN)
    for pas, left in enumerate([28, 8, 0]):
        record = one.request(prompt)
        one.copied(one.stores.plan([(record, 16 * SPAN)]))
        assert one.stores.without_room(record) == left, f"pass {pas}"
    assert one.state.counts["blocks_present"] == 20 + 40


def test_earlier_requests_come_first_and_null_blocks_take_no_room(engine: Callable[..., Engine]) -> None:
    one = engine()
    first, second = one.request(tokens(3, 8 * SPAN)), one.request(tokens(4, 8 * SPAN))
    for group in (0, 2):
        for at in range(6):  # what lies before the window
            one.blocks["r0"][group][at] = one.pool.null_block
    job = one.copied(one.stores.plan([(first, 8 * SPAN), (second, 8 * SPAN)]))
    assert first.stored == [8, 8, 8]
    assert second.stored == [3, 3, 2]
    assert sum(job.values()) == 20
    assert one.stores.without_room(second) == 5 + 5 + 6


def test_a_step_without_any_room_loses_nothing(engine: Callable[..., Engine]) -> None:
    """And with less of it than there are groups, some of it is stored all the same."""
    one = engine()
    busy = one.stores.plan([(one.request(tokens(5, 16 * SPAN)), 16 * SPAN)])
    record = one.request(tokens(6, 2 * SPAN))
    assert one.stores.plan([(record, 2 * SPAN)]) is None
    assert one.state.counts["steps_without_room"] == 1
    assert one.stores.without_room(record) == 6
    one.copied(busy)
    assert one.copied(one.stores.plan([(record, 2 * SPAN)])) == {0: 2, 1: 2, 2: 2}
    assert one.stores.without_room(record) == 0
    tiny = engine(blocks=100, share=0.02)
    record = tiny.request(tokens(7, 2 * SPAN))
    for _ in range(3):
        tiny.copied(tiny.stores.plan([(record, 2 * SPAN)]))
    assert record.stored == [2, 2, 2]
