"""What keeps requests apart: adapters by their content, cache salts and extra keys; and that nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.models import LLAMA, LoraSpec, lora_dir
from tests.sglang.common import Case, Control, agree, serve
from tests.sglang_lab.server import Answer, SglangServer
from tests.vllm.common import eventually

LORA = ("--enable-lora", "--max-lora-rank", "8", "--lora-backend", "torch_native")
TARGETS = ("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj")
INSIDE = "tests.sglang.inside_plugin"
FIRST, SECOND = (LoraSpec(seed=seed) for seed in (1, 2))


def arguments(paths: dict[str, Path]) -> tuple[str, ...]:
    return (*LORA, *TARGETS, "--lora-paths", *(f"{name}={path}" for name, path in paths.items()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the servers find their adapters: under one name and path first this one, then that one."""
    root = tmp_path_factory.mktemp("adapters")
    out = {name: root / name for name in ("shown", "moved")}
    shutil.copytree(lora_dir(LLAMA, FIRST), out["shown"])
    shutil.copytree(lora_dir(LLAMA, FIRST), out["moved"])
    return out


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    paths = {"first": lora_dir(LLAMA, FIRST), "second": lora_dir(LLAMA, SECOND)}
    control = Control(LLAMA, tmp_path_factory.mktemp("control") / "server.log", arguments=arguments(paths))
    yield control
    control.close()


@pytest.fixture(scope="module")
def cases(witness: Control) -> dict[str, Case]:
    """One prompt, as the plain model, the first and the second adapter answer it."""
    for seed in range(40, 50):
        (plain,) = witness.pick(1, seed)
        out = {"plain": plain}
        for name in ("first", "second"):
            witness.server.flush()
            answer = witness.server.generate(plain.prompt, len(plain.tokens), margin=True, lora_path=name)
            if (answer.margin or 0.0) > 0.01:
                out[name] = Case(plain.prompt, tuple(answer.tokens))
        if len({case.tokens for case in out.values()}) == 3:
            return out
    raise AssertionError("no prompt keeps clear of a tie in all three worlds")


@pytest.fixture(scope="module")
def one(boot: Callable[..., SglangServer], folders: dict[str, Path]) -> SglangServer:
    """A server with the first adapter as "a", which has also been shown the plain model's prompt."""
    return boot("one", arguments=arguments({"a": folders["shown"]})).ready()


def ask(server: SglangServer, case: Case, **more: Any) -> Answer:
    """The right answer, computed or from the pool, and not from the device's own cache."""
    server.flush()
    answer = server.generate(case.prompt, len(case.tokens), **more)
    agree([case], [answer])
    return answer


def stored(server: SglangServer, case: Case, **more: Any) -> None:
    """Waits until this engine reads the whole prompt from the pool; before, adapters may not be identified yet."""
    eventually("the prompt is in the pool", lambda: ask(server, case, **more).cached == case.whole)


def test_adapters_are_known_by_content_not_by_name_path_or_id(
    boot: Callable[..., SglangServer], one: SglangServer, cases: dict[str, Case], folders: dict[str, Path]
) -> None:
    assert ask(one, cases["plain"]).cached == 0
    stored(one, cases["plain"])
    assert ask(one, cases["first"], lora_path="a").cached == 0, "the plain model's pages were read for an adapter"
    stored(one, cases["first"], lora_path="a")

    # Another adapter under the same name and path, after a restart; and the first one under another name.
    one.stop()
    shutil.rmtree(folders["shown"])
    shutil.copytree(lora_dir(LLAMA, SECOND), folders["shown"])
    two = boot("two", arguments=arguments({"a": folders["shown"]})).ready()
    assert ask(two, cases["second"], lora_path="a").cached == 0, "another adapter's pages were read"
    assert ask(two, cases["plain"]).cached == cases["plain"].whole
    two.post("/load_lora_adapter", {"lora_name": "b", "lora_path": str(folders["moved"])})
    eventually("the adapters are identified", lambda: two.ask(f"{INSIDE}:adapters_known"))
    assert ask(two, cases["first"], lora_path="b").cached == cases["first"].whole, "the same content, another name"
    stored(two, cases["second"], lora_path="a")

    # A name given to another adapter while the engine lives.
    two.post("/unload_lora_adapter", {"lora_name": "b"})
    shutil.rmtree(folders["moved"])
    shutil.copytree(lora_dir(LLAMA, SECOND), folders["moved"])
    two.post("/load_lora_adapter", {"lora_name": "b", "lora_path": str(folders["moved"])})
    stored(two, cases["second"], lora_path="b")

    # Nobody passes off the plain model's pages as an adapter's, by an extra key that looks like the adapter's id.
    ids = two.ask(f"{INSIDE}:adapter_ids")
    assert len(ids) == 2
    for lora_id in ids:
        assert ask(two, cases["plain"], extra_key=lora_id).cached == 0
        stored(two, cases["plain"], extra_key=lora_id)
    assert ask(two, cases["second"], lora_path="a").cached == cases["second"].whole

    # Salts and extra keys keep apart, also from each other; the same ones find what was stored.
    seen = cases["plain"]
    for more in ({"cache_salt": "s"}, {"extra_key": "s"}, {"cache_salt": "s", "extra_key": "s"}, {"cache_salt": "t"}):
        assert ask(two, seen, **more).cached == 0, more
        stored(two, seen, **more)
    assert serve(two, [seen])
