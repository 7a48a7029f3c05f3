"""How SGLang's plugin switches kvplug on, which hooks it sets and what they do, in every release that is supported."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.models import LLAMA, model_dir
from tests.lab.releases import releases
from tests.sglang_lab.env import MAIN, VERSIONS, base_env, installed

HERE = Path(__file__).parent
INSIDE = HERE / "sglang_inside.py"
BESIDE = HERE / "sglang_inside_beside.py"
DEADLINE_S = 300
OTHERS = [*releases(VERSIONS, "notes,applies"), (MAIN, "names,subclass")]
"""Releases, and what another plugin does to the functions that kvplug hooks (``tests/sglang_lab/other``)."""


def checks_in(*files: Path) -> list[str]:
    """The names in these files' lists of checks."""
    texts = [file.read_text().partition("CHECKS = [")[2] for file in files]
    return [name for text in texts for name in re.findall(r"^    (\w+),$", text, re.MULTILINE)]


CHECKS = checks_in(INSIDE, HERE / "sglang_inside_scheduler.py")


@functools.cache
def answers(version: str, other: str = "") -> dict[str, str]:
    """Check to "" or what went wrong, from one process that has this release of SGLang, and maybe another plugin."""
    env = {"SGLANG_OTHER": other} if other else {}
    plugins = ("kvplug", "other") if other else ("kvplug",)
    done = subprocess.run(
        [sys.executable, str(BESIDE if other else INSIDE), str(model_dir(LLAMA))],
        env=base_env(version=version, plugins=plugins, env=env),
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
@pytest.mark.parametrize("version", releases(VERSIONS))
def test_plugin(version: str, check: str) -> None:
    if not installed(version):
        pytest.skip("no SGLang here: tests/sglang_lab/install.sh .venv")
    assert answers(version)[check] == ""


@pytest.mark.engine
@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("check", checks_in(BESIDE))
@pytest.mark.parametrize(("version", "other"), OTHERS)
def test_plugin_beside_another(version: str, other: str, check: str) -> None:
    """SGLang applies hooks to a function once; whoever comes later is passed over, and nobody says so."""
    if not installed(version):
        pytest.skip("no SGLang here: tests/sglang_lab/install.sh .venv")
    assert answers(version, other)[check] == ""
