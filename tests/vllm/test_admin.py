"""Calls that an engine gets while kvplug is at work: each answers as it does without kvplug, and leaves nothing behind.

Every call is made in a control engine as well, whose answer is the expected one. Loops that train and serve at once
make such calls at every step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvplug.remote.fetcher import MISS_FOR_S
from tests.hosts.agents import OtherHost, move_blocks
from tests.stopwatch import LONG_S
from tests.vllm.common import Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess

CALLS: dict[str, tuple[str, list[Any]]] = {
    "reset": ("reset_prefix_cache", [False, False]),
    "reset with the connector": ("reset_prefix_cache", [False, True]),
    "reset of running requests": ("reset_prefix_cache", [True, False]),
    "reset of all": ("reset_prefix_cache", [True, True]),
    "keep and clear": ("pause_scheduler", ["keep", True]),
    "keep": ("pause_scheduler", ["keep", False]),
    "abort and clear": ("pause_scheduler", ["abort", True]),
    "abort": ("pause_scheduler", ["abort", False]),
    "sleep": ("sleep", [0, "keep"]),
    "encoder": ("reset_encoder_cache", []),
    "media": ("reset_mm_cache", []),
}
EMPTIES = {"reset of running requests", "reset of all", "keep and clear", "abort and clear"}
"""Calls after which an engine's cache is empty, whatever it was doing."""
HIDES = {"reset with the connector", "reset of all"}
"""Calls after which the engine finds nothing that it has stored before."""

MOMENTS: dict[str, dict[str, Any]] = {
    "a load runs": {"hold": "load"},
    "a load is over and was not taken in": {"delay_s": 0.1},
    "a load was aborted": {"hold": "load", "abort": True},
    "stores run": {"hold": "store"},
}


@pytest.fixture(scope="module")
def engine(start: Callable[..., InProcess], control: Control, other_host: OtherHost) -> InProcess:
    """Steps overlap, as they do by default where the engine has a process of its own."""
    booting = start("busy", env=other_host.settings, overlapping_steps=True, num_gpu_blocks_override=128)
    assert control.engine
    ready = booting.ready()
    assert ready.info["batches"] > 1
    return ready


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(8, 40, tokens=(1400, 1500)), 4, max_tokens=4)


@pytest.fixture(scope="module")
def answers(control: Control, cases: list[Case]) -> dict[tuple[str, bool], dict[str, Any]]:
    """What an engine without kvplug answers to each call, with a request under way and with one that was aborted."""
    found = {}
    for name, (call, args) in CALLS.items():
        for abort in (False, True):
            control.engine.do("reset")
            found[name, abort] = _amid(control.engine, cases[:1], call, args, abort=abort)
    return found


def _amid(engine: InProcess, cases: list[Case], call: str, args: list[Any], **how: Any) -> dict[str, Any]:
    out: dict[str, Any] = engine.do("amid", requests=requests(cases), call=call, args=args, **how)
    if not how.get("abort") and "abort" not in args:
        agree(cases, engine.do("wait", names=out["names"]))
    return out


def _warm(engine: InProcess, cases: list[Case], pool: str) -> None:
    """The pool has what these take, in the namespace that the engine has now, and the engine has nothing.

    A busy machine copies slowly, and what a request's last step finds no room for is not stored: so they are asked
    again until all of them is found.
    """
    whole = [storable(len(case.prompt)) for case in cases]

    def all_found() -> bool:
        records = engine.each(requests(cases))
        agree(cases, records)
        with attached(pool) as store:
            eventually("all is sealed", lambda: store.stats().writing_slots == 0)
        assert engine.do("reset")
        return [record["external"] for record in records] == whole

    eventually("the pool has all of it", all_found, LONG_S)


def _nothing_left(engine: InProcess, pool: str) -> None:
    assert engine.do("reset")
    assert engine.do("free_blocks") == engine.info["num_blocks"] - 1
    with attached(pool) as store:
        assert store.stats().pinned_slots == 0
        store.check_integrity()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_call_answers_as_without_kvplug(
    engine: InProcess,
    cases: list[Case],
    answers: dict[tuple[str, bool], dict[str, Any]],
    pool: str,
    moment: str,
    call: str,
) -> None:
    """And what was stored before is found after it, unless the call asks that it is not."""
    how = MOMENTS[moment]
    case, other = (cases[1:2] if moment == "stores run" else cases[:1]), cases[2:3]
    if moment == "stores run":
        assert engine.do("reset", external=True)  # so that there is something to store
        _warm(engine, other, pool)
    else:
        _warm(engine, case + other, pool)
    out = _amid(engine, case, *CALLS[call], **how)
    expected = answers[call, how.get("abort", False)]
    assert (out["error"], out["answer"], out["paused"]) == (expected["error"], expected["answer"], expected["paused"])
    if moment != "stores run":
        assert out["states"] == ["WAITING_FOR_REMOTE_KVS"]
    if call in EMPTIES:
        assert out["free"] == engine.info["num_blocks"] - 1, "a block is held"
    _nothing_left(engine, pool)
    (record,) = engine.each(requests(other))
    agree(other, [record])
    assert record["external"] == (0 if call in HIDES else storable(len(other[0].prompt)))


@pytest.mark.parametrize("call", CALLS)
def test_a_call_while_a_prefix_is_awaited_from_another_host(
    engine: InProcess,
    cases: list[Case],
    answers: dict[tuple[str, bool], dict[str, Any]],
    pool: str,
    other_host: OtherHost,
    call: str,
) -> None:
    case = cases[3:4]
    assert engine.do("reset", external=True)
    _warm(engine, case, pool)
    assert move_blocks(pool, other_host.pool) > 0
    time.sleep(MISS_FOR_S)  # until when it is remembered that nobody had them
    other_host.agent.signal(signal.SIGSTOP)
    try:
        out = engine.do("amid", requests=requests(case), call=CALLS[call][0], args=CALLS[call][1])
        assert out["states"] == ["WAITING"], "it waits for the other host"
        assert (out["error"], out["paused"]) == (None, answers[call, False]["paused"])
        assert out["free"] == engine.info["num_blocks"] - 1, "a request that waits for another host has no block"
        if "abort" not in CALLS[call][1]:
            agree(case, engine.do("wait", names=out["names"]))
    finally:
        other_host.agent.signal(signal.SIGCONT)
    _nothing_left(engine, pool)


def test_a_copy_that_does_not_end_costs_the_call_and_nothing_else(
    engine: InProcess, cases: list[Case], pool: str
) -> None:
    """The blocks that it writes to are nobody else's before it has ended; the engine says that it could not."""
    case = cases[:1]
    _warm(engine, case, pool)
    usual = engine.do("shorten_drain", seconds=0.3)
    try:
        out = _amid(engine, case, "reset_prefix_cache", [True, False], hold="load", hold_s=None)
        assert "RuntimeError" in out["error"]
        assert out["free"] < engine.info["num_blocks"] - 1
    finally:
        engine.do("shorten_drain", seconds=usual)
    _nothing_left(engine, pool)
    assert _amid(engine, case, "reset_prefix_cache", [True, False], hold="load")["answer"] is True
    _nothing_left(engine, pool)


def test_layouts_that_are_told_again_change_nothing(engine: InProcess, cases: list[Case], pool: str) -> None:
    """As vLLM does from 0.33 on whenever it is woken up. This engine has left the shared namespace."""
    assert engine.do("reset", external=True)
    _warm(engine, cases[:2], pool)
    names = engine.do("add", requests=requests(cases[2:3]))
    engine.do("step")
    first = engine.do("tell_layouts_again")
    for _ in range(19):
        again = engine.do("tell_layouts_again")
        for name in ("side", "namespace", "step", "held"):
            assert again[name] == first[name], name
        assert again["threads"] <= first["threads"]
    agree(cases[2:3], engine.do("wait", names=names))
    with attached(pool) as store:
        eventually("all is sealed", lambda: store.stats().writing_slots == 0)
    assert engine.do("reset")
    records = engine.each(requests(cases[:3]))
    agree(cases[:3], records)
    assert [r["external"] for r in records] == [storable(len(case.prompt)) for case in cases[:3]]
    _nothing_left(engine, pool)


def test_a_load_that_fails_while_the_cache_is_reset_takes_nothing_from_others(
    engine: InProcess, cases: list[Case], pool: str
) -> None:
    """vLLM hears of it with a later step, when the blocks may be those of other requests: it is told the request."""
    first, running = cases[:1], cases[2:3]
    assert engine.do("reset", external=True)
    _warm(engine, first, pool)
    engine.do("fail_in", side="worker", method="_load_group")
    try:
        others = engine.do("add", requests=requests(running))
        engine.do("step", n=4)
        out = _amid(engine, first, "reset_prefix_cache", [True, False])
        agree(running, engine.do("wait", names=others))
    finally:
        assert engine.do("recover") > 0
    assert out["error"] is None
    assert "Recovered from KV load failure" not in engine.log.read_text(), "vLLM was told of blocks"
    _nothing_left(engine, pool)
