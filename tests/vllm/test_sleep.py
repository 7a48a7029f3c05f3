"""Sleep, pauses, and what happens to the weights meanwhile: nothing old is ever read, and hits come back where every
byte of the weights is what it was and no call was made that changes some."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.lab.models import LLAMA, LLAMA_OTHER, model_dir
from tests.vllm.common import Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess

TIMES = 20
_numbers = itertools.count()


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(6, 70), 2)


@pytest.fixture
def warm(start: Callable[..., InProcess], cases: list[Case], pool: str) -> InProcess:
    """An engine that shares, and whose pool has what these take."""
    engine = start(f"sleeper-{next(_numbers)}", sleeps=True).ready()
    _hits(engine, cases)
    with attached(pool) as store:
        eventually("all is sealed", lambda: store.stats().writing_slots == 0)
    assert engine.do("reset")
    assert _hits(engine, cases) == _all(cases)
    return engine


def _hits(engine: InProcess, cases: list[Case]) -> list[int]:
    records = engine.each(requests(cases))
    agree(cases, records)
    return [record["external"] for record in records]


def _all(cases: list[Case]) -> list[int]:
    return [storable(len(case.prompt)) for case in cases]


def _read(engine: InProcess, cases: list[Case]) -> list[int]:
    """As :func:`_hits`, of weights that answer otherwise."""
    return [record["external"] for record in engine.each(requests(cases))]


def test_hits_come_back_after_each_sleep_that_keeps_the_weights(warm: InProcess, cases: list[Case], pool: str) -> None:
    """And nothing more is held or said after twenty of them, whatever is woken up first."""
    threads, lines = [], warm.log_text().count("kvplug: ON")
    for i in range(TIMES):
        warm.do("sleep", level=1)
        for tags in (None,) if i % 2 else (["weights"], ["kv_cache"]):
            warm.do("wake_up", tags=tags)
        assert _hits(warm, cases) == _all(cases)
        threads.append(warm.do("known_threads"))
        warm.do("pause_and_resume")
        assert _hits(warm, cases) == _all(cases)
    assert threads[-1] <= threads[0]
    assert warm.log_text().count("kvplug: ON") == lines, "nothing is to be said where nothing has changed"
    assert warm.do("looks_asleep") == 0
    assert warm.do("reset")
    assert warm.do("free_blocks") == warm.info["num_blocks"] - 1
    with attached(pool) as store:
        assert store.stats().pinned_slots == 0
        store.check_integrity()


def test_after_a_sleep_that_loses_the_weights_nothing_old_is_read(warm: InProcess, cases: list[Case]) -> None:
    """Also not when the same ones are there again: layers may have kept something in no tensor."""
    warm.do("sleep", level=2)
    assert warm.do("wake_up")
    assert _read(warm, cases) == [0, 0]
    warm.do("reload_weights", path=str(model_dir(LLAMA)))
    assert warm.do("reset")
    assert _hits(warm, cases) == [0, 0]
    assert "this engine shares with no other until it is started again: its weights were changed" in warm.log_text()


@pytest.mark.parametrize("level", [1, 2])
def test_weights_that_are_loaded_while_the_rest_sleeps(
    warm: InProcess, cases: list[Case], control: Control, level: int
) -> None:
    """As loops do that have no memory for both caches and new weights."""
    warm.do("sleep", level=level)
    assert not warm.do("wake_up", tags=["weights"])
    warm.do("reload_weights", path=str(model_dir(LLAMA_OTHER)))
    assert warm.do("wake_up", tags=["kv_cache"])
    control.engine.do("reload_weights", path=str(model_dir(LLAMA_OTHER)))
    try:
        others = control.pick([case.prompt for case in cases], len(cases))
    finally:
        control.engine.do("reload_weights", path=str(model_dir(LLAMA)))
    assert _hits(warm, others) == [0, 0]
    assert warm.do("reset")
    assert _hits(warm, others) == _all(cases), "it has its own"


def test_weights_that_nobody_has_told_of_in_a_pause_hit_nothing_old(warm: InProcess, cases: list[Case]) -> None:
    """Known files lead back; the same bytes after others do not, for what was computed between is in nobody's books."""
    warm.do("pause")
    warm.do("write_weights", factor=2.0)
    warm.do("resume")
    assert _read(warm, cases) == [0, 0]
    assert "this engine shares with no other: its weights may have changed" in warm.log_text()
    warm.do("pause_keeping")
    warm.do("write_weights", factor=0.5)
    warm.do("resume")
    other = [Case([7, *case.prompt[1:]], case.tokens) for case in cases]
    assert _read(warm, other) == [0, 0], "doubling and halving are exact, but the engine's own cache is not"
    warm.do("reload_weights", path=str(model_dir(LLAMA)))

    def shares() -> bool:
        assert warm.do("reset")
        return _hits(warm, cases) == _all(cases)

    eventually("the files are identified", shares)


def test_weights_that_change_in_a_pause_which_keeps_the_caches(warm: InProcess, cases: list[Case]) -> None:
    """The engine's own cache holds what the old ones have made, so nothing is read or stored until it was emptied."""
    warm.do("pause_keeping")
    warm.do("resume")
    assert warm.do("reset")
    assert _hits(warm, cases) == _all(cases), "nothing has changed"
    warm.do("pause_keeping")
    warm.do("write_weights", factor=2.0)
    warm.do("resume")
    assert "kvplug: weights changed (in a pause)" in warm.log_text()
    assert warm.do("reset")
    assert _read(warm, cases) == [0, 0]


def test_a_first_look_that_comes_late_is_none(warm: InProcess, cases: list[Case]) -> None:
    """Others were written in a pause that emptied nothing; the next one must not take them for the known ones."""
    warm.do("pause_keeping")
    warm.do("write_weights", factor=2.0)
    warm.do("pause")
    warm.do("resume")
    assert _read(warm, cases) == [0, 0]


def test_weights_that_sleep_are_not_looked_at(warm: InProcess, cases: list[Case]) -> None:
    """On a device that would end the worker. What a call to it has done meanwhile is not known."""
    warm.do("sleep", level=1)
    assert warm.do("call", method="lab_pid", args=[]) == warm.info["worker_pids"]
    warm.do("wake_up")
    assert warm.do("looks_asleep") == 0
    assert _hits(warm, cases) == [0, 0]


def test_a_sleep_that_the_workers_are_sent_into_is_one(warm: InProcess, cases: list[Case]) -> None:
    """By a call to them, past the engine, which does not know of it."""
    warm.do("call", method="sleep", args=[1])
    warm.do("call", method="lab_pid", args=[])
    assert warm.do("looks_asleep") == 0
    warm.do("call", method="wake_up", args=[])
    assert warm.do("reset")
    assert _hits(warm, cases) == [0, 0]
