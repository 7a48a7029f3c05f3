"""For all tests: property tests are held to what they find, not to how busy the machine is; nobody's deadline pays for
compiling; what repeats others at length runs with ``--full``."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from kvplug.shm.jit import warm_up

settings.register_profile("kvplug", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("kvplug")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: also what is marked so, which takes long and repeats shorter tests."""
    parser.addoption("--full", action="store_true", help="run the tests marked full, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with the longest tests come first, so that two that run at a time end together. Without ``--full``, tests
    marked so are left out.
    """
    items.sort(key=_place)
    if config.getoption("--full"):
        return
    out = [item for item in items if item.get_closest_marker("full")]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


LONGEST_FIRST = ("sglang", "vllm", "hosts", "soak", "rdma", "stress", "pool")
"""Folders of tests; others come after these."""


def _place(item: pytest.Item) -> int:
    folder = item.path.parent.name
    return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile once, before anything with a deadline starts; processes that tests start read what this has compiled."""
    warm_up()
