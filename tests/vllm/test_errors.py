"""An error of kvplug's own, wherever it happens, costs a request its hits: right answers, and nothing left behind.

One engine, in which one inner method after the other is made to raise while requests are under way whose prefixes the
pool has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.models import MISTRAL
from tests.vllm.common import BLOCK, Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess

ANSWER_S = 60.0
METHODS = [
    *(("scheduler", name) for name in ("matched_tokens", "allocated", "build", "finished", "new_request")),
    ("scheduler", "_noted"),
    ("loads", "finished"),
    ("stores", "finished"),
    *(
        ("worker", name)
        for name in ("submit_loads", "submit_stores", "take_loaded", "take_report", "_load_group", "_store_some")
    ),
]


@pytest.fixture(scope="module")
def engine(start: Callable[..., InProcess], control: Control) -> InProcess:
    started = start("faulty")
    assert control.engine
    return started.ready()


@pytest.fixture(scope="module")
def free(engine: InProcess) -> int:
    """Blocks of the engine's own cache that nobody holds."""
    return int(engine.do("free_blocks"))


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """Prompts of 5 to 15 blocks, two for each method, and two that are answered first and last."""
    return control.pick(make_prompts(2 * len(METHODS) + 6, 61), 2 * len(METHODS) + 2)


@pytest.fixture(scope="module")
def warm(engine: InProcess, cases: list[Case], pool: str) -> list[Case]:
    """What the pool has: every second prompt."""
    known = cases[::2]
    agree(known, engine.each(requests(known)))
    blocks = len({case.prompt[: (i + 1) * BLOCK] for case in known for i in range(len(case.prompt) // BLOCK)})
    with attached(pool) as store:
        eventually("every full block of a prompt is sealed", lambda: store.stats().sealed_blocks >= blocks)
    return known


@pytest.mark.parametrize(("side", "name"), METHODS, ids=[f"{side}.{name}" for side, name in METHODS])
def test_an_error_costs_hits_and_nothing_else(
    engine: InProcess, free: int, cases: list[Case], warm: list[Case], pool: str, side: str, name: str
) -> None:
    at = 2 * METHODS.index((side, name))
    pair = cases[at : at + 2]  # one that the pool has, one that it has not
    engine.do("reset")
    engine.do("fail_in", side=side, method=name)
    try:
        agree(pair, engine.generate(requests(pair), timeout_s=ANSWER_S))
    finally:
        calls = engine.do("recover")
    assert calls > 0, "nothing was broken"
    engine.do("reset")
    (record,) = records = engine.each(requests(warm[-1:]))
    agree(warm[-1:], records)
    assert record["external"] > 0, "it works again"
    eventually("the engine has all of its blocks", lambda: engine.do("free_blocks") == free)
    with attached(pool) as store:
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)
        eventually("nothing stays half-written", lambda: store.stats().writing_slots == 0)
        store.check_integrity()


def test_ends_of_loads_that_nobody_waits_for_end_nothing_else(engine: InProcess, warm: list[Case], pool: str) -> None:
    """vLLM's scheduler asserts that it knows of each: one too many would be the engine's own end."""
    engine.do("report_too_much")
    try:
        for _ in range(3):
            engine.do("reset")
            records = engine.each(requests(warm[:3]))
            agree(warm[:3], records)
            assert all(record["external"] > 0 for record in records)
    finally:
        engine.do("report_as_usual")
    agree(warm[:1], engine.each(requests(warm[:1])))
    with attached(pool) as store:
        eventually("nothing stays pinned", lambda: store.stats().pinned_slots == 0)


def test_a_failed_load_of_a_model_of_windows_alone_is_computed_from_the_start(
    start: Callable[..., InProcess], tmp_path: Path, pool: str
) -> None:
    """Its hit has nothing in front of the last window: whoever went on there would compute, and store, nonsense."""
    witness = Control(MISTRAL, tmp_path / "control.log")
    engine = start("windows", MISTRAL)
    try:
        long = witness.pick(make_prompts(8, 62, tokens=(600, 640)), 4)
    finally:
        witness.close()
    assert engine.ready().info["groups"] == ["SlidingWindowSpec"]
    engine.each([{"prompt": list(case.prompt[:400]), "max_tokens": 1} for case in long])
    with attached(pool) as store:
        eventually("what was computed is stored", lambda: store.stats().writing_slots == 0)
    engine.do("reset")
    engine.do("fail_in", side="worker", method="_load_group")
    try:
        agree(long, engine.each(requests(long)))
    finally:
        assert engine.do("recover") > 0
    engine.do("reset")
    records = engine.each(requests(long))
    agree(long, records)
    assert all(record["external"] == storable(len(case.prompt)) for case, record in zip(long, records, strict=True))
