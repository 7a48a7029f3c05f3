"""Stand-ins for what SGLang imports on a machine without an accelerator, and never calls there.

``sgl_kernel`` is built for CUDA only, ``triton`` weighs a gigabyte, and the rest serves images, sound and notebooks. A
stand-in has every name that is asked of it. What such a name stands for can be declared with (a decorator, a base
class, a member of an enumeration), and says which one it was when something would have to be computed with it.

A package that is really installed is left alone.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

PACKAGES = frozenset(
    {"sgl_kernel", "triton", "torchvision", "IPython", "gguf", "soundfile", "zstandard", "easydict", "openai_harmony"}
)
"""What is stood in for. ``sgl_kernel`` says the version that SGLang asks for."""

VERSIONS = {"sgl_kernel": "0.4.10", "triton": "3.9.0", "torchvision": "0.29.2"}


class NotHere(NotImplementedError):
    """Something was called that a stand-in only has the name of."""


class _Kind(type):
    """The type of a stand-in's names: they have names of their own, compare by identity, and can't be made."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _named(f"{cls.__module__}.{cls.__qualname__}", name)
        setattr(cls, name, found)
        return found

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not _Absent and not hasattr(cls, "_stands_in"):  # a class of the engine's that is based on a name
            return super().__call__(*args, **kwargs)
        raise NotHere(f"{cls.__module__}.{cls.__qualname__} is not on this machine: a stand-in has its name only")


class _Absent(metaclass=_Kind):
    """What every name of a stand-in is, unless it is one of :data:`_DECLARING`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()


def _named(module: str, name: str) -> Any:
    made = types.new_class(name, (_Absent,), {}, lambda body: body.update(_stands_in=True))
    made.__module__ = module
    return made


class _Kernel:
    """A kernel that was declared: it can't be launched."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotHere(f"the kernel {self.__name__} can't run on this machine")


def _jit(function: Any = None, **options: Any) -> Any:
    return _Kernel(function) if function is not None else _Kernel


def _decorating(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda kernel: kernel


class _Value:
    """A declared value: triton's Config and constexpr."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


_DECLARING: dict[str, dict[str, Any]] = {
    "triton": {
        "jit": _jit,
        "autotune": _decorating,
        "heuristics": _decorating,
        "Config": _Value,
        "cdiv": lambda x, y: -(-x // y),
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
    },
    "triton.language": {"constexpr": _Value},
}


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _DECLARING.get(self.__name__, {}).get(name) or _named(self.__name__, name)
        setattr(self, name, found)
        return found


class _Finder:
    """Comes last on ``sys.meta_path``: it is asked for what nobody else has found."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = fullname.split(".", 1)[0]
        if top not in PACKAGES or (top != fullname and not isinstance(sys.modules.get(top), _StandIn)):
            return None
        if fullname == "triton.knobs":  # SGLang hangs listeners on it, and does without where it is missing
            return None
        if fullname == "triton" and not _torch_has_looked():
            return None
        return importlib.machinery.ModuleSpec(fullname, _Finder, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        if spec.name in VERSIONS:
            module.__version__ = VERSIONS[spec.name]  # type: ignore[attr-defined]
        return module

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        """Nothing: names come when they are asked for."""


_looking = False


def _torch_has_looked() -> bool:
    """Lets torch find out that there is no triton, which it remembers: it would compile with a stand-in."""
    global _looking
    if _looking:
        return False
    _looking = True
    try:
        from torch._inductor.runtime import triton_compat, triton_heuristics  # noqa: F401
        from torch.utils import _triton

        _triton.has_triton_package()
    finally:
        _looking = False
    return True


def install() -> None:
    """Puts the stand-ins where Python looks for modules; once."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)  # type: ignore[arg-type]
