"""mypy, strict, over everything that is installed, from the checkout itself.

The links in ``kvplug/`` put the packages where ``import kvplug.shm`` looks for them, so no tool has to be told of
setuptools' package-dir. Run as a script it prints mypy's report; the tests call :func:`check`. Engines have no stubs:
what comes from them is Any, in the adapters too (pyproject.toml).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("shm", "rdma", "adapters")
"""Folders of the root that a link in ``kvplug/`` puts where they are imported from."""


def check() -> tuple[int, str]:
    """mypy's exit status and its report."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", "-p", "kvplug"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


if __name__ == "__main__":
    status, text = check()
    print(text, end="")
    sys.exit(status)
