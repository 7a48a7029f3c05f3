"""For all tests: property tests are held to what they find, not to how busy the machine is; nobody's deadline pays for
compiling."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from kvplug.shm.jit import warm_up

settings.register_profile("kvplug", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("kvplug")


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile once, before anything with a deadline starts; processes that tests start read what this has compiled."""
    warm_up()
