"""The lab itself: a server without kvplug is whole, shows what it cached, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sglang.common import Control, serve
from tests.sglang_lab.server import SglangServer
from tests.vllm_lab.env import EngineError


def test_forked_server_answers_like_one_started_cold(boot: Callable[..., SglangServer], control: Control) -> None:
    cold = boot("cold", pool=None, cold=True)
    cases = control.pick(2, seed=1)
    roles = control.server.roles()
    assert set(roles) == {"api", "scheduler", "detokenizer"} == set(cold.ready().roles())
    assert control.server.ask("tests.sglang_lab.inside:pid") == roles["scheduler"]
    assert cold.ask("tests.sglang_lab.inside:pid") == cold.roles()["scheduler"]
    assert [answer.cached for answer in serve(cold, cases)] == [0, 0]
    again = serve(cold, cases)
    assert [answer.cached for answer in again] == [case.whole for case in cases]
    assert all(0 < answer.ttft_s <= answer.total_s for answer in again)


def test_server_without_kvplug_has_nothing_of_it(control: Control) -> None:
    assert not control.server.ask("tests.sglang_lab.inside:modules", prefix="kvplug")
    assert not [name for name in control.server.metrics() if name.startswith("kvplug_")]
    assert "kvplug" not in control.server.get("/server_info")


def test_errors_say_what_happened(boot: Callable[..., SglangServer], control: Control) -> None:
    with pytest.raises(EngineError, match="not a function there"):
        control.server.ask("tests.sglang_lab.inside:fail", message="not a function there")
    with pytest.raises(EngineError, match="longer than the model's context length"):
        control.server.generate([10] * 5000)
    broken = boot("broken", pool=None, arguments=["--page-size", "none"])
    with pytest.raises(EngineError, match="invalid int value: 'none'"):
        broken.ready()


def test_killed_server_leaves_no_process_and_starts_again(boot: Callable[..., SglangServer], control: Control) -> None:
    first = boot("killed", pool=None).ready()
    family = first.family()
    assert len(family) >= 3
    first.kill_all()
    assert not [p for p in family if p.is_running()]
    second = first.again()
    try:
        serve(second.ready(), control.pick(1, seed=2))
    finally:
        second.close()
    assert not second.family()
