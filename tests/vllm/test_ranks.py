"""Engines of several ranks on one host: each rank's bytes are its own, a block is whole only when all have written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.env import EngineError
from tests.vllm.common import BLOCK, Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess


def burst(seed: int) -> list[dict[str, Any]]:
    """Work for an engine that is to be killed: of its own, since what another has stored is not stored again."""
    return [{"prompt": p, "max_tokens": 64} for p in make_prompts(16, seed)]


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(8, 80), 6)


def full_blocks(case: Case, record: dict[str, Any]) -> list[list[int]]:
    return [ids[: storable(len(case.prompt)) // BLOCK] for ids in record["block_ids"]]


def fill(engine: InProcess, cases: list[Case], pool: str) -> list[Any]:
    """Has the cases computed and stored; answers their pages' digests, by rank."""
    records = engine.each(requests(cases))
    agree(cases, records)
    assert records[0]["external"] == 0
    with attached(pool) as store:
        blocks = sum(len(case.prompt) // BLOCK for case in cases)
        eventually("every rank's parts are in and sealed", lambda: store.stats().sealed_blocks >= blocks)
        eventually("nothing waits for a part", lambda: store.stats().writing_slots == 0)
    return [engine.do("pages", block_ids=full_blocks(c, r)) for c, r in zip(cases, records, strict=True)]


def check_warm(engine: InProcess, cases: list[Case], pages: list[Any]) -> None:
    """Everything comes from the pool, with the right bytes on every rank, and answers are right."""
    for case, expected in zip(cases, pages, strict=True):
        (record,) = engine.each([case.request()])
        agree([case], [record])
        assert record["external"] == storable(len(case.prompt))
        assert engine.do("pages", block_ids=full_blocks(case, record)) == expected


def empty_amid_loads(engine: InProcess, cases: list[Case], pool: str) -> None:
    """The engine is told to empty its cache while every rank loads: it does, and goes on."""
    assert engine.do("reset")
    for connector in (False, True):
        out = engine.do("amid", requests=requests(cases), call="reset_prefix_cache", args=[True, connector])
        assert (out["error"], out["answer"]) == (None, True)
        assert "WAITING_FOR_REMOTE_KVS" in out["states"]
        assert out["free"] == engine.info["num_blocks"] - 1
        agree(cases, engine.do("wait", names=out["names"]))
        assert engine.do("reset")
        with attached(pool) as store:
            eventually("nothing stays pinned", lambda store=store: store.stats().pinned_slots == 0)


def kill_in_flight(engine: InProcess, pid: int, pool: str, seed: int) -> None:
    """SIGKILL to one process of the engine while it stores and computes; the others end by themselves."""
    with attached(pool) as store:
        before = store.stats().stored_blocks
        engine.ask("generate", requests=burst(seed))
        eventually("the engine is at work", lambda: store.stats().stored_blocks > before)
        engine.kill(pid)
        with contextlib.suppress(EngineError):
            engine.answer(60)
        engine.close()
        eventually("nothing stays half-written", lambda: store.stats().writing_slots == 0)
        eventually("nothing stays quarantined", lambda: store.stats().quarantined_slots == 0)
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)
        store.check_integrity()


def test_two_tensor_parallel_ranks_share_survive_kills_and_read_their_own_bytes(
    start: Callable[..., InProcess], cases: list[Case], pool: str
) -> None:
    first = start("tp-first", tensor_parallel_size=2)
    second = start("tp-second", tensor_parallel_size=2)
    pages = fill(first.ready(), cases, pool)
    assert all(rank0 != rank1 for rank0, rank1 in pages), "the ranks hold different heads"
    check_warm(second.ready(), cases, pages)
    empty_amid_loads(second, cases, pool)

    # A worker alone, then the scheduler alone (which runs in the first process here), each followed by a restart.
    kill_in_flight(first, first.info["worker_pids"][1], pool, 81)
    kill_in_flight(second, second.pid, pool, 82)
    third = start("tp-third", tensor_parallel_size=2)
    check_warm(third.ready(), cases, pages)
    third.do("reset")
    agree(cases, third.generate(requests(cases)))


def test_two_pipeline_stages_share_a_block(start: Callable[..., InProcess], cases: list[Case], pool: str) -> None:
    """Each stage has half of the layers; a namespace of its own, since the parts differ from those of other splits."""
    first = start("pp-first", pipeline_parallel_size=2)
    second = start("pp-second", pipeline_parallel_size=2)
    pages = fill(first.ready(), cases, pool)
    check_warm(second.ready(), cases, pages)
    agree(cases, second.generate(requests(cases)))
    empty_amid_loads(second, cases, pool)
