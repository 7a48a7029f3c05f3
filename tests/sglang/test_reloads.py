"""Real SGLang servers whose weights are read from files again: once those are known, they share as any other engine."""

from __future__ import annotations

import contextlib
import shutil
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file, save_file

from kvplug.identity.filehash import SETTLED_S
from tests.lab.models import LLAMA, LLAMA_OTHER, model_dir
from tests.sglang.common import Case, Control, pick, serve
from tests.sglang.test_linker import from_pool, healthy, store
from tests.sglang_lab.server import SglangServer
from tests.vllm.common import eventually

INSIDE = "tests.sglang.inside_plugin:"
AGAIN = "kvplug: the weights are known again; sharing as"
ALONE = "kvplug: the weights that were read again are not known: "
IDENTIFIED_S = 60.0
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
Boot = Callable[..., SglangServer]


class Servers(NamedTuple):
    """On one pool: *living* is the one whose weights change, *other* has :data:`LLAMA_OTHER`."""

    living: SglangServer
    peer: SglangServer
    other: SglangServer


@pytest.fixture(scope="module")
def servers(boot: Boot) -> Servers:
    started = Servers(boot("living"), boot("peer"), boot("other", model=LLAMA_OTHER))
    return Servers(*(server.ready() for server in started))


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(6, seed=121)


@pytest.fixture(scope="module")
def others(servers: Servers) -> list[Case]:
    """With the answers that the server with the other weights computes."""
    return pick(servers.other, 2, seed=122)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to read weights from, old enough to be known."""
    root = tmp_path_factory.mktemp("weights")
    made = {name: Path(shutil.copytree(model_dir(LLAMA), root / name)) for name in ("copy", "rewritten", "nothing")}
    for file in made["nothing"].glob("*.safetensors"):
        file.unlink()
    made["fewer"] = Path(shutil.copytree(model_dir(LLAMA_OTHER), root / "fewer"))
    (file,) = made["fewer"].glob("*.safetensors")
    tensors = load_file(file)
    del tensors[K_PROJ]
    save_file(tensors, file, {"format": "pt"})
    time.sleep(SETTLED_S + 0.5)
    return made


def names(server: SglangServer) -> dict[str, Any]:
    return dict(server.ask(INSIDE + "page_names"))


def key(server: SglangServer) -> str | None:
    return names(server)["key"]


def known_key(server: SglangServer) -> str:
    """Once the weights that it was started with are known."""
    return str(eventually("the weights are known", lambda: key(server)))


def update(server: SglangServer, path: Path, success: bool = True) -> None:
    """SGLang answers an update that has failed with HTTP 400."""
    with contextlib.nullcontext() if success else pytest.raises(urllib.error.HTTPError, match="400"):
        answer = server.post("/update_weights_from_disk", {"model_path": str(path)})
        assert answer["success"], answer


def back(server: SglangServer, shared: str) -> None:
    eventually("its pages are named as others' again", lambda: key(server) == shared, IDENTIFIED_S)


def settled(server: SglangServer) -> str:
    """The name once nothing is under way that could lead back."""
    eventually("nothing is being identified", lambda: not names(server)["pending"], IDENTIFIED_S)
    return str(key(server))


def came_back(server: SglangServer) -> int:
    """How often."""
    return int(names(server)["counts"].get("weights_known_again", 0))


@pytest.fixture
def living(servers: Servers) -> Iterator[SglangServer]:
    """With the weights that it was started with, and sharing, before and after."""
    server, shared = servers.living, known_key(servers.peer)
    eventually("it shares", lambda: key(server) == shared)
    yield server
    update(server, model_dir(LLAMA))
    back(server, shared)


def test_the_same_folder_again(living: SglangServer, servers: Servers, cases: list[Case], pool: str) -> None:
    """What another server has stored before the update, and what it stores after, is found; and so the other way."""
    before, after, own = cases[:3]
    shared, said = key(living), living.log.read_text().count(AGAIN)
    store(servers.peer, [before])
    update(living, model_dir(LLAMA))
    back(living, str(shared))
    assert from_pool(serve(living, [before])) == [before.whole]
    store(servers.peer, [after])
    assert from_pool(serve(living, [after])) == [after.whole]
    store(living, [own])
    assert from_pool(serve(servers.peer, [own])) == [own.whole]
    eventually("that is said once", lambda: living.log.read_text().count(AGAIN) == said + 1)
    healthy(living, pool)


def test_another_folder(
    living: SglangServer, servers: Servers, cases: list[Case], others: list[Case], folders: dict[str, Path], pool: str
) -> None:
    """A server that was started from such weights and one that has read them later have the same pages; and they have
    none of those of the weights before."""
    case, old = others[0], cases[3]
    store(servers.peer, [old])
    store(servers.other, [case])
    update(living, model_dir(LLAMA_OTHER))
    back(living, known_key(servers.other))
    assert from_pool(serve(living, [case])) == [case.whole]
    new = living.generate(old.prompt, len(old.tokens))
    assert new.cached == 0
    assert tuple(new.tokens) != old.tokens, "the other weights answer the same, so that nothing could be seen"
    store(living, [Case(old.prompt, tuple(new.tokens))])
    found = Case(old.prompt, tuple(servers.other.generate(old.prompt, len(old.tokens), cache_salt="by itself").tokens))
    assert from_pool(serve(servers.other, [found])) == [old.whole]
    update(living, folders["copy"])
    back(living, known_key(servers.peer))
    assert from_pool(serve(living, [old])) == [old.whole], "the first ones again, from another place"
    healthy(living, pool)


def test_files_that_change_before_they_are_identified(
    living: SglangServer, servers: Servers, cases: list[Case], others: list[Case], folders: dict[str, Path]
) -> None:
    """What is in memory is what was there before, which is not what lies there now."""
    store(servers.other, [others[1]])
    store(servers.peer, [cases[4]])
    living.ask(INSIDE + "hold_identification")
    try:
        update(living, folders["rewritten"])
        for file in model_dir(LLAMA_OTHER).glob("*.safetensors"):
            (folders["rewritten"] / file.name).write_bytes(file.read_bytes())
    finally:
        living.ask(INSIDE + "let_identification_go")
    assert settled(living) not in ("None", known_key(servers.peer), known_key(servers.other))
    for case in (cases[4], others[1]):
        assert living.generate(case.prompt, len(case.tokens)).cached == 0
    eventually("that is said", lambda: ALONE in living.log.read_text())


def test_a_folder_with_a_tensor_less(
    living: SglangServer, servers: Servers, cases: list[Case], folders: dict[str, Path]
) -> None:
    """SGLang keeps in memory what the files do not bring, and calls that a success."""
    store(servers.peer, [cases[5]])
    before = came_back(living)
    update(living, folders["fewer"])
    assert settled(living) not in ("None", known_key(servers.peer), known_key(servers.other))
    assert came_back(living) == before, "it goes by the folder's name, as would one that was started from it"
    assert living.generate(cases[5].prompt).cached == 0
    assert f"{ALONE}{folders['fewer']} has not the same tensors" in living.log.read_text()


def test_after_an_update_that_failed_it_stays_alone(
    boot: Boot, servers: Servers, cases: list[Case], folders: dict[str, Path]
) -> None:
    """Also once another one has not: something of the first may be left."""
    case, shared = cases[0], known_key(servers.peer)
    store(servers.peer, [case])
    server = boot("failed").ready()
    try:
        assert known_key(server) == shared
        update(server, folders["nothing"], success=False)
        assert key(server) is None, "no flush: old pages may still be on the device"
        server.flush()
        for _ in range(2):
            assert settled(server) not in ("None", shared)
            assert serve(server, [case])[0].cached == 0
            update(server, model_dir(LLAMA))
        assert "it shares with no other, until it is started again" in server.log.read_text()
    finally:
        server.close()


def sleep(server: SglangServer, *tags: str, factor: float | None = None) -> None:
    """Releases memory and resumes it; ``factor``: its weights are others by this afterwards, as if somebody else had
    written them meanwhile."""
    server.flush()
    server.post("/release_memory_occupation", {"tags": list(tags)} if tags else {})
    if factor is not None:
        server.ask(INSIDE + "scale_weights", factor=factor)
    server.post("/resume_memory_occupation", {"tags": list(tags)} if tags else {})


def test_a_sleep_costs_nothing_unless_weights_are_others_after_it(
    boot: Boot, servers: Servers, cases: list[Case], pool: str
) -> None:
    case, shared = cases[1], known_key(servers.peer)
    store(servers.peer, [case])
    server = boot("sleeper").ready()
    try:
        assert known_key(server) == shared
        for tags in ((), ("weights",), ("kv_cache", "weights"), ("kv_cache",)):
            sleep(server, *tags)
            back(server, shared)
            assert from_pool(serve(server, [case])) == [case.whole]
        sleep(server, factor=2.0)
        for _ in range(2):
            server.flush()
            assert settled(server) not in ("None", shared)
            assert server.generate(case.prompt).cached == 0
            sleep(server, factor=0.5)  # exact, but nobody knows what was computed between
        healthy(server, pool)
    finally:
        server.close()
