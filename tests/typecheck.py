"""mypy, strict, over kvplug, shm and rdma under the names that they are installed with.

mypy follows folders and knows nothing of setuptools' package-dir. So it gets a tree of links, made for the run, in
which ``kvplug/shm`` is where ``import kvplug.shm`` would find it. Run as a script it prints mypy's report; the tests
call :func:`check`. Paths in the report are those of the checkout.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("shm", "rdma")
"""Folders that are installed below kvplug. The adapters are left out: they subclass engines that have no stubs."""


def check() -> tuple[int, str]:
    """mypy's exit status and its report."""
    with tempfile.TemporaryDirectory(prefix="kvplug-types-") as folder:
        package = Path(folder) / "kvplug"
        package.mkdir()
        for entry in (ROOT / "kvplug").iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        for name in BESIDE:
            (package / name).symlink_to(ROOT / name)
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "mypy",
                f"--config-file={ROOT / 'pyproject.toml'}",
                f"--cache-dir={ROOT / '.mypy_cache'}",
                "-p",
                "kvplug",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    report = re.sub(rf"^kvplug/({'|'.join(BESIDE)})/", r"\1/", run.stdout + run.stderr, flags=re.MULTILINE)
    return run.returncode, report


if __name__ == "__main__":
    status, text = check()
    print(text, end="")
    sys.exit(status)
