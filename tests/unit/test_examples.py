"""Every program in examples/ runs as a user runs it, prints what its docstring says, and leaves no pool."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def promised(path: Path) -> str:
    """What the docstring says under "Prints:"."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    _, found, lines = text.partition("Prints:\n")
    assert found, f"the docstring of {path.name} has no 'Prints:'"
    return textwrap.dedent(lines).strip()


def run(path: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=clean | {"XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    stem = f"example-{path.stem.replace('_', '-')}-"
    before = {name for name in os.listdir("/dev/shm") if stem in name}
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == promised(path)
    assert {name for name in os.listdir("/dev/shm") if stem in name} <= before


def test_every_example_stands_in_the_folders_page() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES
    assert [path.name for path in EXAMPLES if f"| `{path.name}` |" not in page] == []


def test_an_example_that_prints_something_else_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text('"""Short.\\n\\nPrints:\\n    one\\n"""\nprint("two")\n')
    assert promised(path) == "one"
    assert run(path, tmp_path).stdout.strip() != promised(path)
