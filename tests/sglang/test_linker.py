"""Real SGLang servers in linker mode: the pool is where SGLang's device pages go and come from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.lab.models import LLAMA, LLAMA_OTHER, model_dir
from tests.sglang.common import Case, Control, agree, serve
from tests.sglang_lab.server import PAGE, Answer, EngineError, SglangServer
from tests.vllm.common import attached, eventually

Boot = Callable[..., SglangServer]
ABORTED = 20
PAGE_NAMES = "tests.sglang.inside_plugin:page_names"


def ask(server: SglangServer, what: str, rank: int = 0, **arguments: Any) -> Any:
    return server.ask(f"tests.sglang.inside_linker:{what}", rank=rank, **arguments)


def stored(server: SglangServer, cases: Sequence[Case], *, source: str = "kv") -> None:
    """Waits until all whole pages of these prompts are in the pool, on all ranks."""
    for case in cases:
        for rank in range(server.tp):
            eventually(
                "pages are stored",
                lambda: all(ask(server, "there", rank, tokens=list(case.prompt), source=source)),  # noqa: B023
            )


def store(server: SglangServer, cases: Sequence[Case]) -> None:
    """Serves the cases and waits until all their pages are in the pool."""
    eventually("the weights are known", lambda: ask(server, "there", tokens=list(cases[0].prompt)))
    serve(server, cases)
    stored(server, cases)


def from_pool(answers: Sequence[Answer]) -> list[int]:
    """Tokens of each prompt that came from the pool: SGLang counts a linker's pages as the host's."""
    return [int(answer.details.get("host", 0)) for answer in answers]


def healthy(server: SglangServer, pool: str) -> None:
    """Nothing was kept from the engine, nothing is pinned, and the pool is in order."""
    for rank in range(server.tp):
        counts = ask(server, "counts", rank)
        assert "off" not in counts
        assert counts.get("errors", 0) == 0
        assert counts.get("load_failures", 0) == 0
    with attached(pool) as outside:
        eventually("all pins are released", lambda: outside.stats().pinned_slots == 0)
        outside.check_integrity()


@pytest.fixture(scope="module")
def pair(boot: Boot) -> dict[str, SglangServer]:
    """Two servers on one pool, booted at the same time; the second one matches all that wait before it admits one."""
    servers = {"first": boot("first"), "second": boot("second", arguments=("--schedule-policy", "lpm"))}
    return {name: server.ready() for name, server in servers.items()}


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """Each used by one test, but for the first three."""
    return control.pick(8, seed=81)


def test_cold_second_engine_and_restart_after_sigkill(
    pair: dict[str, SglangServer], cases: list[Case], pool: str
) -> None:
    some, first = cases[:3], pair["first"]
    store(first, some)
    assert ask(first, "counts").get("loaded_pages", 0) == 0
    assert from_pool(serve(pair["second"], some)) == [case.whole for case in some]
    first.kill_all()
    pair["first"] = first.again().ready()
    eventually("the weights are known", lambda: ask(pair["first"], "there", tokens=list(some[0].prompt)))
    assert from_pool(serve(pair["first"], some)) == [case.whole for case in some]
    healthy(pair["first"], pool)


def test_a_longer_prompt_takes_what_there_is_and_stores_the_rest(
    pair: dict[str, SglangServer], cases: list[Case], control: Control
) -> None:
    """And what is in the pool already is not written again."""
    case, server = cases[3], pair["first"]
    head = case.prompt[: 3 * PAGE]
    store(server, [Case(head, tuple(control.server.generate(head, 2).tokens))])
    server.flush()
    before = ask(server, "counts")
    assert from_pool(serve(server, [case])) == [3 * PAGE]
    stored(server, [case])
    after = ask(server, "counts")
    assert after["stored_pages"] - before["stored_pages"] == (len(case.prompt) + len(case.tokens) - 1) // PAGE - 3
    server.flush()
    assert from_pool(serve(server, [case])) == [case.whole]


def test_a_zeroed_page_is_a_miss(pair: dict[str, SglangServer], cases: list[Case]) -> None:
    case, server = cases[4], pair["first"]
    store(server, [case])
    assert ask(server, "zero", tokens=list(case.prompt), pages=[2]) == 1
    server.flush()
    assert from_pool(serve(server, [case])) == [2 * PAGE]
    assert ask(server, "counts")["corrupt_pages"] == 1
    stored(server, [case])
    server.flush()
    assert from_pool(serve(server, [case])) == [case.whole]


def test_many_at_once(pair: dict[str, SglangServer], cases: list[Case], pool: str) -> None:
    """Loads of several requests share a batch; both servers load and store at the same time."""
    for server in pair.values():
        server.flush()
    answers: dict[str, list[Answer]] = {}

    def run(name: str, server: SglangServer) -> None:
        answers[name] = server.generate_many([case.prompt for case in cases[:6] * 3], len(cases[0].tokens))

    threads = [threading.Thread(target=run, args=item) for item in pair.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in pair:
        agree(cases[:6] * 3, answers[name])
        assert sum(from_pool(answers[name])) > 0
    for server in pair.values():
        healthy(server, pool)


def test_what_the_device_has_by_the_time_of_the_load_is_forgotten(
    pair: dict[str, SglangServer], cases: list[Case]
) -> None:
    """More at once than run at once: what waits has its hit in the pool first, and then all of it on the device."""
    server, case = pair["second"], cases[0]
    store(pair["first"], [case])
    server.flush()
    before = ask(server, "counts").get("pins_swept", 0)
    agree([case] * ABORTED, server.generate_many([case.prompt] * ABORTED, len(case.tokens)))
    assert ask(server, "counts")["pins_swept"] > before, "all were loaded: not a test"
    eventually("no hit is left with SGLang", lambda: ask(server, "promises") == [0, 0, 0])


def test_requests_aborted_between_lookup_and_load_leave_no_pin(
    pair: dict[str, SglangServer], cases: list[Case], pool: str
) -> None:
    """Two long answers leave no room, so that further requests are looked up and wait; then all of them go away."""
    server = pair["second"]
    store(pair["first"], cases[:3])
    long = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 3000}
    prompts = [list(cases[i % 3].prompt) for i in range(ABORTED)]
    aborted = 0
    for _ in range(ABORTED):
        server.flush()
        occupants = [list(range(100 + i, 400 + i)) for i in range(2)]
        threads = [_in_background(server, occupants, long)]
        eventually("the long ones run", lambda: ask(server, "running") == 2)
        threads.append(_in_background(server, prompts, long))
        promised, markers, pinned = eventually("some wait", lambda: (p := ask(server, "promises"))[0] and p)
        assert promised <= markers
        assert pinned > 0
        aborted += promised
        server.post("/abort_request", {"abort_all": True})
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        eventually("no pin is left", lambda: ask(server, "promises") == [0, 0, 0])
        if aborted >= ABORTED:
            break
    assert aborted >= ABORTED
    server.flush()
    assert from_pool(serve(server, cases[:3])) == [case.whole for case in cases[:3]]
    healthy(server, pool)


def _in_background(server: SglangServer, prompts: list[list[int]], sampling: dict[str, Any]) -> threading.Thread:
    def post() -> None:
        with contextlib.suppress(OSError, EngineError):  # an aborted request may end in an error
            server.post("/generate", {"input_ids": prompts, "sampling_params": sampling}, timeout_s=120)

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def test_ranks_agree_when_one_ranks_pages_are_gone(boot: Boot, cases: list[Case], own_pool: str) -> None:
    """tp=2: rank 1 lacks pages that rank 0 has. What both can restore is loaded, and the answer is right."""
    some = cases[:3]
    server = boot("tp2", tp=2, pool=own_pool).ready()
    try:
        store(server, some)
        server.flush()
        assert from_pool(serve(server, some)) == [case.whole for case in some]
        for case, gone, left in zip(some, ([5], [0], [4, 5]), (5, 0, 4), strict=True):
            tokens = list(case.prompt)
            held = ask(server, "hold", rank=0, tokens=tokens)
            assert ask(server, "remove", rank=1, tokens=tokens, pages=gone) == [0] * len(gone)
            ask(server, "let_go", rank=0, slots=held)
            assert all(ask(server, "there", rank=0, tokens=tokens)), "only one rank's pages are gone"
            server.flush()
            assert from_pool(serve(server, [case])) == [left * PAGE]
        stored(server, some)
        tokens = list(some[0].prompt)
        assert ask(server, "remove", rank=1, tokens=tokens, pages=[3]) == [0]
        assert not ask(server, "there", rank=0, tokens=tokens)[3], "a page's parts go together"
        server.flush()
        assert ask(server, "zero", rank=1, tokens=list(some[1].prompt), pages=[1]) == 1
        assert from_pool(serve(server, some)) == [3 * PAGE, PAGE, some[2].whole]
        healthy(server, own_pool)
        stored(server, some)
        for method in ("_works.pins.take", "_works.loads.queue"):  # an error on one rank: none loads
            server.flush()
            server.ask("tests.sglang.inside_plugin:fail_in", rank=1, mode="linker", path=method)
            assert from_pool(serve(server, some)) == [0, 0, 0]
            server.ask("tests.sglang.inside_plugin:recover", rank=1)
        server.flush()
        assert from_pool(serve(server, some)) == [case.whole for case in some]
        eventually("nothing stays pinned", lambda: ask(server, "promises") == ask(server, "promises", 1) == [0, 0, 0])
    finally:
        server.close()


def test_fifty_requests_and_a_pool_that_is_too_small(boot: Boot, control: Control, own_pool: str) -> None:
    """Neither the device nor the pool can hold the fifteen prompts, four requests at a time: no difference, no hang."""
    few = control.pick(15, seed=82)
    server = boot("small", pool=own_pool, size="16mib", arguments=("--max-total-tokens", "3072")).ready()
    try:
        eventually("the weights are known", lambda: ask(server, "there", tokens=list(few[0].prompt)))
        order = [few[i % 5 if i % 2 else i % 15] for i in range(50)]
        for start in range(0, len(order), 4):
            batch = order[start : start + 4]
            agree(batch, server.generate_many([case.prompt for case in batch], len(few[0].tokens)))
        counts = ask(server, "counts")
        assert counts["loaded_pages"] > 0, "nothing came from the pool: not a test"
        with attached(own_pool) as outside:
            assert outside.stats().evicted_blocks > 0, "everything fitted: not a test"
        healthy(server, own_pool)
    finally:
        server.close()


def test_after_a_change_of_weights_nothing_old_is_found(
    pair: dict[str, SglangServer], cases: list[Case], control: Control, pool: str
) -> None:
    case, changed_one, other = cases[7], pair["first"], pair["second"]
    store(changed_one, [case])
    for server in (control.server, changed_one):
        assert server.post("/update_weights_from_disk", {"model_path": str(model_dir(LLAMA_OTHER))})["success"]
    try:
        control.server.flush()
        changed = Case(case.prompt, tuple(control.server.generate(case.prompt, len(case.tokens)).tokens))
        assert changed.tokens != case.tokens, "the other weights answer the same, so that nothing could be seen"
    finally:
        control.server.post("/update_weights_from_disk", {"model_path": str(model_dir(LLAMA))})
        control.server.flush()
    assert [answer.cached for answer in serve(changed_one, [changed])] == [0]
    eventually("the new weights are known", lambda: not changed_one.ask(PAGE_NAMES)["pending"])
    changed_one.flush()
    serve(changed_one, [changed])
    stored(changed_one, [changed])
    changed_one.flush()
    assert from_pool(serve(changed_one, [changed])) == [changed.whole], "pages of the new weights are found"
    other.flush()
    assert from_pool(serve(other, [case])) == [case.whole], "and none who has the old ones finds those"
    healthy(changed_one, pool)
