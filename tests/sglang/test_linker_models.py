"""Linker mode with other kinds of caches: sliding windows in a pool of their own, latent attention on two ranks.

What must be answered is what the same server answered before anything could be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.lab.models import MELLUM, MLA
from tests.sglang.common import Case, pick, serve
from tests.sglang.test_linker import ask, from_pool, healthy, stored
from tests.sglang_lab.server import PAGE, SglangServer
from tests.vllm.common import eventually

Boot = Callable[..., SglangServer]


@pytest.fixture(scope="module")
def servers(boot: Boot) -> dict[str, SglangServer]:
    """A model with sliding windows, and one with latent attention on two ranks; on one pool, booted together."""
    both = {"windows": boot("windows", MELLUM), "latent": boot("latent", MLA, tp=2)}
    return {name: server.ready() for name, server in both.items()}


def known(server: SglangServer, count: int, seed: int) -> list[Case]:
    """Cases that the server has computed itself, and stored."""
    eventually("the weights are known", lambda: ask(server, "there", tokens=list(range(PAGE))))
    cases = pick(server, count, seed)
    stored(server, cases)
    server.flush()
    return cases


def in_pool(server: SglangServer, case: Case, source: str) -> list[bool]:
    answer: list[bool] = ask(server, "there", tokens=list(case.prompt), source=source)
    return answer


def test_sliding_windows_come_back_where_they_were_kept(servers: dict[str, SglangServer], pool: str) -> None:
    """SGLang keeps the windowed layers' pages at the ends of what it has computed; only there a prefix is restored."""
    server = servers["windows"]
    assert ask(server, "sources") == ["kv", "swa"]
    cases = known(server, 5, seed=91)
    for case in cases:
        assert all(in_pool(server, case, "kv"))
        assert 0 < sum(in_pool(server, case, "swa")) < len(in_pool(server, case, "kv")), "no sparse pool: not a test"
    assert from_pool(serve(server, cases[:2])) == [case.whole for case in cases[:2]]
    one, other, third = cases[2:]
    assert ask(server, "remove", tokens=list(one.prompt), pages=[last_of(one)], source="swa") == [0]
    assert from_pool(serve(server, [one])) == [0], "without the window the other layers' pages are worth nothing"
    assert ask(server, "zero", tokens=list(other.prompt), pages=[last_of(other)], source="swa") == 1
    assert from_pool(serve(server, [other])) == [0]
    assert ask(server, "counts")["corrupt_pages"] == 1
    assert ask(server, "zero", tokens=list(third.prompt), pages=[0]) == 1
    assert from_pool(serve(server, [third])) == [0]
    for case in cases:
        eventually("the windows are stored again", lambda: in_pool(server, case, "swa")[last_of(case)])  # noqa: B023
    stored(server, cases)
    server.flush()
    assert from_pool(serve(server, cases)) == [case.whole for case in cases]
    healthy(server, pool)


def last_of(case: Case) -> int:
    """Number of the last page that can be had."""
    return case.whole // PAGE - 1


def test_latent_attention_is_stored_once_and_read_by_all_ranks(servers: dict[str, SglangServer], pool: str) -> None:
    server = servers["latent"]
    cases = known(server, 3, seed=92)
    assert from_pool(serve(server, cases)) == [case.whole for case in cases]
    ranks = [ask(server, "counts", rank) for rank in range(2)]
    assert ranks[0]["stored_pages"] > 0
    assert "stored_pages" not in ranks[1]
    assert ranks[0]["loaded_pages"] == ranks[1]["loaded_pages"] > 0
    assert ask(server, "remove", rank=1, tokens=list(cases[0].prompt), pages=[2]) == [0]
    server.flush()
    assert from_pool(serve(server, cases[:1])) == [2 * PAGE]
    healthy(server, pool)


def test_what_one_model_stored_the_other_does_not_find(servers: dict[str, SglangServer]) -> None:
    prompts: Sequence[Any] = [case.prompt for case in pick(servers["windows"], 1, seed=93)]
    eventually("it is stored", lambda: all(ask(servers["windows"], "there", tokens=list(prompts[0]))))
    assert not any(ask(servers["latent"], "there", tokens=list(prompts[0])))
