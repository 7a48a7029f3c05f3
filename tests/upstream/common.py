"""What the halves of this folder share: sources at run time, a process for each file, results beside expectations."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INSIDE = HERE / "inside"
"""Plugins that run in the other projects' test processes."""
JOBS = 2
EITHER = "either"
"""Of a test that needs a fast machine: it passes on one."""
NOT_PASSED = (EITHER, "failed", "error", "skipped", "xfailed", "xpassed", "crashed", "not run")


@dataclass(frozen=True)
class Sdist:
    """A source distribution on the package index, pinned by its digest."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    outcome: str
    why: str


@dataclass
class Expected:
    """Why some tests don't pass, and what becomes of them. ``*`` stands for anything in an entry of ``tests``."""

    why: str
    outcome: str
    tests: list[str]
    patterns: list[re.Pattern[str]] = field(init=False)

    def __post_init__(self) -> None:
        if self.outcome not in NOT_PASSED:
            raise ValueError(f"{self.outcome!r} is none of {NOT_PASSED}")
        self.patterns = [re.compile(re.escape(one).replace(r"\*", ".*")) for one in self.tests]


def kept() -> Path:
    """Where sources and models are kept between runs: beside the environment that runs this."""
    folder = Path(sys.prefix) / "upstream"
    folder.mkdir(exist_ok=True)
    return folder


def sources(sdist: Sdist) -> Path:
    """The unpacked source distribution, fetched once, by pip, which checks the digest before it unpacks anything.

    pip looks at a source distribution's metadata after it has unpacked it, for which projects like these need a
    compiler and gigabytes. What it was asked for is there by then, so how that ends does not matter.
    """
    target = kept() / f"{sdist.name}-{sdist.version}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="kvplug-upstream-") as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{sdist.name}=={sdist.version} --hash=sha256:{sdist.sha256}\n")
        options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--no-clean", "--require-hashes")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, "-d", folder]
        done = subprocess.run(
            [*command, "-r", wanted], env={**os.environ, "TMPDIR": folder}, capture_output=True, text=True, check=False
        )
        for found in sorted(Path(folder).rglob("PKG-INFO"), key=lambda path: len(path.parts)):
            if f"\nVersion: {sdist.version}\n" in found.read_text(errors="replace"):
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(found.parent, target, symlinks=True)
                return target
        archives = list(Path(folder).glob("*.tar.gz"))
        if archives:  # its metadata was to be had without building
            shutil.unpack_archive(archives[0], folder)
            shutil.copytree(next(Path(folder).glob(f"{sdist.name}-*/")), target, symlinks=True)
            return target
    raise RuntimeError(f"no sources of {sdist.name} {sdist.version}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def packages(name: str, wanted: Iterable[str]) -> Path:
    """A folder for PYTHONPATH with packages that only these tests want: the environment itself stays as it is."""
    target = kept() / f"{name}-packages"
    if not target.is_dir():
        building = target.with_suffix(f".{os.getpid()}")
        quiet = ("--disable-pip-version-check", "--quiet", "--no-deps", "--target", str(building))
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *wanted], check=True)
        building.rename(target)
    return target


def expectations(file: Path) -> list[Expected]:
    """The entries of an expectations file, ``[[expected]]`` with why, outcome and tests."""
    return [Expected(**entry) for entry in tomllib.loads(file.read_text(encoding="utf-8")).get("expected", [])]


def run_tests(
    group: str, tests: list[str], folder: Path, environment: dict[str, str], limit_s: float, *arguments: str
) -> dict[str, Outcome]:
    """Run pytest on ``tests``, files or folders of ``folder``, in a process of its own; outcomes by test.

    UPSTREAM_LOGS names a folder that keeps what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="kvplug-upstream-") as own:
        record, log = Path(own, "record"), Path(own, "log")
        record.touch()
        command = [sys.executable, "-m", "pytest", "-p", "upstream_recorder", "-p", "no:cacheprovider", "-q", *tests]
        environment = {**environment, "UPSTREAM_RECORD": str(record), "TMPDIR": own}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *arguments], cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
            with contextlib.suppress(ProcessLookupError):  # what the tests have left behind too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outcomes: dict[str, Outcome] = {}
        for line in record.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            before = outcomes.get(one["id"])
            if before is None or before.outcome in ("not run", "crashed", "passed"):
                outcomes[one["id"]] = Outcome(one["outcome"], one["why"])
        if not outcomes:
            outcomes[group] = Outcome("crashed", log.read_text(errors="replace")[-1500:])
        keep = os.environ.get("UPSTREAM_LOGS")
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            shutil.copy(log, Path(keep, f"{group}.log"))
    return outcomes


def run_groups(groups: Iterable[str], run: Callable[[str], dict[str, Outcome]]) -> dict[str, Outcome]:
    """Run several groups, JOBS at a time, with a line for each."""
    outcomes: dict[str, Outcome] = {}

    def one(group: str) -> tuple[str, dict[str, Outcome]]:
        return group, run(group)

    with ThreadPoolExecutor(JOBS) as threads:
        for group, found in threads.map(one, groups):
            passed = sum(outcome.outcome == "passed" for outcome in found.values())
            print(f"  {group}: {passed} of {len(found)} passed", flush=True)
            outcomes |= found
    return outcomes


def unexpected(outcomes: dict[str, Outcome], expected: list[Expected]) -> list[str]:
    """One line for each test that did not end as was expected, and for each expectation that no test has met."""
    lines = []
    met: set[tuple[int, int]] = set()
    for test, found in outcomes.items():
        at = {(i, j) for i, one in enumerate(expected) for j, p in enumerate(one.patterns) if p.fullmatch(test)}
        met |= at
        wanted = {expected[i].outcome for i, _ in at} or {"passed"}
        if found.outcome not in wanted and EITHER not in wanted:
            lines.append(f"{test}: {found.outcome}, expected: {' or '.join(sorted(wanted))}. {found.why}".rstrip())
    for i, one in enumerate(expected):
        lines += [
            f"{one.tests[j]}: no such test, expected: {one.outcome}" for j in range(len(one.tests)) if (i, j) not in met
        ]
    return lines


def report(name: str, outcomes: dict[str, Outcome], file: Path, files: list[str]) -> int:
    """Print what was not expected and a closing line. 0 if there is nothing of the first kind."""
    expected = [one for one in expectations(file) if any(t.startswith(f) for f in files for t in one.tests)]
    lines = unexpected(outcomes, expected)
    for line in lines:
        print(f"UNEXPECTED {line}")
    passed = sum(found.outcome == "passed" for found in outcomes.values())
    rest = len(outcomes) - passed
    print(f"{name}: {passed} passed, {rest} did not, each for a reason in {file.name}; {len(lines)} unexpected")
    return 1 if lines else 0
