"""Fixtures for real engines. Booting one costs seconds of two cores, so they are shared within a module."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import agents
from tests.hosts.agents import OtherHost
from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, ModelSpec, model_dir
from tests.lab.process import LabProcess
from tests.vllm.common import Control
from tests.vllm_lab.engine import InProcess, Server

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts real engines; where there is none, the reason says how to get it."""
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(600))
            if missing:
                item.add_marker(pytest.mark.skip(reason="no vLLM here: tests/vllm_lab/install.sh .venv"))


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """The plain model in an engine without kvplug."""
    witness = Control(LLAMA, tmp_path_factory.mktemp("control") / "engine.log")
    yield witness
    witness.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    """A pool of this module's own. Engines of the module are closed before it goes."""
    with temporary_pool("vllmtest") as name:
        yield name


@pytest.fixture(scope="module")
def other_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherHost]:
    """Another host of this module's, without an engine."""
    with (
        temporary_pool("vllmaside") as name,
        agents.other_host(name, tmp_path_factory.mktemp("agent") / "agent.log") as host,
    ):
        yield host


@pytest.fixture(scope="module")
def start(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., InProcess]]:
    """``start(name, model=LLAMA, **InProcess arguments)``: boots an engine on the module's pool, without waiting."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("engines")

        def boot(name: str, model: ModelSpec = LLAMA, **arguments: Any) -> InProcess:
            arguments.setdefault("pool", pool)
            return stack.enter_context(InProcess(model_dir(model), folder / f"{name}.log", **arguments))

        yield boot


@pytest.fixture(scope="module")
def serve(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """``serve(name, model=LLAMA, **Server arguments)``: the same for ``vllm serve``."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("servers")

        def boot(name: str, model: ModelSpec = LLAMA, **arguments: Any) -> Server:
            arguments.setdefault("pool", pool)
            return stack.enter_context(Server(model_dir(model), folder / f"{name}.log", **arguments))

        yield boot


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failure shows the end of each living engine's log: the reason is often there and nowhere else."""
    report = yield
    if report.failed and HERE in item.path.parents:
        for value in getattr(item, "funcargs", {}).values():
            for engine in value.values() if isinstance(value, dict) else [value]:
                if isinstance(engine, LabProcess):
                    report.sections.append((f"log of {engine.log.name}", engine.log_tail(60)))
    return report
