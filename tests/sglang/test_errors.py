"""An error of kvplug's own, wherever it happens, costs a request its hits: right answers, and nothing left behind.

One server for each mode, in which one inner method after the other is made to raise while it answers a prompt that the
pool has and one that it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.lab.env import temporary_pool
from tests.sglang.common import Case, Control, serve
from tests.sglang_lab.server import SglangServer
from tests.vllm.common import attached, eventually

METHODS = {
    "linker": [
        "engine.keys",
        "_works.pins.lookup",
        "_works.pins._search",
        "_works.pins.matched",
        "_works.pins.end_of_step",
        "_works.pins.take",
        "_works.loads.queue",
        "_works.loads._load",
        "_works.offloads.submit",
        "_works.offloads._store_pages",
    ],
    "hicache": ["_engine.keys", "_leading_pages", "_get", "_set", "_get_fragments", "_put_fragments"],
}
ONCE = {"_works.loads._load"}
"""Tried again: SGLang has no way back from a load that has begun."""
MOST = max(map(len, METHODS.values()))
PLACES = [(mode, path) for mode, paths in METHODS.items() for path in paths]
INSIDE = "tests.sglang.inside_plugin:"


class Engine(NamedTuple):
    mode: str
    server: SglangServer
    pool: str

    def stored(self, case: Case) -> bool:
        return all(self.server.ask(f"tests.sglang.inside_{self.mode}:there", tokens=list(case.prompt)))


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """Two for each method, and one that is asked last each time."""
    return control.pick(2 * MOST + 1, seed=77)


@pytest.fixture(scope="module")
def engines(boot: Callable[..., SglangServer], cases: list[Case]) -> Iterator[Callable[[str], Engine]]:
    """The server of a mode, whose pool has the first of each pair and the last case; one at a time."""
    with temporary_pool("faulty") as pool:
        started: dict[str, Engine] = {}

        def of(mode: str) -> Engine:
            if mode not in started:
                for other in started.values():
                    other.server.close()
                server = boot(f"faulty-{mode}", mode=mode, pool=pool).ready()
                engine = started[mode] = Engine(mode, server, pool)
                known = cases[::2]
                eventually("the weights are known", lambda: serve(server, known[:1]) and engine.stored(known[0]))
                serve(server, known)
                for case in known:
                    eventually("pages are stored", lambda: engine.stored(case))  # noqa: B023
            return started[mode]

        yield of
        for engine in started.values():
            engine.server.close()


@pytest.mark.parametrize(("mode", "path"), PLACES, ids=[f"{mode}-{path.rpartition('.')[2]}" for mode, path in PLACES])
def test_an_error_costs_hits_and_nothing_else(
    engines: Callable[[str], Engine], cases: list[Case], mode: str, path: str
) -> None:
    engine = engines(mode)
    server = engine.server
    at = 2 * METHODS[mode].index(path)
    server.flush()
    server.ask(INSIDE + "fail_in", mode=mode, path=path, **({"times": 1} if path in ONCE else {}))
    try:
        serve(server, cases[at : at + 2])
        eventually("it was called", lambda: server.ask(INSIDE + "broken_calls") > 0)
    finally:
        server.ask(INSIDE + "recover")
    server.flush()
    (answer,) = serve(server, cases[-1:])
    assert answer.cached == cases[-1].whole, f"it works again: {answer.details}"
    eventually("nothing stays pinned or half-written", lambda: server.ask(INSIDE + "pool_in_use") == [0, 0])
    counts: dict[str, Any] = server.ask(INSIDE + "counts_now")
    assert counts["errors"] > 0
    with attached(engine.pool) as store:
        store.check_integrity()
