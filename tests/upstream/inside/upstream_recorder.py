"""A pytest plugin that writes what became of each test, line by line, so that a process that dies leaves what it did.

Runs inside other projects' test processes: imports nothing of kvplug's tests. UPSTREAM_RECORD names the file.
"""

from __future__ import annotations

import json
import os
from typing import Any


def _write(**words: Any) -> None:
    with open(os.environ["UPSTREAM_RECORD"], "a", encoding="utf-8") as file:
        file.write(json.dumps(words) + "\n")


def pytest_collection_finish(session: Any) -> None:
    """Which tests there are."""
    for item in session.items:
        _write(id=item.nodeid, outcome="not run", why="")


def pytest_collectreport(report: Any) -> None:
    """A file that can't be imported is one test that failed; one that skips itself, one that was skipped."""
    if report.outcome != "passed" and report.nodeid:
        _write(id=report.nodeid, outcome=report.outcome, why=_last_line(report))


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """A test that never ends ended the process."""
    _write(id=nodeid, outcome="crashed", why="the process ended in this test, or its time was over")


def pytest_runtest_logreport(report: Any) -> None:
    """The first phase that didn't pass says what became of a test; without one, its call."""
    if report.outcome == "passed" and report.when == "call" and hasattr(report, "wasxfail"):
        _write(id=report.nodeid, outcome="xpassed", why=report.wasxfail)
    elif report.outcome == "skipped" and hasattr(report, "wasxfail"):
        _write(id=report.nodeid, outcome="xfailed", why=report.wasxfail)
    elif report.outcome != "passed":
        outcome = "error" if report.when == "setup" and report.outcome == "failed" else report.outcome
        _write(id=report.nodeid, outcome=outcome, why=_last_line(report))
    elif report.when == "call":
        _write(id=report.nodeid, outcome="passed", why="")


def _last_line(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
    text = str(crash or report.longreprtext or "").strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:300] if lines else ""
