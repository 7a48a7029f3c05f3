"""The pool's kernels as machine code that came with the package, and whether it may be used in this process.

``build.py`` makes one library for each level of a processor, from these sources, and writes their hash into it. A
library of other sources is refused: over another layout of the tables it would write wherever the old one did. Where
none fits, numba compiles the kernels as it does in a checkout. Nothing here imports numba.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import platform
from types import ModuleType
from typing import TYPE_CHECKING, Final, NamedTuple

from kvplug.errors import ConfigError

if TYPE_CHECKING:
    import logging

ENV: Final = "KVPLUG_KERNELS"
CHOICES: Final = ("auto", "native", "numba")
FOLDER: Final = pathlib.Path(__file__).parent / "native"
MODULE: Final = "kvplug.shm.kernels"
CPUINFO: Final = "/proc/cpuinfo"

_V2: Final = frozenset(["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"])
_V3: Final = _V2 | frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4: Final = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS: Final[dict[str, dict[str, frozenset[str]]]] = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2},
    "aarch64": {"armv8-a": frozenset()},
}
"""For each machine, best first: a level's name for LLVM, and what /proc/cpuinfo has to say of the processor."""


class Kernels(NamedTuple):
    """The library in use, or None where numba compiles; ``why`` says which and for what reason, for people."""

    library: ModuleType | None
    why: str


def logger() -> logging.Logger:
    """kvplug's. Late, as it takes long to import and few processes have to say a thing."""
    import logging

    return logging.getLogger("kvplug")


def sources_stamp() -> tuple[str, int]:
    """(hash, bytes) of all sources in this folder, from which kernels take functions and constants."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        text = path.read_bytes()
        size += len(text)
        digest.update(path.name.encode() + b"\0" + text)
    return digest.hexdigest(), size


def levels_here() -> list[str]:
    """Levels that this machine's processor has, best first."""
    flags: set[str] = set()
    try:
        with open(CPUINFO, encoding="utf-8", errors="replace") as file:
            for line in file:  # the first processor's are enough: the kernel takes its time for hundreds of them
                if line.startswith(("flags", "Features")):
                    flags = set(line.partition(":")[2].split())
                    break
    except OSError:
        return []
    return [name for name, needed in LEVELS.get(platform.machine(), {}).items() if needed <= flags]


def library_path(level: str) -> pathlib.Path:
    """Where the library of a level lies, if there is one."""
    machine = next(name for name, levels in LEVELS.items() if level in levels)
    return FOLDER / machine / f"{level}.abi3.so"


def load(stamp: str) -> Kernels:
    """The best library for this processor that was made of the sources with this hash."""
    why = f"there is none for {platform.machine()} in {FOLDER}"
    for level in levels_here():
        path = library_path(level)
        if not path.exists():
            continue
        try:
            loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
            spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
            assert spec is not None
            library = importlib.util.module_from_spec(spec)
            loader.exec_module(library)
        except ImportError as error:
            why = f"{path} can't be loaded: {error}"
            continue
        if stamp == library.SOURCES:
            return Kernels(library, f"{path}, made for {level}")
        why = f"{path} was made of other sources than those beside it"
    return Kernels(None, f"numba compiles them: {why}")


def choose(stamp: str) -> Kernels:
    """What ``KVPLUG_KERNELS`` asks for. ConfigError if it asks for the library and none can be used."""
    asked = os.environ.get(ENV) or CHOICES[0]
    if asked not in CHOICES:
        raise ConfigError(f"{ENV}={asked!r} is none of {', '.join(CHOICES)}")
    if asked == "numba":
        return Kernels(None, f"numba compiles them: {ENV}=numba")
    found = load(stamp)
    if found.library is None:
        if asked == "native":
            raise ConfigError(
                f"KVPLUG_KERNELS=native, but {found.why}; set it to auto, or build with `python -m kvplug.shm.build`"
            )
        if any(library_path(level).exists() for level in levels_here()):
            logger().warning("the pool's compiled library is not used; %s", found.why)
    return found
