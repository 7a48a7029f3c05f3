"""Full pools, full engines, preemption: two engines at once with 16 requests in flight each.

``roomy`` has device blocks for all of its requests; ``cramped`` has so few that it must preempt. Both share a pool that
holds a fraction of what they compute.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from kvplug.config import Config
from kvplug.errors import Code
from kvplug.store import KvStore, SlotBatch
from tests.lab.models import LLAMA
from tests.vllm.common import BLOCK, Case, Control, agree, attached, eventually, make_prompts, requests
from tests.vllm_lab.engine import InProcess

IN_FLIGHT = 16
ROUNDS = 3
LLAMA_BLOCK_BYTES = BLOCK * LLAMA.layers * 2 * LLAMA.kv_heads * LLAMA.head_dim * 4
"""Keys and values of one block, all layers, float32."""
POOL = "12mib"
"""About 90 blocks of 128 KiB, less what the tables take; the two engines' requests have about 400."""


@pytest.fixture(scope="module")
def engines(start: Callable[..., InProcess], control: Control) -> dict[str, InProcess]:
    out = {
        "roomy": start("roomy", size=POOL),
        "cramped": start("cramped", size=POOL, num_gpu_blocks_override=49, max_model_len=1024),
    }
    assert control.engine
    for engine in out.values():
        engine.ready()
    return out


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """32 requests, of which some share a head, and which generate long enough to outgrow ``cramped``."""
    prompts = make_prompts(18, 71, tokens=(100, 250), shared=2 * BLOCK) + make_prompts(26, 72, tokens=(100, 400))
    return control.pick(prompts[:18], 12, max_tokens=96) + control.pick(prompts[18:], 20, max_tokens=96)


def test_two_engines_at_once_on_a_pool_too_small_for_them_answer_right(
    engines: dict[str, InProcess], cases: list[Case], pool: str
) -> None:
    """Every request goes to both engines over the rounds, so each reads what the other stored, while both evict."""
    rng = random.Random(73)
    external = preemptions = 0
    for _ in range(ROUNDS):
        order = rng.sample(cases, len(cases))
        shares = {"roomy": order[:IN_FLIGHT], "cramped": order[IN_FLIGHT:]}
        for name, engine in engines.items():
            engine.do("reset")
            engine.ask("generate", requests=requests(shares[name]))
        for name, engine in engines.items():
            records = engine.answer()
            agree(shares[name], records)
            external += sum(r["external"] for r in records)
            preemptions += sum(r["preemptions"] for r in records)
    with attached(pool) as store:
        stats = store.stats()
        assert stats.evicted_blocks > 0, "the pool was not too small"
        assert stats.corrupt_blocks == 0
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)
        eventually("nothing stays half-written", lambda: store.stats().writing_slots == 0)
        store.check_integrity()
    assert external > 0, "nothing was ever read from the pool"
    assert preemptions > 0, "the cramped engine never had to preempt"


def test_forced_preemption_on_a_warm_pool_answers_right(
    engines: dict[str, InProcess], cases: list[Case], pool: str
) -> None:
    """A preempted request comes back and finds in the pool what it had computed: prompt and output alike."""
    cramped = engines["cramped"]
    chosen = cases[:IN_FLIGHT]
    free = None
    for _ in range(2):
        cramped.do("reset")
        free = free or cramped.do("free_blocks")
        records = cramped.generate(requests(chosen))
        agree(chosen, records)
        assert sum(r["preemptions"] for r in records) > 0
    agree(chosen[:1], cramped.each(requests(chosen[:1])))
    eventually("no device block is lost", lambda: cramped.do("free_blocks") == free)
    with attached(pool) as store:
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)
        store.check_integrity()


def test_an_engine_runs_on_when_the_pool_takes_nothing(
    engines: dict[str, InProcess], cases: list[Case], pool: str
) -> None:
    """Somebody else has pinned every block of the pool: nothing can be stored, and nobody waits for it."""
    with KvStore(pool, config=Config(pin_budget_share=1.0, reserve_budget_share=1.0), create=False) as store:
        refused = store.stats().refused_full
        pins = _pin_everything(store)
        assert pins
        try:
            fresh = [{"prompt": p, "max_tokens": 8} for p in make_prompts(IN_FLIGHT, 74)]
            records = engines["cramped"].generate(fresh, timeout_s=60)
            assert all(len(r["tokens"]) == 8 for r in records)
            agree(cases[:4], engines["roomy"].generate(requests(cases[:4])))
            assert store.stats().refused_full > refused, "what found no room is counted"
        finally:
            for batch in pins:
                store.unpin(batch.slots, batch.gens)
        eventually("the pins are gone", lambda: store.stats().pinned_slots == 0)
    agree(cases[:1], engines["roomy"].each(requests(cases[:1])))


def _pin_everything(store: KvStore) -> list[SlotBatch]:
    """Stores blocks of the engines' size under keys of nobody's, pinning each, until no slot is left."""
    rng = np.random.default_rng(75)
    block = np.zeros(LLAMA_BLOCK_BYTES, np.uint8)
    pins = []
    for _ in range(64):
        keys = rng.integers(0, 256, (16, 32), dtype=np.uint8)
        codes = store.put(keys, [block] * 16)
        stored = keys[codes == Code.OK]
        if len(stored):
            pins.append(store.pin_batch(stored))
        if (codes == Code.FULL).all():
            return pins
    raise AssertionError("the pool did not fill up")
