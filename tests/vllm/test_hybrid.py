"""A model with sliding-window and full attention: three cache groups, and a null block where the window has passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.hosts.agents import OtherHost, move_blocks
from tests.lab.models import GEMMA3
from tests.vllm.common import BLOCK, Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    control = Control(GEMMA3, tmp_path_factory.mktemp("hybrid-control") / "engine.log")
    yield control
    control.close()


@pytest.fixture(scope="module")
def engines(start: Callable[..., InProcess], witness: Control, other_host: OtherHost) -> dict[str, InProcess]:
    out = {"cold": start("cold", GEMMA3), "warm": start("warm", GEMMA3, env=other_host.settings)}
    assert witness.engine
    for engine in out.values():
        engine.ready()
    return out


@pytest.fixture(scope="module")
def cases(engines: dict[str, InProcess], witness: Control) -> list[Case]:
    half = make_prompts(8, 91, shared=6 * BLOCK, tokens=(250, 700))
    return witness.pick(half, 5) + witness.pick(make_prompts(8, 92, tokens=(40, 700)), 5)


@pytest.fixture(scope="module")
def filled(engines: dict[str, InProcess], cases: list[Case], pool: str) -> list[Any]:
    """Digests of the pages that ``cold`` computed, null blocks empty."""
    cold = engines["cold"]
    assert sorted(cold.info["groups"]) == ["FullAttentionSpec", "SlidingWindowSpec", "SlidingWindowSpec"]
    records = cold.each(requests(cases))
    agree(cases, records)
    with attached(pool) as store:
        eventually("the pool is quiet", lambda: store.stats().sealed_blocks > 0 and store.stats().writing_slots == 0)
    return [cold.do("pages", block_ids=_prompt_blocks(c, r)) for c, r in zip(cases, records, strict=True)]


def _prompt_blocks(case: Case, record: dict[str, Any]) -> list[list[int]]:
    return [ids[: storable(len(case.prompt)) // BLOCK] for ids in record["block_ids"]]


def test_a_fresh_engine_takes_every_group_from_the_pool(
    engines: dict[str, InProcess], cases: list[Case], filled: list[Any]
) -> None:
    """Same output; and of every block that is not null in either engine, the same bytes in every layer."""
    warm = engines["warm"]
    for case, pages in zip(cases, filled, strict=True):
        warm.do("reset")
        (record,) = warm.each([case.request()])
        agree([case], [record])
        assert (record["external"], record["local"]) == (storable(len(case.prompt)), 0)
        ((*loaded,),) = warm.do("pages", block_ids=_prompt_blocks(case, record))
        compared = [0, 0, 0]
        for g, (new, old) in enumerate(zip(loaded, pages[0], strict=True)):
            for mine, theirs in zip(new, old, strict=True):
                if mine != [""] and theirs != [""]:
                    assert mine == theirs, f"group {g}: a loaded page differs from the stored one"
                    compared[g] += 1
        assert all(compared), "every group has a block that both engines hold"


def test_blocks_before_the_window_are_null_and_stay_so(
    engines: dict[str, InProcess], cases: list[Case], filled: list[Any]
) -> None:
    warm = engines["warm"]
    long = max(cases, key=lambda case: len(case.prompt))
    warm.do("reset")
    (record,) = warm.each([long.request()])
    assert record["external"] == storable(len(long.prompt))
    null_share = [sum(b == 0 for b in ids) / len(ids) for ids in record["block_ids"]]
    assert sorted(share > 0.5 for share in null_share) == [False, True, True]


def test_batches_of_hybrid_requests_answer_right(
    engines: dict[str, InProcess], cases: list[Case], filled: list[Any]
) -> None:
    warm = engines["warm"]
    for _ in range(2):
        warm.do("reset")
        records = warm.generate(requests(cases))
        agree(cases, records)
        assert sum(r["external"] for r in records) > 0


def test_another_host_gives_what_each_group_needs_and_no_more(
    engines: dict[str, InProcess], cases: list[Case], filled: list[Any], pool: str, other_host: OtherHost
) -> None:
    """All blocks were moved there; of windowed groups only the last window of a hit comes back."""
    warm = engines["warm"]
    moved = move_blocks(pool, other_host.pool)
    warm.do("reset")
    before = warm.do("metrics")
    long = max(cases, key=lambda case: len(case.prompt))
    (record,) = warm.each([long.request()])
    agree([long], [record])
    assert record["external"] == storable(len(long.prompt))
    fetched = warm.do("metrics")["kvplug_fetched_blocks_total"] - before["kvplug_fetched_blocks_total"]
    full = storable(len(long.prompt)) // BLOCK
    window = -(-GEMMA3.window // BLOCK) + 1
    assert full < fetched <= full + 2 * window < moved
    warm.do("reset")
    agree(cases, warm.each(requests(cases)))


@pytest.fixture(scope="module")
def cramped(start: Callable[..., InProcess]) -> InProcess:
    """An engine with few device blocks, of which a prompt of some hundred tokens has more than stores may hold."""
    return start("cramped", GEMMA3, num_gpu_blocks_override=90, max_model_len=1024).ready()


def test_a_prompt_that_stores_have_no_room_for_gets_further_with_each_repeat(
    cramped: InProcess, witness: Control, pool: str
) -> None:
    """What is stored is a prefix in all groups, so it is hit; what was there uses no room. The rest is counted."""
    (case,) = witness.pick(make_prompts(8, 94, tokens=(700, 720)), 1, max_tokens=1)
    hits = []
    before = cramped.do("metrics").get("kvplug_not_stored_blocks_total", 0.0)
    for _ in range(8):
        cramped.do("reset")
        (record,) = cramped.each([case.request()])
        agree([case], [record])
        hits.append(record["external"])
        with attached(pool) as store:
            eventually("what was begun is stored", lambda: store.stats().writing_slots == 0)
        if hits[-1] == storable(len(case.prompt)):
            break
    room = int(90 * 0.2) // len(cramped.info["groups"]) * BLOCK
    assert hits[:3] == [0, room, 2 * room], hits
    assert hits == sorted(hits)
    assert hits[-1] == storable(len(case.prompt)), hits
    assert cramped.do("metrics")["kvplug_not_stored_blocks_total"] > before


def test_a_hybrid_engine_under_preemption_answers_right(
    cramped: InProcess, cases: list[Case], filled: list[Any], witness: Control, pool: str
) -> None:
    """Few device blocks; longer outputs, so that windows move over block edges while requests come and go."""
    long = witness.pick(make_prompts(14, 93, tokens=(100, 200)), 12, max_tokens=96)
    for _ in range(2):
        cramped.do("reset")
        records = cramped.generate(requests(long))
        agree(long, records)
        assert sum(r["preemptions"] for r in records) > 0
    cramped.do("reset")
    agree(cases, cramped.each(requests(cases)))
    with attached(pool) as store:
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)
        store.check_integrity()
