"""Sleep, pauses, and what happens to the weights meanwhile: nothing old is ever read, and hits come back where every
byte of the weights is what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab.models import LLAMA, LLAMA_OTHER, model_dir
from tests.vllm.common import Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess

TIMES = 20


@pytest.fixture(scope="module")
def engine(start: Callable[..., InProcess], control: Control) -> InProcess:
    booting = start("sleeper", sleeps=True)
    assert control.engine
    return booting.ready()


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(6, 70), 2)


@pytest.fixture
def warm(engine: InProcess, cases: list[Case], pool: str) -> InProcess:
    """An engine that shares, and whose pool has what these take."""
    _hits(engine, cases)
    with attached(pool) as store:
        eventually("all is sealed", lambda: store.stats().writing_slots == 0)
    assert engine.do("reset")
    assert _hits(engine, cases) == [storable(len(case.prompt)) for case in cases]
    return engine


def _hits(engine: InProcess, cases: list[Case]) -> list[int]:
    records = engine.each(requests(cases))
    agree(cases, records)
    return [record["external"] for record in records]


def _all(cases: list[Case]) -> list[int]:
    return [storable(len(case.prompt)) for case in cases]


def test_hits_come_back_after_each_sleep_that_keeps_the_weights(warm: InProcess, cases: list[Case], pool: str) -> None:
    """And nothing more is held after twenty of them."""
    threads, lines = [], warm.log_text().count("kvplug: ON")
    for _ in range(TIMES):
        warm.do("sleep", level=1)
        assert warm.do("wake_up")
        assert _hits(warm, cases) == _all(cases)
        threads.append(warm.do("known_threads"))
    assert threads[-1] <= threads[0]
    assert warm.log_text().count("kvplug: ON") == lines, "nothing is to be said where nothing has changed"
    assert warm.do("reset")
    assert warm.do("free_blocks") == warm.info["num_blocks"] - 1
    with attached(pool) as store:
        assert store.stats().pinned_slots == 0
        store.check_integrity()


@pytest.mark.parametrize("reset", [True, False])
def test_after_a_sleep_that_loses_the_weights_nothing_is_read_until_they_are_there_again(
    warm: InProcess, cases: list[Case], reset: bool
) -> None:
    warm.do("sleep", level=2)
    assert warm.do("wake_up")
    (record,) = warm.each(requests(cases[:1]))
    assert record["external"] == 0
    if reset:
        assert warm.do("reset")
    warm.do("reload_weights", path=str(model_dir(LLAMA)))
    if not reset:
        (record,) = warm.each(requests(cases[1:]))
        assert record["external"] == 0, "the engine's own cache may hold what other weights have made"
    assert warm.do("reset")
    assert _hits(warm, cases) == _all(cases)


def test_weights_that_are_loaded_while_the_rest_sleeps(warm: InProcess, cases: list[Case]) -> None:
    """As loops do that have no memory for both caches and new weights."""
    for level in (2, 1):
        warm.do("sleep", level=level)
        assert not warm.do("wake_up", tags=["weights"])
        warm.do("reload_weights", path=str(model_dir(LLAMA)))
        assert warm.do("wake_up", tags=["kv_cache"])
        assert _hits(warm, cases) == _all(cases)


def test_other_weights_hit_nothing_old(warm: InProcess, cases: list[Case], control: Control) -> None:
    warm.do("sleep", level=1)
    warm.do("wake_up", tags=["weights"])
    warm.do("reload_weights", path=str(model_dir(LLAMA_OTHER)))
    warm.do("wake_up", tags=["kv_cache"])
    control.engine.do("reload_weights", path=str(model_dir(LLAMA_OTHER)))
    try:
        others = control.pick([case.prompt for case in cases], len(cases))
    finally:
        control.engine.do("reload_weights", path=str(model_dir(LLAMA)))
    assert _hits(warm, others) == [0] * len(cases)
    warm.do("sleep", level=2)
    warm.do("wake_up")
    warm.do("reload_weights", path=str(model_dir(LLAMA)))
    assert warm.do("reset")
    assert _hits(warm, cases) == _all(cases), "these are those of the start"


def test_a_pause_costs_nothing_unless_weights_are_changed_in_it(warm: InProcess, cases: list[Case]) -> None:
    warm.do("pause_and_resume")
    assert _hits(warm, cases) == _all(cases)
    warm.do("pause")
    warm.do("write_weights", factor=2.0)
    warm.do("resume")
    records = warm.each(requests(cases))
    assert [record["external"] for record in records] == [0, 0], "nobody has told of the change"
    assert "this engine shares with no other: its weights may have changed" in warm.log_text()
    warm.do("pause")
    warm.do("write_weights", factor=0.5)
    warm.do("resume")
    assert _hits(warm, cases) == _all(cases), "doubling and halving are exact"


def test_weights_that_sleep_are_not_looked_at(warm: InProcess, cases: list[Case]) -> None:
    """On a device that would end the worker. What a call to it has done meanwhile is not known before it wakes up."""
    for level in (1, 2):
        warm.do("sleep", level=level)
        assert warm.do("call_in_workers") == warm.info["worker_pids"]
        assert warm.do("looks_asleep") == 0
        warm.do("wake_up", tags=["weights"])
        if level == 2:
            warm.do("reload_weights", path=str(model_dir(LLAMA)))
        warm.do("wake_up", tags=["kv_cache"])
        assert _hits(warm, cases) == _all(cases)
