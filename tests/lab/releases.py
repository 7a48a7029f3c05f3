"""Which of an engine's releases a test runs with, and which are none of kvplug's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvplug.engines import SUPPORTED

__all__ = ["outside", "releases"]


def releases(versions: Sequence[str], *more: Any) -> list[Any]:
    """Parameters of a test, (version, *more): the oldest and the newest always, those in between with ``--full``."""
    between = versions[1:-1]
    return [pytest.param(v, *more, marks=[pytest.mark.full] if v in between else []) for v in versions]


def outside(engine: str) -> tuple[str, str]:
    """A version just before the first supported release of an engine, and the one just after the newest."""
    table = SUPPORTED[engine]
    before = (
        (*table.first[:-1], table.first[-1] - 1, 5) if table.numbers < 3 else (*table.first[:-1], table.first[-1] - 1)
    )
    after = (*table.end, 0) if table.numbers < 3 else table.end
    return ".".join(map(str, before)), ".".join(map(str, after))
