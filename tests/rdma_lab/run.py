"""Boots the lab's guests and runs the checks in them: `just test-rdma`.

    just test-rdma [--guests one|two] [--path tcp|ibverbs|pyverbs] [-k EXPRESSION]

Without arguments everything runs: in one guest, where both ends of the link are the same machine, then between two;
over TCP, and over verbs by each binding. A guest boots once and has one pytest run. Ends with the number that passed;
exit status 1 when one failed, or when a run did not come to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

from tests.rdma_lab.guest import Ended, Guest, Link
from tests.rdma_lab.owner import PORT

PATHS: Final = ("tcp", "ibverbs", "pyverbs")
DEADLINE_S: Final = 1800.0
"""Of one boot and all that runs in it. A guest that has not ended by then never will."""


@dataclasses.dataclass
class Tally:
    """What became of the checks."""

    passed: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)

    def add(self, what: str, ended: Ended, report: Path) -> None:
        """Count one pytest run, by how it ended and the report that it left."""
        if ended.status is None:
            self.failed.append(f"{what}: {ended.why}")
        elif ended.status not in (0, 1):  # 1: some failed, and the report names them
            self.failed.append(f"{what}: the run ended with status {ended.status}")
        if not report.exists():
            self.failed.append(f"{what}: the run left no report")
            return
        cases = list(ET.parse(report).iter("testcase"))
        bad = [case for case in cases if [child for child in case if child.tag != "system-out"]]
        self.passed += len(cases) - len(bad)
        self.failed += [f"{what}: {case.get('classname')}::{case.get('name')}" for case in bad]  # a skip is one too
        if not cases:
            self.failed.append(f"{what}: nothing was run")


def command(paths: list[str], owner: str, select: str) -> str:
    """The bash line of the guest that runs the checks."""
    return (
        f"LAB_PATHS={','.join(paths)} LAB_OWNER={owner} PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "
        "python -m pytest -p pytest_timeout -p no:cacheprovider --timeout=240 --timeout-method=signal -v --tb=short "
        "-o python_files='check_*.py' -o console_output_style=count --no-header --durations=5 "
        "--junitxml=/out/report.xml "
        f"-k {shlex.quote(select)} tests/rdma_lab/checks"
    )


def owner_command(address: str) -> str:
    """The bash line that serves the other end."""
    return f"python -u -m tests.rdma_lab.owner {address} {PORT}"


def run_one(folder: Path, paths: list[str], select: str) -> Ended:
    """Both ends in one guest."""
    script = f"{owner_command('$LAB_ADDRESS')} >/out/owner 2>&1 &\n{command(paths, '$LAB_ADDRESS', select)}"
    with Guest(folder) as guest:
        guest.start(script)
        return guest.wait(DEADLINE_S, tell=True)


def run_two(folder: Path, paths: list[str], select: str) -> Ended:
    """Each end in a guest of its own."""
    near, far = Link(folder, 1), Link(folder, 0)
    with (
        Guest(folder / "owner", link=far, cpus=1, memory="2G") as owner,
        Guest(folder, link=near, cpus=1, memory="2G") as reader,
    ):
        owner.start(owner_command(far.address))
        reader.start(command(paths, far.address, select))
        ended = reader.wait(DEADLINE_S, tell=True)
        if ended.status != 0:
            print(f"the owner's guest said: {owner.log[-3000:]}")
        return ended


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(description="Run the checks that need real RDMA verbs, in emulated machines.")
    parser.add_argument("--guests", choices=["one", "two"], action="append")
    parser.add_argument("--path", choices=PATHS, action="append")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="as pytest has it")
    parser.add_argument("--keep", type=Path, help="folder for what the guests leave, instead of a temporary one")
    arguments = parser.parse_args()
    began = time.monotonic()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="kvplug-rdma-lab-"))
    tally = Tally()
    try:
        for name in arguments.guests or ["one", "two"]:
            print(f"==== {name} guest{'s' if name == 'two' else ''}", flush=True)
            paths = arguments.path or list(PATHS)
            ended = (run_one if name == "one" else run_two)(folder / name, paths, arguments.k)
            tally.add(name, ended, folder / name / "report.xml")
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    for line in tally.failed:
        print(f"FAILED {line}")
    failed = f"{len(tally.failed)} failed, " if tally.failed else ""
    print(f"rdma lab: {failed}{tally.passed} passed in {time.monotonic() - began:.0f} s")
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
