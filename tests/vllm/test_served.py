"""``vllm serve``: switched on by one environment variable, with its API server, engine core and worker processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable

import pytest

from tests.lab.env import EngineError
from tests.vllm.common import Case, Control, attached, eventually, make_prompts, storable
from tests.vllm_lab.engine import SERVE_ARGUMENTS, Completion, Server


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(12, 63), 10)


def same(cases: list[Case], answers: list[Completion]) -> None:
    assert [tuple(a.tokens) for a in answers] == [c.tokens for c in cases]


def ask_each(server: Server, cases: list[Case], **more: object) -> list[Completion]:
    return [server.complete(case.prompt, len(case.tokens), **more) for case in cases]  # type: ignore[arg-type]


def test_one_variable_switches_a_server_on_and_kills_of_its_parts_lose_nothing(
    serve: Callable[..., Server], cases: list[Case], pool: str
) -> None:
    first = serve("first", arguments=SERVE_ARGUMENTS).ready()
    lines = [line for line in first.log_text().splitlines() if "kvplug: O" in line]
    assert len(lines) == 1, lines
    assert f"kvplug: ON, pool {pool}" in lines[0]
    same(cases, ask_each(first, cases))
    blocks = sum(len(case.prompt) // 32 for case in cases)
    with attached(pool) as store:
        eventually("all is sealed", lambda: store.stats().sealed_blocks >= blocks)
        # The engine core alone, in full flight: its worker outlives it for a moment, and is still writing.
        before = store.stats().stored_blocks
        roles = first.roles()
        with contextlib.suppress(EngineError), contextlib.closing(Burst(first)):
            eventually("the engine is at work", lambda: store.stats().stored_blocks > before)
            first.kill(roles["EngineCore"])
        assert first.wait_gone() == [], "the rest of the server ends by itself"
        first.close()

        second = serve("second", arguments=SERVE_ARGUMENTS).ready()
        eventually("nothing stays half-written", lambda: store.stats().writing_slots == 0)
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)
        eventually("nothing stays quarantined", lambda: store.stats().quarantined_slots == 0)
        store.check_integrity()
    before_metrics = second.metrics()
    answers = ask_each(second, cases)
    same(cases, answers)
    assert [a.cached for a in answers] == [storable(len(c.prompt)) for c in cases]
    after = second.metrics()

    def grew(name: str) -> float:
        return after[name] - before_metrics.get(name, 0.0)

    hits = sum(storable(len(c.prompt)) for c in cases)
    assert grew("vllm:external_prefix_cache_hits_total") == hits
    assert grew("vllm:external_prefix_cache_queries_total") == sum(len(c.prompt) for c in cases)
    assert grew('vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}') == hits
    assert grew("kvplug_hit_tokens_total") == hits
    assert grew("kvplug_loaded_blocks_total") == hits // 32
    assert grew("kvplug_load_failures_total") == 0


def test_two_data_parallel_ranks_share_one_pool(serve: Callable[..., Server], cases: list[Case], pool: str) -> None:
    """What rank 0 computed, rank 1 reads; then both at once."""
    server = serve("dp", arguments=[*SERVE_ARGUMENTS, "--data-parallel-size", "2"], ranks=2).ready()
    fresh = make_prompts(6, 64)
    first = [server.complete(p, 8, headers={"X-data-parallel-rank": "0"}) for p in fresh]
    assert [a.cached for a in first] == [0] * len(fresh)
    with attached(pool) as store:
        eventually("nothing waits for a part", lambda: store.stats().writing_slots == 0)
    second = [server.complete(p, 8, headers={"X-data-parallel-rank": "1"}) for p in fresh]
    assert [a.cached for a in second] == [storable(len(p)) for p in fresh]
    assert [a.tokens for a in second] == [a.tokens for a in first]
    answers = server.complete_many([c.prompt for c in cases] * 2, len(cases[0].tokens))
    same(cases * 2, answers)
    assert server.metrics()["kvplug_load_failures_total"] == 0


class Burst:
    """Sixteen requests under way from another thread; closing waits for what comes of them."""

    def __init__(self, server: Server) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = self._pool.submit(server.complete_many, make_prompts(16, 65), 64)

    def close(self) -> None:
        try:
            self._future.result(60)
        finally:
            self._pool.shutdown(wait=False)
