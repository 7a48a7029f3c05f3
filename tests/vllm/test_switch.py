"""What switches kvplug on and off, and that an engine always runs: with kvplug, or without it and saying why."""

from __future__ import annotations

import dataclasses
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvplug.shm.segment import lock_path, segment_path
from tests.lab.models import HRM_TEXT
from tests.vllm.common import Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess

OWN = {"kv_connector": "KvplugConnector", "kv_role": "kv_both"}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """An engine's circumstances, and what must come of them."""

    name: str
    line: str
    """Words of the one line that says it."""
    on: bool = False
    connector: str | None = "KvplugConnector"
    env: tuple[tuple[str, str | None], ...] = ()
    transfer: tuple[tuple[str, Any], ...] = ()
    inside: Sequence[str] = ()
    """A command that the engine is started in."""
    size: str = "64mib"


def _private_shm(options: str) -> tuple[str, ...]:
    """A mount namespace of its own with another /dev/shm."""
    mount = f'mount -t tmpfs -o {options} none /dev/shm && exec "$0" "$@"'
    return ("unshare", "-r", "-m", "sh", "-c", mount)


SCENARIOS = (
    Scenario("users-own-configuration", "kvplug: ON", on=True, transfer=tuple(OWN.items())),
    Scenario(
        "users-own-configuration-no-plugin-named",
        "kvplug: ON",
        on=True,
        transfer=tuple(OWN.items()),
        env=(("VLLM_PLUGINS", None),),
    ),
    Scenario(
        "another-connector",
        "ExampleConnector",
        connector="ExampleConnector",
        transfer=(("kv_connector", "ExampleConnector"), ("kv_role", "kv_both")),
    ),
    Scenario("installed-but-not-named", "", connector=None, env=(("VLLM_PLUGINS", None),)),
    Scenario("shm-too-small", "OFF", inside=_private_shm("size=1m")),
    Scenario("pool-larger-than-shm", "OFF", size="900tb", env=(("KVPLUG_POOL", "huge"),)),
    Scenario("garbage-under-the-pools-name", "OFF", env=(("KVPLUG_POOL", "garbage"),)),
    Scenario("pool-that-cannot-be-opened", "OFF", env=(("KVPLUG_POOL", "blocked"),)),
    Scenario("unknown-setting", "KVPLUG_SISE", connector=None, env=(("KVPLUG_SISE", "1gb"),)),
    Scenario("malformed-setting", "banana", connector=None, env=(("KVPLUG_SIZE", "banana"),)),
)
AHEAD = 3
"""Engines that boot while a test looks at one."""


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(6, 62), 4)


@pytest.fixture(scope="module")
def names(pool: str) -> Iterator[dict[str, str]]:
    """Pool names of their own: under one nothing lies, under one random bytes, under one folders instead of files.

    (Root may open anything, so that a folder is the way to be refused that holds for every user.)
    """
    out = {name: f"{pool}.{name}" for name in ("garbage", "blocked", "huge")}
    Path(segment_path(out["garbage"])).write_bytes(random.Random(1).randbytes(1 << 20))
    folders = [Path(segment_path(out["blocked"])), Path(lock_path(out["blocked"]))]
    for folder in folders:
        folder.mkdir()
    yield out
    for folder in folders:
        folder.rmdir()


@pytest.fixture(scope="module")
def engine_for(
    start: Callable[..., InProcess], names: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Scenario], InProcess]]:
    started: dict[str, InProcess] = {}

    def boot(scenario: Scenario) -> InProcess:
        arguments: dict[str, Any] = {}
        if scenario.transfer:
            transfer = dict(scenario.transfer)
            if scenario.connector == "ExampleConnector":
                folder = str(tmp_path_factory.mktemp("example"))
                transfer["kv_connector_extra_config"] = {"shared_storage_path": folder}
            arguments["kv_transfer_config"] = transfer
        env = {name: names.get(value or "", value) for name, value in scenario.env}
        return start(scenario.name, size=scenario.size, env=env, inside=scenario.inside, **arguments)

    def get(scenario: Scenario) -> InProcess:
        at = SCENARIOS.index(scenario)
        for s in SCENARIOS[at : at + AHEAD]:
            if s.name not in started and (not s.inside or _may_unshare()):
                started[s.name] = boot(s)
        return started[scenario.name].ready()

    yield get
    for engine in started.values():
        engine.close()


def _may_unshare() -> bool:
    return subprocess.run([*_private_shm("size=1m"), "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_engine_runs_and_says_how(
    engine_for: Callable[[Scenario], InProcess], cases: list[Case], scenario: Scenario
) -> None:
    if scenario.inside and not _may_unshare():
        pytest.skip("this system does not let a user make a mount namespace")
    engine = engine_for(scenario)
    assert engine.info["connector"] == scenario.connector
    records = engine.each(requests(cases))
    agree(cases, records)
    lines = {line.split("kvplug: ", 1)[1] for line in engine.log_text().splitlines() if "kvplug: O" in line}
    if scenario.line:
        assert len(lines) == 1, f"one line, said once, not {lines}"
        assert scenario.line in engine.log_text()
        assert lines.pop().startswith("ON" if scenario.on else "OFF")
    else:
        assert "kvplug:" not in engine.log_text()
    if scenario.connector == "ExampleConnector":
        engine.close()
        return
    assert engine.do("reset")
    again = engine.each(requests(cases))
    agree(cases, again)
    expected = [storable(len(case.prompt)) if scenario.on else 0 for case in cases]
    assert [r["external"] for r in again] == expected
    engine.close()


def test_as_one_of_several_connectors_it_stays_out_of_the_others_way(
    start: Callable[..., InProcess], cases: list[Case]
) -> None:
    """A load that fails is dealt with as the others' configuration says, and their loads are nothing of kvplug's."""
    other = {
        "kv_connector": "LatecomerConnector",
        "kv_connector_module_path": "tests.vllm_lab.latecomer",
        "kv_role": "kv_both",
    }
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [OWN, other]},
    }
    engine = start("one-of-several", kv_transfer_config=transfer).ready()
    for _ in range(2):
        agree(cases, engine.each(requests(cases), timeout_s=30.0))
        assert engine.do("reset")
    assert engine.do("metrics").get("vllm:external_prefix_cache_hits_total", 0.0) > 0, "the other one loads"
    assert "kvplug: OFF: KvplugConnector is one of several KV connectors" in engine.log_text()
    assert "kvplug: ON" not in engine.log_text()
    engine.close()


def test_a_model_whose_prompts_attend_to_later_tokens_is_refused(
    start: Callable[..., InProcess], tmp_path: Path
) -> None:
    """The same tokens in front of others have another KV there, so that a hit would be wrong."""
    limits = {"max_model_len": 512}
    witness = Control(HRM_TEXT, tmp_path / "control.log", **limits)
    engine = start("prefix-lm", HRM_TEXT, **limits)
    try:
        prompts = witness.pick(make_prompts(6, 63, tokens=(250, 300), shared=200), 4)
    finally:
        witness.close()
    records = engine.each(requests(prompts))
    agree(prompts, records)
    assert [record["external"] for record in records] == [0] * len(prompts)
    assert "kvplug: OFF: rank (0, 0): cache group 0 attends to later tokens" in engine.log_text()
    engine.close()


def test_a_producer_stores_and_reads_nothing_and_a_consumer_reads_and_stores_nothing(
    start: Callable[..., InProcess], control: Control, pool: str
) -> None:
    engines = {
        role: start(role, size="64mib", kv_transfer_config={**OWN, "kv_role": role})
        for role in ("kv_producer", "kv_consumer")
    }
    producer, consumer = engines["kv_producer"], engines["kv_consumer"]
    mine, theirs = (control.pick(make_prompts(4, seed), 2) for seed in (64, 65))
    hits = {}
    for role, engine, cases in (("kv_producer", producer, mine), ("kv_consumer", consumer, theirs)):
        for attempt in range(2):
            records = engine.ready().each(requests(cases))
            agree(cases, records)
            hits[role, attempt] = sum(record["external"] for record in records)
            with attached(pool) as store:
                eventually("what was begun is stored", lambda store=store: store.stats().writing_slots == 0)
            assert engine.do("reset")
        assert f"kv_role is {role}" in engine.log_text()
    assert set(hits.values()) == {0}, hits
    records = consumer.each(requests(mine))
    agree(mine, records)
    assert [r["external"] for r in records] == [storable(len(case.prompt)) for case in mine]
    for engine in engines.values():
        engine.close()
