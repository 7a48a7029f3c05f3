"""Calls that an operator or a training loop makes, while pages are on their way: each does what it does without kvplug.

Afterwards no request has failed, the answers are right, nothing is pinned or half written, and kvplug is on.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator

import pytest

from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, LoraSpec, lora_dir, model_dir
from tests.sglang.common import Case, Control, serve
from tests.sglang.test_linker import ask, from_pool, healthy, store
from tests.sglang_lab.models import LORA_ARGUMENTS
from tests.sglang_lab.server import PAGE, SglangServer
from tests.vllm.common import attached, eventually


def flush(server: SglangServer) -> None:
    server.flush()


def release_memory(server: SglangServer) -> None:
    """SGLang asserts that it is idle, and ends if it is not: no call for the middle of a step."""
    eventually("SGLang is idle", lambda: ask(server, "idle"))
    for what in ("release", "resume"):
        server.post(f"/{what}_memory_occupation", {"tags": ["kv_cache"]})


def retract(server: SglangServer) -> None:
    """As a training loop does between two steps."""
    server.post("/pause_generation", {"mode": "retract"})
    server.post("/flush_cache")
    server.post("/continue_generation", {})


def pause_in_place(server: SglangServer) -> None:
    server.post("/pause_generation", {"mode": "in_place"})
    server.post("/continue_generation", {})


def abort(server: SglangServer) -> None:
    server.post("/abort_request", {"abort_all": True})


def change_settings(server: SglangServer) -> None:
    server.post("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 8}})


def adapters(server: SglangServer) -> None:
    name = {"lora_name": "late"}
    assert server.post("/load_lora_adapter", {**name, "lora_path": str(lora_dir(LLAMA, LoraSpec(seed=1)))})["success"]
    assert server.post("/unload_lora_adapter", name)["success"]


def new_weights(server: SglangServer) -> None:
    """The same ones, so that the right answers stay the same."""
    answer = server.post("/update_weights_from_disk", {"model_path": str(model_dir(LLAMA)), "flush_cache": True})
    assert answer["success"], answer


def new_weights_in_place(server: SglangServer) -> None:
    """While requests are paused, which go on with what they have."""
    server.post("/pause_generation", {"mode": "in_place"})
    answer = server.post("/update_weights_from_disk", {"model_path": str(model_dir(LLAMA)), "flush_cache": False})
    assert answer["success"], answer
    server.post("/continue_generation", {})


CALLS = (
    flush, release_memory, retract, pause_in_place, abort, change_settings, adapters, new_weights, new_weights_in_place,
)  # fmt: skip


@pytest.fixture(scope="module")
def own() -> Iterator[str]:
    """The pool of this module's server."""
    with temporary_pool("sglangadmin") as name:
        yield name


@pytest.fixture(scope="module")
def server(boot: Callable[..., SglangServer], own: str) -> SglangServer:
    server = boot("admin", pool=own, arguments=LORA_ARGUMENTS).ready()
    ask(server, "watch_release")
    return server


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """A prompt for each call of each test."""
    return control.pick(2 * len(CALLS), seed=101, tokens=(2 * PAGE + 8, 4 * PAGE))


def settled(server: SglangServer, pool: str) -> None:
    """After the call: as if it had not been."""
    with attached(pool) as outside:
        eventually("nothing is in writing", lambda: outside.stats().writing_slots == 0)
    server.flush()
    healthy(server, pool)
    assert ask(server, "promises") == [0, 0, 0]


@pytest.mark.parametrize("call", CALLS)
def test_while_pages_are_being_stored(
    server: SglangServer, cases: list[Case], own: str, call: Callable[[SglangServer], None]
) -> None:
    """The server has nothing else to do, but the copy into the pool has not ended."""
    case = cases[CALLS.index(call)]
    eventually("the weights are known", lambda: ask(server, "there", tokens=list(case.prompt)))
    ask(server, "hold_copies", kind="store")
    try:
        serve(server, [case])
        eventually("pages are on their way", lambda: ask(server, "a_copy_is_held"))
        call(server)
    finally:
        ask(server, "let_copies_go")
    settled(server, own)
    assert not any(ask(server, "in_flight_at_release")), "memory was released that a copy still read"
    serve(server, [case])
    store(server, [case])
    server.flush()
    assert from_pool(serve(server, [case])) == [case.whole]


@pytest.mark.parametrize("call", [call for call in CALLS if call is not release_memory])
def test_while_pages_are_being_loaded(
    server: SglangServer, cases: list[Case], own: str, call: Callable[[SglangServer], None]
) -> None:
    """The call comes in the middle of the step that loads."""
    case = cases[len(CALLS) + CALLS.index(call)]
    store(server, [case])
    server.flush()
    ask(server, "hold_copies", kind="load")
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        try:
            answer = threads.submit(server.generate, case.prompt, len(case.tokens))
            eventually("pages are on their way", lambda: ask(server, "a_copy_is_held"))
            called = threads.submit(call, server)
        finally:
            ask(server, "let_copies_go")
        called.result(120)
        got = answer.result(120)
    if call is abort and (got.finish or {}).get("type") == "abort":
        assert tuple(got.tokens) == case.tokens[: len(got.tokens)]
    else:
        assert tuple(got.tokens) == case.tokens
        assert (got.finish or {}).get("type") == "length", got.finish
    settled(server, own)
    serve(server, [case])
