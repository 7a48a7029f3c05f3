"""Three hosts on one machine. Everything here starts real engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.net import Network, cannot

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks, and the reason where there is no engine."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(900))
            if importlib.util.find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="no vLLM here: tests/vllm_lab/install.sh .venv"))


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Three hosts on a switch."""
    reason = cannot()
    if reason is not None:
        pytest.skip(reason)
    made = Network(3)
    yield made
    made.close()
