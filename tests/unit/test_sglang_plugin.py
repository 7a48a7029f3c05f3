"""How SGLang's plugin switches kvplug on, which hooks it sets and what they do, in every release that is supported."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang_lab.env import VERSIONS, base_env, installed
from tests.vllm_lab.models import LLAMA, model_dir

HERE = Path(__file__).parent
INSIDE = HERE / "sglang_inside.py"
DEADLINE_S = 300
CHECKS = [
    name
    for file in (INSIDE, HERE / "sglang_inside_scheduler.py")
    for name in re.findall(r"^    (\w+),$", file.read_text().partition("CHECKS = [")[2], re.MULTILINE)
]


@functools.cache
def answers(version: str) -> dict[str, str]:
    """Check to "" or what went wrong, from one process that has this release of SGLang."""
    done = subprocess.run(
        [sys.executable, str(INSIDE), str(model_dir(LLAMA))],
        env=base_env(version=version, plugins=("kvplug",)),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


@pytest.mark.engine
@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("version", VERSIONS)
def test_plugin(version: str, check: str) -> None:
    if not installed(version):
        pytest.skip("no SGLang here: tests/sglang_lab/install.sh .venv")
    assert answers(version)[check] == ""
