"""A short run of the stress, and proof that it is not blind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stress.mutants import MUTANTS, ROOT

RUN = ROOT / "tests/stress/run.py"


def test_processes_may_die_anywhere_and_nothing_is_wrong_leaked_or_hung() -> None:
    done = subprocess.run(
        [sys.executable, RUN, "--kills=150"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills=150 wrong_bytes=0 leaked_slots=0 leaked_pins=0 hung=0" in done.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_still_fits_the_sources(name: str, tmp_path: Path) -> None:
    from tests.stress.mutants import build

    build(MUTANTS[name], tmp_path)
    assert MUTANTS[name].new in (tmp_path / "kvplug" / MUTANTS[name].file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["freed_on_abort"])
def test_the_run_notices_a_bug_put_in_on_purpose(name: str) -> None:
    done = subprocess.run(
        [sys.executable, RUN, f"--mutant={name}", "--kills=600"],
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"found    {name}" in done.stdout
