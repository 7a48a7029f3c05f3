"""What a user sees of the pool: ``cached_tokens_details`` in answers, and ``kvplug_*`` on SGLang's own /metrics."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvplug.adapters.sglang.metrics import COUNTERS
from tests.sglang.common import Control, serve
from tests.sglang_lab.server import PAGE, SglangServer
from tests.vllm.common import eventually


@pytest.mark.parametrize("mode", ["linker", "hicache"])
def test_hits_are_told_in_answers_and_counted(boot: Callable[..., SglangServer], control: Control, mode: str) -> None:
    (case,) = control.pick(1, 60)
    pages = case.whole // PAGE
    server = boot(mode, mode=mode).ready()
    before = server.metrics()
    assert {f"kvplug_{name}_total" for name in COUNTERS} <= set(before), "each counter is there from the start"

    def grown(name: str) -> float:
        return server.metrics()[f"kvplug_{name}_total"] - before[f"kvplug_{name}_total"]

    (first,) = serve(server, [case])
    assert first.cached == 0
    eventually("what was stored is counted", lambda: grown("stored_pages") >= pages)
    server.flush()
    (second,) = serve(server, [case])
    assert second.cached == case.whole
    told = {name: value for name, value in second.details.items() if isinstance(value, int)}
    assert told.get("device") == 0
    assert sum(told.values()) == case.whole, second.details
    eventually("what was loaded is counted", lambda: grown("loaded_pages") >= pages)
    assert grown("loaded_bytes") == grown("loaded_pages") * (grown("stored_bytes") / grown("stored_pages"))
    assert grown("hit_pages") >= pages
    assert grown("lookups") >= 2
    assert server.metrics()["kvplug_copy_seconds_total"] > 0
    for name in ("corrupt_pages", "load_failures", "errors", "weight_changes"):
        assert grown(name) == 0, name
