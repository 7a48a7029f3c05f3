"""Compiled kernels and an engine that looks into every module of its process."""

from __future__ import annotations

import functools
import sys
from typing import Any

from kvplug.adapters.common.hooks import put_around


def shield_compiled_modules() -> None:
    """Lets vLLM look through all modules for kernels (0.32, CPU) although numba is among them.

    It reads the ``__dict__`` of every value; llvmlite's library handle takes any name for that of a C function, also
    this one, and what comes back ends the engine. After this the handle says that it has none. Where the pool's kernels
    came compiled, nobody here has imported llvmlite, and this does not either.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    handle = getattr(ffi, "_lib_wrapper", None)
    if getattr(handle, "__getattr__", None) is not None:
        put_around(handle, "__getattr__", _without_dunders)


def _without_dunders(original: Any) -> Any:
    @functools.wraps(original)
    def function_named(self: Any, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return original(self, name)

    return function_named
