"""The kernel for small runs, without a GPU: in Triton's interpreter through the conformance suite, and compiled.

In children, because Triton decides when it is imported whether it interprets, and because an engine on a CPU must not
find Triton beside it: install.sh puts it into a folder of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from tests.lab.env import ROOT

TRITON = os.path.join(sys.prefix, "triton")
CHILD_S = 550


def child(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with Triton."""
    assert os.path.exists(os.path.join(TRITON, ".complete")), "no Triton here: bash tests/devices/install.sh .venv"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": TRITON, **env},
        capture_output=True,
        text=True,
        timeout=CHILD_S,
        check=False,
    )


@pytest.mark.timeout(600)
def test_the_kernel_passes_the_conformance_suite() -> None:
    suite = "tests/devices/inside_interpreter.py"
    run = child("-m", "pytest", "-p", "no:cacheprovider", "-q", suite, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    said = re.search(r"(\d+) passed(?!.*(?:skipped|failed|deselected))", run.stdout)
    assert said, run.stdout[-2000:]
    assert int(said[1]) > 150, "the child did not collect the suite"


@pytest.mark.timeout(600)
def test_the_kernel_compiles_for_gpus() -> None:
    """For the chips of the last years, in every word and both directions; what comes out is never run here."""
    run = child("-m", "tests.devices.compiled_kernel")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert len(run.stdout.split()) == 3 * 4 * 2
