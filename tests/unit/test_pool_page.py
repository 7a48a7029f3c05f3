"""docs/pool.md says what the code does: its table has every failpoint, and every name in it exists."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvplug.shm import layout, local
from kvplug.shm.failpoints import NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pool.md").read_text(encoding="utf-8")
MODULES = {path.stem for path in (ROOT / "shm").glob("*.py")}
TEST_FILE = ROOT / "tests" / "pool" / "test_dead_processes.py"
COLUMNS = ["change", "failpoint", "what a death there leaves behind", "how it is repaired", "test"]


def table() -> list[dict[str, str]]:
    """The rows of "What dies where"."""
    section = PAGE.split("## What dies where")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == COLUMNS
    assert all(len(row) == len(COLUMNS) for row in cells[2:])
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]]


def named_functions() -> list[tuple[str, str]]:
    """(module, attribute path) of everything in backticks that is written module.name, of shm/ or kvplug/."""
    found = set(re.findall(r"`([a-z_0-9]+)\.([A-Za-z_][\w.]*)`", PAGE))
    pairs = {(f"kvplug.shm.{module}", name) for module, name in found if module in MODULES}
    pairs |= {
        (f"kvplug.{module}", name) for module, name in re.findall(r"`kvplug\.([a-z_]+)\.([A-Z]\w*(?:\.\w+)?)`", PAGE)
    }
    return sorted(pairs)


def collected(path: Path) -> set[str]:
    """Node ids of the tests that pytest finds in that file."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return {line.strip() for line in run.stdout.splitlines() if "::" in line}


def test_every_failpoint_has_one_row() -> None:
    rows = [row["failpoint"].strip("`") for row in table()]
    assert sorted(rows) == sorted(NAMES)


def test_every_row_says_what_is_left_and_who_mends_it() -> None:
    assert all(all(row.values()) for row in table())


def test_every_row_names_its_own_test() -> None:
    where = TEST_FILE.relative_to(ROOT)
    assert [row["test"] for row in table()] == [
        f"`{where}::test_death_at[{row['failpoint'].strip('`')}]`" for row in table()
    ]


def test_the_rows_tests_exist() -> None:
    missing = {row["test"].strip("`") for row in table()} - collected(TEST_FILE)
    assert not missing, "\n".join(sorted(missing))


def test_a_failpoint_without_its_row_would_be_found() -> None:
    assert {row["failpoint"].strip("`") for row in table()[1:]} != set(NAMES)


@pytest.mark.parametrize(("module", "name"), named_functions(), ids=".".join)
def test_every_function_named_exists(module: str, name: str) -> None:
    thing = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(thing, part), f"{module} has no {name}"
        thing = getattr(thing, part)


def test_the_page_names_functions() -> None:
    assert len(named_functions()) > 40


def test_every_word_named_exists() -> None:
    words = set(re.findall(r"`([PHCSKREL]_[A-Z0-9_]+)`", PAGE))
    assert len(words) > 20
    missing = [w for w in words if not hasattr(local if w.startswith("L_") else layout, w)]
    assert not missing, missing


@pytest.mark.parametrize("state", ["FREE", "WRITING", "SEALED", "QUARANTINED", "SLAB_DRAINING", "CLIENT_DEAD"])
def test_the_states_that_it_draws_exist(state: str) -> None:
    assert isinstance(getattr(layout, state), int)
    assert state.rpartition("_")[2] in PAGE
