"""kvplug: one KV-cache pool per host for every LLM engine process on it.

``from kvplug import KvStore`` is the SDK; ``kvplug.errors`` has every error and result code; ``kvplug.config`` the
settings. Importing this package costs nothing: engines import it in processes that never touch a pool, so the
names below are loaded when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvplug.config import Config
    from kvplug.errors import Code, KvplugError
    from kvplug.store import KvStore

__version__ = "0.1.0"
__all__ = ["Code", "Config", "KvStore", "KvplugError", "__version__"]

_HOME = {
    "Code": "kvplug.errors",
    "Config": "kvplug.config",
    "KvStore": "kvplug.store",
    "KvplugError": "kvplug.errors",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kvplug' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
