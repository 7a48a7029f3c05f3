"""kvplug: one KV-cache pool per host for every LLM engine process on it.

``from kvplug import KvStore`` is the SDK; ``kvplug.errors`` has every error and result code; ``kvplug.config`` the
settings. Importing this package costs nothing: engines import it in processes that never touch a pool, so the
names below are loaded when they are first asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvplug.config import Config
    from kvplug.errors import Code, KvplugError
    from kvplug.store import KvStore

# In a checkout shm/, rdma/ and adapters/ stand beside this folder. An editable installation maps them; a Python that
# was started in the checkout, with another kvplug or none installed, finds this folder first and them only by this.
_beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(__path__[0], "shm")) and os.path.isfile(os.path.join(_beside, "shm", "__init__.py")):
    __path__.append(_beside)

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
