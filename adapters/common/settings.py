"""Settings of an engine as text, for the namespace: the same for equal settings, in whichever process."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def as_text(value: Any) -> str:
    """JSON with sorted keys. What JSON does not have is told by its ``repr``; of an object that has none of its own,
    that is its address, which no other process has: two engines never meet by what is not known of them."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(as_text(item) for item in value)
    if isinstance(value, type) or callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
    return str(value) if isinstance(value, PurePath) else repr(value)
