"""Real SGLang servers in hicache mode: the pool behind SGLang's host cache."""

from __future__ import annotations

import dataclasses
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvplug.identity.filehash import SETTLED_S
from kvplug.identity.keys import KEY_BYTES
from tests.lab.env import core_split, temporary_pool
from tests.lab.models import LFM2, LLAMA, LLAMA_OTHER, MELLUM, MLA, ModelSpec, model_dir
from tests.lab.releases import releases
from tests.sglang.common import PROMPT_TOKENS, TOKENS, Case, Control, pick, serve
from tests.sglang_lab.env import VERSIONS, installed
from tests.sglang_lab.server import PAGE, Answer, SglangServer
from tests.vllm.common import MIN_MARGIN, attached, eventually, make_prompts

BACKEND = "/hicache/storage-backend"
KEY = "key"
CORES = "SGLANG_CPU_OMP_THREADS_BIND"
FAILING, MOST_FAILING = 50, 200
FAILURE = "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE"

Boot = Callable[..., SglangServer]


def ask(server: SglangServer, what: str, rank: int = 0, **arguments: Any) -> Any:
    return server.ask(f"tests.sglang.inside_hicache:{what}", rank=rank, **arguments)


def store(server: SglangServer, cases: Sequence[Case], ranks: int = 1) -> None:
    """Serves the cases and waits until all their pages are in the pool."""
    eventually("the weights are known", lambda: ask(server, "there", tokens=list(cases[0].prompt)))
    serve(server, cases)
    for case in cases:
        for rank in range(ranks):
            eventually("pages are stored", lambda: all(ask(server, "there", rank, tokens=list(case.prompt))))  # noqa: B023


def from_storage(answers: Sequence[Answer]) -> list[int]:
    """Tokens of each answer's prompt that came from the pool."""
    return [int(answer.details.get("storage", 0)) for answer in answers]


def idle(server: SglangServer, call: Callable[[], Any]) -> None:
    """SGLang attaches and detaches only when it has nothing left to do: asks until it is."""

    def tried() -> bool:
        try:
            call()
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            return False
        return True

    eventually("SGLang is idle", tried)


@pytest.fixture(scope="module")
def pair(boot: Boot) -> dict[str, SglangServer]:
    """Two servers on the module's pool."""
    return two(boot, "first", "second")


def two(boot: Boot, *names: str, **more: Any) -> dict[str, SglangServer]:
    """Two servers on one pool, by "first" and "second". The second one takes orders to attach and detach, which SGLang
    does for a key only."""
    servers = {
        "first": boot(names[0], mode="hicache", **more),
        "second": boot(names[1], mode="hicache", arguments=("--admin-api-key", KEY), **more),
    }
    servers["second"].headers["Authorization"] = f"Bearer {KEY}"
    return {name: server.ready() for name, server in servers.items()}


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """Eight cases, each used by one test, but for the first three."""
    return control.pick(8, seed=71)


def test_cold_second_engine_and_restart_after_sigkill(
    pair: dict[str, SglangServer], cases: list[Case], boot: Boot, pool: str
) -> None:
    some, first = cases[:3], pair["first"]
    store(first, some)
    assert ask(first, "counts").get("loaded_pages", 0) == 0
    assert from_storage(serve(pair["second"], some)) == [case.whole for case in some]
    first.kill_all()
    pair["first"] = boot("first-again", mode="hicache")
    assert from_storage(serve(pair["first"].ready(), some)) == [case.whole for case in some]
    with attached(pool) as outside:
        outside.check_integrity()


def test_short_prefix_is_worth_reading(pair: dict[str, SglangServer], control: Control) -> None:
    cases = control.pick(1, seed=74, tokens=(2 * PAGE, 3 * PAGE))
    store(pair["second"], cases)
    assert from_storage(serve(pair["first"], cases)) == [cases[0].whole]


def test_metrics_of_hits_and_stores(pair: dict[str, SglangServer], cases: list[Case]) -> None:
    first = pair["first"]
    store(first, cases[3:4])
    first.flush()
    assert from_storage(serve(first, cases[3:4])) == [cases[3].whole]
    told = ("kvplug_loaded_pages_total", "kvplug_loaded_bytes_total", "kvplug_stored_pages_total")
    numbers = eventually("kvplug's metrics", lambda: (m := first.metrics()) and all(m.get(n) for n in told) and m)
    assert numbers["kvplug_stored_pages_total"] >= cases[3].whole // PAGE
    assert numbers["kvplug_errors_total"] == 0
    assert numbers["sglang:prefetched_tokens_total"] >= cases[3].whole


def test_a_zeroed_page_is_a_miss(pair: dict[str, SglangServer], cases: list[Case]) -> None:
    case, server = cases[4], pair["first"]
    store(server, [case])
    assert ask(server, "zero", tokens=list(case.prompt), pages=[2]) == 1
    server.flush()
    assert from_storage(serve(server, [case]))[0] <= 2 * PAGE
    assert ask(server, "counts")["corrupt_pages"] == 1
    server.flush()
    eventually("the page is stored anew", lambda: all(ask(server, "there", tokens=list(case.prompt))))


def test_clearing_hides_pages_from_this_engine_only(pair: dict[str, SglangServer], cases: list[Case]) -> None:
    case, server, other = cases[5], pair["first"], pair["second"]
    store(server, [case])
    server.flush()
    server.post(f"{BACKEND}/clear")
    assert serve(server, [case])[0].cached == 0
    assert from_storage(serve(other, [case])) == [case.whole]
    eventually("pages are stored anew", lambda: all(ask(server, "there", tokens=list(case.prompt))))
    server.flush()
    assert from_storage(serve(server, [case])) == [case.whole]


def test_detached_and_attached_at_run_time(pair: dict[str, SglangServer], cases: list[Case]) -> None:
    """Attached again, it finds what it stored before; while detached, nothing; no engine is left over."""
    case, server = cases[6], pair["second"]
    store(server, [case])
    status = server.get(BACKEND)
    settings = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config_json": status["hicache_storage_backend_extra_config"],
    }
    for _ in range(2):
        idle(server, lambda: server.post(BACKEND, method="DELETE"))
        assert ask(server, "living_engines") == 0
        server.flush()
        assert serve(server, [case])[0].cached == 0
        idle(server, lambda: server.post(BACKEND, settings, method="PUT"))
        assert ask(server, "living_engines") == 1
        eventually("the weights are known", lambda: ask(server, "there", tokens=list(case.prompt)))
        server.flush()
        assert from_storage(serve(server, [case])) == [case.whole]
    assert "off" not in ask(server, "counts")


@pytest.fixture(scope="module")
def ranks(boot: Boot, cases: list[Case]) -> Iterator[SglangServer]:
    """A server with two ranks on a pool of its own, in which the first three cases are."""
    with temporary_pool("hicache-tp") as own:
        server = boot("tp2", mode="hicache", tp=2, pool=own).ready()
        store(server, cases[:3], ranks=2)
        yield server
        assert [ask(server, "counts", rank).get("errors", 0) for rank in (0, 1)] == [0, 0]
        with attached(own) as outside:
            outside.check_integrity()
        server.close()


@pytest.mark.parametrize("how", ["missing", "unreadable", "evicted"])
def test_ranks_agree_when_one_ranks_page_is_gone(ranks: SglangServer, cases: list[Case], how: str) -> None:
    """Page 5 of one rank is *missing*: they differ in what they find; *unreadable*: in what they can read; *evicted*:
    the other rank's part went along."""
    case = cases[("missing", "unreadable", "evicted").index(how)]
    tokens = list(case.prompt)
    corrupt = ask(ranks, "counts", rank=1).get("corrupt_pages", 0)
    ranks.flush()
    assert from_storage(serve(ranks, [case])) == [case.whole]
    if how == "unreadable":
        assert ask(ranks, "zero", rank=1, tokens=tokens, pages=[5]) == 1
    else:
        held = ask(ranks, "pin", rank=0, tokens=tokens, pages=[5]) if how == "missing" else 0
        assert ask(ranks, "remove", rank=1, tokens=tokens, pages=[5]) == [0]
        assert ask(ranks, "there", rank=0, tokens=tokens)[5] is (how == "missing")
        assert ask(ranks, "unpin", rank=0) == held
    ranks.flush()
    assert from_storage(serve(ranks, [case])) == [5 * PAGE]
    assert ask(ranks, "counts", rank=1).get("corrupt_pages", 0) == corrupt + (how == "unreadable")
    eventually("both ranks have it again", lambda: all(
        all(ask(ranks, "there", rank, tokens=tokens)) for rank in (0, 1)
    ))  # fmt: skip
    ranks.flush()
    assert from_storage(serve(ranks, [case])) == [case.whole]


def test_half_of_the_calls_fail_and_the_pool_is_too_small(boot: Boot, control: Control) -> None:
    """50 requests for 15 prompts that neither SGLang's caches nor the pool can hold, four at a time; and more of them
    while nothing was read, since SGLang gives up reads that are slow."""
    prompts = make_prompts(15, 72, tokens=PROMPT_TOKENS)
    with temporary_pool("hicache-small") as small:
        server = boot(
            "failing",
            mode="hicache",
            pool=small,
            size="16mib",
            env={FAILURE: "0.5"},
            arguments=("--max-total-tokens", "3072", "--hicache-ratio", "1.2"),
        ).ready()
        try:
            witness = control.server
            expected = [tuple(witness.generate(prompt, TOKENS, margin=True).tokens) for prompt in prompts]
            order = [i % len(prompts) for i in range(MOST_FAILING)]
            for start in range(0, len(order), 4):
                if start >= FAILING and ask(server, "counts").get("loaded_pages"):
                    break
                batch = order[start : start + 4]
                for i, answer in zip(batch, server.generate_many([prompts[i] for i in batch], TOKENS), strict=True):
                    assert tuple(answer.tokens) == expected[i], f"request for prompt {i}"
            counts = ask(server, "counts")
            assert counts["stored_pages"] > 0
            assert counts.get("loaded_pages", 0) > 0, "nothing came from the pool: not a test"
            assert counts.get("errors", 0) == 0
            with attached(small) as outside:
                outside.check_integrity()
        finally:
            server.close()


def test_after_a_change_of_weights_nothing_old_is_found(
    boot: Boot, own_pool: str, cases: list[Case], control: Control
) -> None:
    """Neither in an engine that was attached all the time, nor in one that was detached while its weights changed, and
    is attached again with the first one's settings. Both know the new weights by their files: they share those."""
    pair = two(boot, "attached", "detached", pool=own_pool)
    case, attached_one, detached = cases[7], pair["first"], pair["second"]
    for server in pair.values():
        store(server, [case])
        server.flush()
        assert from_storage(serve(server, [case])) == [case.whole]
    info = attached_one.get("/server_info")
    idle(detached, lambda: detached.post(BACKEND, method="DELETE"))
    other, plain = ({"model_path": str(model_dir(model))} for model in (LLAMA_OTHER, LLAMA))
    assert control.server.post("/update_weights_from_disk", other)["success"]
    try:
        new = control.server.generate(case.prompt, TOKENS, margin=True)
    finally:
        assert control.server.post("/update_weights_from_disk", plain)["success"]
    assert new.margin is not None
    assert new.margin >= MIN_MARGIN
    assert tuple(new.tokens) != case.tokens, "the other weights answer the same, so that nothing could be seen"
    changed = Case(case.prompt, tuple(new.tokens))
    time.sleep(SETTLED_S + 0.5)  # the model may have been made just now, and then its files could still change unseen
    for server in pair.values():
        assert server.post("/update_weights_from_disk", other)["success"]
    assert serve(attached_one, [changed])[0].cached == 0
    settings = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config_json": info["hicache_storage_backend_extra_config"],
    }
    idle(detached, lambda: detached.post(BACKEND, settings, method="PUT"))

    def name(server: SglangServer) -> Any:
        return server.ask("tests.sglang.inside_plugin:page_names")["key"]

    eventually("both know the new weights", lambda: name(detached) == name(attached_one) is not None)
    attached_one.flush()
    store(attached_one, [changed])
    attached_one.flush()
    detached.flush()
    for server in pair.values():
        assert from_storage(serve(server, [changed])) == [changed.whole]
        server.close()


def test_ranks_come_back_together_after_a_change_of_weights(ranks: SglangServer, cases: list[Case]) -> None:
    """Loaded anew, the same weights are the engine's own until all of its ranks know them; and the ranks' names of a
    page differ in the shard alone."""
    case, path = cases[0], {"model_path": str(model_dir(LLAMA))}

    def ask_both(what: str, **arguments: Any) -> list[Any]:
        return [ranks.ask(f"tests.sglang.inside_plugin:{what}", rank, **arguments) for rank in range(2)]

    def name() -> str:
        one, two = (str(names["key"])[: 2 * (KEY_BYTES - 2)] for names in ask_both("page_names"))
        return one if one == two else ""

    before = name()
    ranks.ask("tests.sglang.inside_plugin:hold_identification", rank=1, fail=True)
    try:
        assert ranks.post("/update_weights_from_disk", path)["success"]
        eventually("both know", lambda: not any(names["pending"] for names in ask_both("page_names")))
    finally:
        ranks.ask("tests.sglang.inside_plugin:let_identification_go", rank=1)
    assert name() not in ("", "None", before), "the second rank does not know what it has read"
    assert serve(ranks, [case])[0].cached == 0
    store(ranks, [case], ranks=2)
    ranks.flush()
    assert from_storage(serve(ranks, [case])) == [case.whole], "they find what is their own"
    assert ranks.post("/update_weights_from_disk", path)["success"]
    eventually("both are back", lambda: name() == before)
    assert from_storage(serve(ranks, [case])) == [case.whole], "what was there before the first update"


@pytest.mark.parametrize("version", releases(VERSIONS)[:-1])
def test_older_releases_store_and_hit(boot: Boot, cases: list[Case], own_pool: str, version: str) -> None:
    if not installed(version):
        pytest.skip(f"no SGLang {version} here: tests/sglang_lab/install.sh .venv")
    server = boot(version, mode="hicache", version=version, pool=own_pool).ready()
    try:
        store(server, cases[:2])
        server.flush()
        assert from_storage(serve(server, cases[:2])) == [case.whole for case in cases[:2]]
        assert ask(server, "counts").get("errors", 0) == 0
    finally:
        server.close()


@dataclasses.dataclass(frozen=True)
class Kind:
    model: ModelSpec
    tp: int = 1
    pp: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """What such a server starts with."""
        stages = {"arguments": ("--pp-size", str(self.pp)), "env": {CORES: core_split(self.pp)}} if self.pp > 1 else {}
        return {"model": self.model, "tp": self.tp, **stages}


KINDS = {
    "sliding window": Kind(MELLUM),
    "one writer for two ranks": Kind(MLA, tp=2),
    "two stages": Kind(LLAMA, pp=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_cache(boot: Boot, own_pool: str, kind: str) -> None:
    """Window pages come from a pool of their own; latent pages, alike on all ranks, are stored by one of them; each
    stage of a pipeline has its layers' part of a page."""
    made = KINDS[kind]
    server = boot(kind.replace(" ", "-"), mode="hicache", pool=own_pool, **made.arguments).ready()
    try:
        some = pick(server, 2, seed=73)  # nothing is in the pool: these are computed
        store(server, some, ranks=made.tp)
        server.flush()
        assert from_storage(serve(server, some)) == [case.whole for case in some]
        counts = [ask(server, "counts", rank) for rank in range(made.tp)]
        assert [c.get("errors", 0) for c in counts] == [0] * made.tp
        if made.model is MELLUM:
            window = ask(server, "there", tokens=list(some[0].prompt), pool="swa")
            assert any(window)
            assert not all(window), "pages before the window are not stored"
        elif made.tp == 2:
            assert counts[0]["stored_pages"] > 0
            assert counts[1].get("stored_pages", 0) == 0
            assert counts[1]["loaded_pages"] == counts[0]["loaded_pages"] > 0
        with attached(own_pool) as outside:
            outside.check_integrity()
            if made.pp == 2:
                pages = sum(len(case.prompt) // PAGE for case in some)
                assert outside.stats().sealed_blocks >= 2 * pages
    finally:
        server.close()


def test_a_model_with_recurrent_layers_takes_this_mode_by_itself(boot: Boot, own_pool: str, tmp_path: Path) -> None:
    """The linker does not take it. Its cache ends where a request did, so it is the next turn that is asked for."""
    more: dict[str, Any] = {
        "page_size": 1,
        "arguments": ("--max-total-tokens", "4096", "--hicache-storage-prefetch-policy", "wait_complete"),
    }
    witness = Control(LFM2, tmp_path / "control.log", **more | {"arguments": ("--max-total-tokens", "4096")})
    firsts = witness.pick(2, seed=79, tokens=(300, 500))
    more_words = make_prompts(2, 80, tokens=(60, 80))
    turns = [(*case.prompt, *case.tokens, *words) for case, words in zip(firsts, more_words, strict=True)]
    answers = []
    for turn in turns:
        witness.server.flush()
        answers.append(witness.server.generate(list(turn), TOKENS).tokens)
    witness.close()
    for name in ("one", "two"):
        server = boot(f"recurrent-{name}", LFM2, mode="auto", pool=own_pool, size="512mib", **more).ready()
        assert "kvplug: ON in hicache mode" in server.log.read_text()
        if name == "one":
            eventually("the weights are known", lambda: ask(server, "there", tokens=list(firsts[0].prompt)))  # noqa: B023
            serve(server, firsts)
            for case in firsts:
                eventually("it is stored", lambda: all(ask(server, "there", tokens=list(case.prompt))))  # noqa: B023
            server.flush()
        for case, turn, tokens in zip(firsts, turns, answers, strict=True):
            answer = server.generate(list(turn), TOKENS)
            assert answer.tokens == tokens
            assert from_storage([answer])[0] >= len(case.prompt)
        server.kill_all()
