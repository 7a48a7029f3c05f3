"""The storage backend between SGLang's real host pools, of every kind and layout, and a real pool. No engine runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.env import temporary_pool
from tests.sglang_lab.env import ROOT, base_env

CHILD = "tests.sglang.host_pool_checks"
CHILD_S = 240
LAYOUTS = {
    "mha": ("layer_first", "page_first", "page_first_direct", "page_head"),
    "wide values": ("page_first", "page_first_direct"),
    "mla": ("layer_first", "page_first", "page_first_direct"),
    "mamba": ("page_first", "page_first_direct"),
    "paged": ("layer_first", "page_first", "page_first_direct"),
}


def functions() -> list[str]:
    """Names of the checks that stand in the child's source, which this process, without SGLang, can't import."""
    tree = ast.parse(Path(__file__).with_name("host_pool_checks.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name not in ("carried", "main")]


CHECKS = [*(f"carried: {kind} {layout}" for kind, layouts in LAYOUTS.items() for layout in layouts), *functions()]


@pytest.fixture(scope="module")
def answers() -> dict[str, str | None]:
    """What the child says: check to what went wrong."""
    with temporary_pool("hostpools") as pool:
        run = subprocess.run(
            [sys.executable, "-m", CHILD, pool],
            cwd=ROOT,
            env=base_env(),
            capture_output=True,
            text=True,
            timeout=CHILD_S,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"check"')]
    return {line["check"]: line["wrong"] for line in lines}


@pytest.mark.parametrize("check", CHECKS)
def test_host_pools(answers: dict[str, str | None], check: str) -> None:
    assert check in answers, f"{check} did not run"
    assert answers[check] is None, answers[check]


def test_every_check_of_the_child_is_asked_for(answers: dict[str, str | None]) -> None:
    assert set(answers) == set(CHECKS)
