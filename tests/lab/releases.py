"""Which of an engine's releases a test runs with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

__all__ = ["releases"]


def releases(versions: Sequence[str], *more: Any) -> list[Any]:
    """Parameters of a test, (version, *more): the oldest and the newest always, those in between with ``--full``."""
    between = versions[1:-1]
    return [pytest.param(v, *more, marks=[pytest.mark.full] if v in between else []) for v in versions]
