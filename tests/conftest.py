"""For all tests: property tests are held to what they find, not to how busy the machine is; nobody's deadline pays for
compiling; what repeats others at length runs with ``--full``."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, settings

from kvplug.shm.jit import warm_up

settings.register_profile("kvplug", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("kvplug")

BETWEEN = re.compile(r"::.*\[.*\b(0\.5\.21|0\.5\.22|0\.31\.\d+)\b")
"""Tests of engine releases between the oldest and the newest that are supported, by their names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: also what takes long and repeats shorter tests: the releases in between, and the soak."""
    parser.addoption("--full", action="store_true", help="run the engines' releases in between and the soak, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--full``, some are left out."""
    if config.getoption("--full"):
        return
    out = [item for item in items if BETWEEN.search(item.nodeid) or item.get_closest_marker("soak")]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile once, before anything with a deadline starts; processes that tests start read what this has compiled."""
    warm_up()
