"""The pool behaves alike whoever compiled its kernels. The other tests use the library, where it could be built; here a
part of them is run with numba's, those that call kernels which only numba lets them call among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvplug.shm import native
from tests.kernels import LIBRARY_ONLY

ROOT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT_S = 900
"""Much of it is compiling, the first time."""
WITH_NUMBA = {
    "what numba alone can call": ["tests/unit/test_jit.py", "tests/unit/test_xxh3.py", "tests/unit/test_copy.py"],
    "the pool": [
        "tests/pool/test_sdk.py",
        "tests/pool/test_siblings.py",
        "tests/pool/test_slabs.py",
        "tests/pool/test_lock.py",
        "tests/pool/test_events.py",
        "tests/pool/test_forecast.py",
        "tests/pool/test_sessions.py",
    ],
    "the dead": ["tests/pool/test_dead_processes.py"],
}


@LIBRARY_ONLY
@pytest.mark.slow
@pytest.mark.timeout(RUN_TIMEOUT_S)
@pytest.mark.parametrize("what", WITH_NUMBA)
def test_with_numba_the_same_holds_for(what: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *WITH_NUMBA[what]]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, native.ENV: "numba"},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
