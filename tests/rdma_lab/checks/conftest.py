"""What the checks in a guest have in common: which data path they are about, and the host at the other end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rdma.conftest import _hang_up, make_host  # noqa: F401
from tests.rdma_lab.far import Far

PATHS = os.environ["LAB_PATHS"].split(",")
"""tcp, and the bindings that the verbs are called by."""
OWNER = os.environ["LAB_OWNER"]
"""Address of the other end."""
IS_PAIR = os.environ["LAB_ADDRESS"] != OWNER


def pytest_configure(config: pytest.Config) -> None:
    """Names of marks."""
    config.addinivalue_line("markers", "pair: needs two guests")
    config.addinivalue_line("markers", "verbs: is about verbs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What these guests can show, and this path has."""

    def is_apt(item: Any) -> bool:
        path = item.callspec.params.get("path") if hasattr(item, "callspec") else None
        return (IS_PAIR or not item.get_closest_marker("pair")) and not (
            path == "tcp" and item.get_closest_marker("verbs")
        )

    apt = [item for item in items if is_apt(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in apt])
    items[:] = apt


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Why one failed is said at once: a guest may not live to the end of the run."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        item.config.get_terminal_writer().line(f"\n{report.longreprtext}\n{report.capstdout}{report.caplog}")


@pytest.fixture(scope="session")
def _owner() -> Far:
    far = Far(OWNER)
    far.wait()
    return far


@pytest.fixture
def far(_owner: Far) -> Iterator[Far]:
    """The host at the other end, none of a check before."""
    yield _owner
    _owner.end()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """The data path that a check is about."""
    return str(request.param)


@pytest.fixture
def settings(path: str) -> dict[str, Any]:
    """What both hosts are made with, besides their own."""
    chosen = {"data_path": "tcp"} if path == "tcp" else {"data_path": "verbs", "verbs_binding": path}
    return {"agent_pin_share": 1.0, "pin_budget_share": 1.0, "reserve_budget_share": 1.0, "size": "64mib"} | chosen
