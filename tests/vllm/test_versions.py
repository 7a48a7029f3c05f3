"""Every supported release runs the same short test; one that kvplug was not written for is refused and runs on."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug.engines import SUPPORTED, release
from kvplug.remote.fetcher import MISS_FOR_S
from tests.hosts.agents import OtherHost, move_blocks
from tests.lab.env import EngineError
from tests.lab.releases import outside
from tests.vllm.common import BLOCK, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess, matrix_path
from tests.vllm_lab.env import RELEASE

pytestmark = pytest.mark.skipif(RELEASE in os.environ, reason="runs every release anyway")
VERSIONS = SUPPORTED["vllm"].tested
TOO_OLD = outside("vllm")[0]


def matrix(version: str) -> str | None:
    """The version's place in the matrix; None for the one that is installed."""
    import vllm

    if vllm.__version__ == version:
        return None
    if matrix_path(version) is None:
        raise EngineError(f"vLLM {version} is not installed: tests/vllm_lab/install.sh .venv")
    return version


@pytest.fixture(scope="module")
def engines(start: Callable[..., InProcess], other_host: OtherHost) -> dict[str, InProcess]:
    """One engine per version, all at once. They share a pool, though never a block: the version is in the namespace."""
    return {version: start(version, matrix=matrix(version), env=other_host.settings) for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_each_supported_version_stores_hits_and_answers_right(
    engines: dict[str, InProcess], control: Control, pool: str, version: str
) -> None:
    cases = control.pick(make_prompts(8, 60), 6)
    engine = engines[version].ready()
    assert engine.info["version"] == version
    assert engine.info["connector"] == "KvplugConnector"
    with attached(pool) as store:
        before = store.stats().sealed_blocks
        records = engine.each(requests(cases))
        agree(cases, records)
        assert [r["external"] for r in records] == [0] * len(cases), "another version's blocks were read"
        blocks = sum(len(case.prompt) // 32 for case in cases)
        eventually("all is sealed", lambda: store.stats().sealed_blocks >= before + blocks)
    assert engine.do("reset")
    before_metrics = engine.do("metrics")
    records = engine.each(requests(cases))
    agree(cases, records)
    assert [r["external"] for r in records] == [storable(len(case.prompt)) for case in cases]
    assert engine.do("reset")
    agree(cases, engine.generate(requests(cases)))

    after = engine.do("metrics")
    hits = sum(r["external"] for r in records)
    assert (
        after["vllm:external_prefix_cache_hits_total"] - before_metrics["vllm:external_prefix_cache_hits_total"] >= hits
    )
    states = engine.do("abort_mid_load", requests=[case.request() for case in cases[:2]], delay_s=0.0)
    assert len(states) == 2
    engine.do("reset")
    agree(cases[:1], engine.each(requests(cases[:1])))
    for call, args in (("reset_prefix_cache", [True, False]), ("pause_scheduler", ["keep", True])):
        engine.do("reset")
        out = engine.do("amid", requests=requests(cases[:1]), call=call, args=args, hold="load")
        assert (out["states"], out["error"]) == (["WAITING_FOR_REMOTE_KVS"], None)
        assert out["free"] == engine.info["num_blocks"] - 1
        agree(cases[:1], engine.do("wait", names=out["names"]))
    with attached(pool) as store:
        eventually("no pin is left", lambda: store.stats().pinned_slots == 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_waking_up_changes_nothing(engines: dict[str, InProcess], control: Control, pool: str, version: str) -> None:
    """Twenty times, while a request runs. From 0.33 on the workers' layouts are told again each time."""
    done, running = [[case] for case in control.pick(make_prompts(4, 62), 2)]
    engine = engines[version].ready()
    agree(done, engine.each(requests(done)))
    names = engine.do("add", requests=requests(running))
    engine.do("step")
    first = engine.do("sleep_and_wake_up")
    assert first["told"] == (1 if release(version) >= (0, 33) else 0)
    with attached(pool) as store:
        pinned = store.stats().pinned_slots
        for _ in range(19):
            again = engine.do("sleep_and_wake_up")
            assert again.pop("threads") <= first["threads"]
            assert again == {name: value for name, value in first.items() if name != "threads"}
            assert store.stats().pinned_slots <= pinned
        agree(running, engine.do("wait", names=names))
        eventually("all is sealed", lambda: store.stats().writing_slots == 0)
    assert engine.do("reset")
    assert engine.do("free_blocks") == engine.info["num_blocks"] - 1
    records = engine.each(requests([*done, *running]))
    agree([*done, *running], records)
    assert [r["external"] for r in records] == [storable(len(case.prompt)) for case in (*done, *running)]


@pytest.fixture(scope="module")
def disguised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed vLLM in it, by links, that says it is 0.29.5."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    package = tmp_path_factory.mktemp("disguise") / "vllm"
    package.mkdir()
    for entry in Path(spec.origin).parent.iterdir():
        if entry.name not in ("_version.py", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    numbers = tuple(map(int, TOO_OLD.split(".")))
    (package / "_version.py").write_text(f"__version__ = {TOO_OLD!r}\n__version_tuple__ = {numbers}\n")
    return package.parent


@pytest.mark.parametrize("version", VERSIONS)
def test_each_supported_version_waits_for_other_hosts_and_uses_what_they_have(
    engines: dict[str, InProcess],
    control: Control,
    pool: str,
    other_host: OtherHost,
    version: str,
) -> None:
    """Its own blocks, which were moved to another host meanwhile. Then that host does not answer."""
    # Long ones: what is computed in some ten milliseconds is not worth asking another host for.
    cases = control.pick(make_prompts(6, 61, tokens=(1500, 1900)), 4)
    engine = engines[version].ready()
    agree(cases, engine.each(requests(cases)))
    with attached(pool) as store:
        eventually("all is sealed", lambda: store.stats().writing_slots == 0)
    assert move_blocks(pool, other_host.pool) > 0
    assert engine.do("reset")
    time.sleep(MISS_FOR_S)  # until when it is remembered that nobody had them
    before = engine.do("metrics")
    records = engine.each(requests(cases[:2]))
    agree(cases[:2], records)
    assert [r["external"] for r in records] == [storable(len(case.prompt)) for case in cases[:2]]
    blocks = sum(storable(len(case.prompt)) // BLOCK for case in cases[:2])
    assert engine.do("metrics")["kvplug_fetched_blocks_total"] - before["kvplug_fetched_blocks_total"] == blocks
    other_host.agent.signal(signal.SIGSTOP)
    try:
        records = engine.generate(requests(cases[2:]))
        agree(cases[2:], records)
        assert [r["external"] for r in records] == [0, 0]
    finally:
        other_host.agent.signal(signal.SIGCONT)


def test_an_unsupported_version_is_refused_with_a_line_and_runs_on(
    start: Callable[..., InProcess], control: Control, disguised: Path
) -> None:
    cases = control.pick(make_prompts(4, 61), 2)
    path = f"{disguised}:{Path(__file__).resolve().parents[2]}"
    refused = start("refused", env={"PYTHONPATH": path})
    insisted = start("insisted", env={"PYTHONPATH": path, "KVPLUG_UNSUPPORTED_ENGINE_OK": "1"})
    assert refused.ready().info["version"] == TOO_OLD
    assert refused.info["connector"] is None
    (line,) = {line.split("kvplug: ")[1] for line in refused.log_text().splitlines() if "kvplug: OFF" in line}
    assert TOO_OLD in line
    assert "KVPLUG_UNSUPPORTED_ENGINE_OK" in line
    agree(cases, refused.each(requests(cases)))
    assert insisted.ready().info["connector"] == "KvplugConnector"
    agree(cases, insisted.each(requests(cases)))
