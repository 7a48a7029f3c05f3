"""SGLang's figures, measured in processes that have SGLang, in an environment of their own (tests/sglang_lab)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest

from bench import figures
from bench.harness import GIB, room_for
from tests.sglang_lab.env import ROOT, base_env, installed

CHILD_S = 180

pytestmark = [
    pytest.mark.skipif(not installed(), reason="no SGLang here: tests/sglang_lab/install.sh .venv"),
    pytest.mark.timeout(1800),
]


def test_lookup_of_512_pages(benchmark: Any, pool: str) -> None:
    """What the linker costs SGLang's scheduler thread when a request's prefix is matched."""
    if not room_for(GIB):
        pytest.skip("not enough memory to spare")

    def measure() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bench.sglang_lookup", pool],
            cwd=ROOT,
            env=base_env(),
            capture_output=True,
            text=True,
            timeout=CHILD_S,
            check=False,
        )

    run = benchmark.pedantic(measure, rounds=1)  # the figure is measured in the process that this starts
    assert run.returncode == 0, run.stderr[-4000:]
    times = json.loads(run.stdout.splitlines()[-1])
    again, miss = (statistics.median(times[kind]) for kind in ("again", "miss"))
    figures.record(
        "sglang",
        "sglang_lookup",
        statistics.median(times["hit"]),
        rounds=len(times["hit"]),
        note=f"asked again: {again:.3f} ms, nothing there: {miss:.3f} ms",
    )
