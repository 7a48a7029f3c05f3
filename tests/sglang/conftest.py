"""Fixtures for real SGLang servers. Booting one costs seconds of two cores, so they are shared within a module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, ModelSpec
from tests.lab.process import LabProcess
from tests.sglang.common import Control
from tests.sglang_lab.env import installed
from tests.sglang_lab.server import SglangServer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here runs in SGLang; where there is none, the reason says how to get it."""
    missing = not installed()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(600))
            if missing:
                item.add_marker(pytest.mark.skip(reason="no SGLang here: tests/sglang_lab/install.sh .venv"))


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """The plain model in a server without kvplug."""
    witness = Control(LLAMA, tmp_path_factory.mktemp("control") / "server.log")
    yield witness
    witness.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    """A pool of this module's own. Servers of the module are closed before it goes."""
    with temporary_pool("sglangtest") as name:
        yield name


@pytest.fixture
def own_pool() -> Iterator[str]:
    """A pool of one test's own."""
    with temporary_pool("sglangtest") as name:
        yield name


@pytest.fixture(scope="module")
def boot(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SglangServer]]:
    """``boot(name, model=LLAMA, **SglangServer arguments)``: starts a server on the module's pool, without waiting."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("servers")

        def start(name: str, model: ModelSpec = LLAMA, **arguments: Any) -> SglangServer:
            arguments.setdefault("pool", pool)
            return stack.enter_context(SglangServer(model, folder / f"{name}.log", **arguments))

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failure shows the end of each living server's log: the reason is often there and nowhere else."""
    report = yield
    if report.failed and HERE in item.path.parents:
        for value in getattr(item, "funcargs", {}).values():
            for server in value.values() if isinstance(value, dict) else [value]:
                if isinstance(server, LabProcess):
                    report.sections.append((f"log of {server.log.name}", server.log_tail(60)))
    return report
