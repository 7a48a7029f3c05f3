"""Servers that are started as a user starts them, not forked: the supported release, and one that is not supported.

The older releases have their turn in ``test_hicache.py``, and each one's plugin in ``unit/test_sglang_plugin.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.releases import outside
from tests.sglang.common import Control, serve
from tests.sglang_lab.env import base_env
from tests.sglang_lab.server import PAGE, SglangServer
from tests.vllm.common import attached, eventually

TOO_OLD = outside("sglang")[0]
Boot = Callable[..., SglangServer]


@pytest.fixture(scope="module")
def disguise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which the installed SGLang says that it is older than what kvplug supports."""
    folder = tmp_path_factory.mktemp("disguise")
    metadata = folder / f"sglang-{TOO_OLD}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {TOO_OLD}\n")
    return os.pathsep.join([str(folder), base_env()["PYTHONPATH"]])


@pytest.fixture(scope="module")
def servers(boot: Boot, disguise: str) -> dict[str, SglangServer]:
    """Started cold, at the same time."""
    return {
        "plain": boot("plain", mode="auto", cold=True),
        "refused": boot("refused", mode="auto", env={"PYTHONPATH": disguise}),
    }


def off_lines(log: Path) -> set[str]:
    return {line.split("kvplug: ", 1)[1] for line in log.read_text().splitlines() if "kvplug: OFF" in line}


def test_started_cold_it_stores_and_hits(servers: dict[str, SglangServer], control: Control, pool: str) -> None:
    server = servers["plain"].ready()
    assert not off_lines(server.log)
    cases = control.pick(2, seed=61)
    with attached(pool) as store:

        def all_stored() -> bool:
            server.flush()
            serve(server, cases)
            return bool(store.stats().sealed_blocks >= sum(case.whole // PAGE for case in cases))

        eventually("the pages are in the pool", all_stored)
    server.flush()
    assert [answer.cached for answer in serve(server, cases)] == [case.whole for case in cases]


def test_an_unsupported_release_is_refused_with_a_line_and_runs_on(
    servers: dict[str, SglangServer], control: Control
) -> None:
    server = servers["refused"].ready()
    (line,) = off_lines(server.log)
    assert TOO_OLD in line
    assert "KVPLUG_UNSUPPORTED_ENGINE_OK" in line
    cases = control.pick(2, seed=62)
    assert [answer.cached for answer in serve(server, cases)] == [0, 0]
    server.flush()
    assert [answer.cached for answer in serve(server, cases)] == [0, 0]
