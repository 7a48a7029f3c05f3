"""The kernel for small runs in Triton's interpreter, where there is no GPU: the whole conformance suite, in a child.

A child, because Triton decides when it is imported whether it interprets, and because an engine on a CPU must not find
Triton beside it: install.sh puts it into a folder of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from tests.vllm_lab.env import ROOT

TRITON = os.path.join(sys.prefix, "triton")
CHILD_S = 550


@pytest.mark.timeout(600)
def test_the_kernel_passes_the_conformance_suite() -> None:
    assert os.path.exists(os.path.join(TRITON, ".complete")), "no Triton here: bash tests/devices/install.sh .venv"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/devices/inside_interpreter.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": TRITON},
        capture_output=True,
        text=True,
        timeout=CHILD_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    said = re.search(r"(\d+) passed(?!.*(?:skipped|failed|deselected))", run.stdout)
    assert said, run.stdout[-2000:]
    assert int(said[1]) > 150, "the child did not collect the suite"
