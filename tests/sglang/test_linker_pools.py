"""The linker between SGLang's real device pools, of every kind that it takes, and a real pool. No engine runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.env import temporary_pool
from tests.sglang_lab.env import ROOT, base_env

CHILD = "tests.sglang.device_pool_checks"
CHILD_S = 240
KINDS = (
    "mha",
    "mha, values of another width",
    "mha, heads before tokens",
    "mha, bytes",
    "mha, second stage",
    "mha, a token a page",
    "mla, a token a page",
    "mla",
    "sliding window",
    "mla with states",
)


def functions() -> list[str]:
    """Names of the checks in the child's source, which this process, without SGLang, can't import: without arguments
    and without an answer."""
    tree = ast.parse(Path(__file__).with_name("device_pool_checks.py").read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.args.args
        and ast.unparse(node.returns or ast.Name("")) == "None"
        and node.name != "main"
    ]


CHECKS = [*(f"carried: {kind}" for kind in KINDS), *functions()]


@pytest.fixture(scope="module")
def answers() -> dict[str, str | None]:
    """What the child says: check to what went wrong."""
    with temporary_pool("devicepools") as pool:
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
def test_device_pools(answers: dict[str, str | None], check: str) -> None:
    assert check in answers, f"{check} did not run"
    assert answers[check] is None, answers[check]


def test_every_check_of_the_child_is_asked_for(answers: dict[str, str | None]) -> None:
    assert set(answers) == set(CHECKS)
