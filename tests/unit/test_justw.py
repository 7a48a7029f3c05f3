"""`justw` needs a Python and nothing else, and says what to install where even that is not enough."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JUST = Path(sys.executable).parent / "just"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the wrapper beside a Justfile with one recipe that says where it runs."""
    folder = tmp_path / "check out"  # with a blank, as people have it
    folder.mkdir()
    shutil.copy(ROOT / "justw", folder)
    (folder / "Justfile").write_text("where *ARGS:\n    @pwd; echo {{ ARGS }}\n")
    return folder


def run(checkout: Path, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout), **variables}
    return subprocess.run(
        [checkout / "justw", *arguments],
        cwd=cwd or checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def a_python(folder: Path, body: str) -> str:
    path = folder / "a-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_recipes_run_in_the_checkout_from_any_folder(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / "bin" / "just").symlink_to(JUST)
    done = run(checkout, "where", "--kills", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(checkout), "--kills 7"]
    assert done.stderr == "", "nothing to say when everything is there"


def test_without_a_fitting_python_it_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run(checkout, "where", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "no Python 3.10 to 3.13 found" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_of_another_version_is_refused(checkout: Path) -> None:
    done = run(checkout, "where", PYTHON=a_python(checkout, "exit 1"))
    assert done.returncode == 1
    assert "is not a Python 3.10 to 3.13" in done.stderr


def test_a_python_that_cannot_make_environments_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    """Debian without python3-venv and without pip."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for module in ("ensurepip", "venv", "virtualenv", "pip"):
        (broken / f"{module}.py").write_text("raise ImportError('not in this Python')\n")
    python = a_python(checkout, f"PYTHONPATH='{broken}' exec '{sys.executable}' \"$@\"")
    done = run(checkout, "where", PYTHON=python)
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr
    assert not (checkout / ".venv").exists(), "half an environment would be taken for a whole one"


def test_an_environment_whose_python_is_gone_is_named(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to("/nonexistent/python3")
    done = run(checkout, "where")
    assert done.returncode == 1
    assert "remove it and start this command again" in done.stderr


def test_the_recipes_that_the_readme_names_are_there() -> None:
    listed = subprocess.run(
        [JUST, "--justfile", ROOT / "Justfile", "--summary"], capture_output=True, text=True, check=True, timeout=60
    )
    assert {"setup", "test", "test-fast", "demo", "bench", "stress", "lint", "fmt"} <= set(listed.stdout.split())


def test_the_demo_installs_one_version_and_the_tests_the_rest(tmp_path: Path) -> None:
    """Whatever comes first: each has what it needs, and nothing is installed twice."""
    folder = tmp_path / "checkout"
    calls = folder / "calls"
    for lab in ("vllm", "sglang"):
        (folder / "tests" / f"{lab}_lab").mkdir(parents=True)
        (folder / "tests" / f"{lab}_lab" / "install.sh").write_text(
            f'echo "{lab} ${{2:-all}}" >>"{calls}"; [ "$BROKEN" != {lab} ]\n'
        )
    (folder / ".ci").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "setup", folder / ".ci")
    (folder / "pyproject.toml").write_text("x = 1\n")
    (folder / "kvplug").mkdir()
    (folder / "kvplug" / "engines.py").write_text("SUPPORTED = {}\n")
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.11.0\nexit 0\n')
    python.chmod(0o755)

    def set_up(mode: str, broken: str = "") -> tuple[int, list[str]]:
        calls.write_text("")
        done = subprocess.run(
            ["bash", folder / ".ci" / "setup", mode],
            env={**os.environ, "BROKEN": broken},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, calls.read_text().splitlines()

    assert set_up("vllm") == (0, ["vllm --no-matrix"])
    assert set_up("vllm") == (0, [])
    assert set_up("sglang", broken="sglang") == (1, ["sglang --no-matrix"])
    assert set_up("engine", broken="sglang") == (0, ["sglang --no-matrix"]), "who needs both can do without this one"
    assert set_up("sglang") == (0, ["sglang --no-matrix"])
    assert set_up("engines", broken="vllm") == (1, ["vllm all"])
    assert set_up("engines", broken="sglang") == (1, ["vllm all", "sglang all"])
    assert set_up("engines") == (0, ["sglang all"])
    for mode in ("engines", "engine", "sglang", "vllm", ""):
        assert set_up(mode) == (0, []), mode
    (folder / "tests" / "vllm_lab" / "install.sh").write_text(f'echo "vllm ${{2:-all}}, new" >>"{calls}"\n')
    assert set_up("vllm") == (0, ["vllm --no-matrix, new"])
    assert set_up("frobnicate")[0] == 1


def test_set_up_a_second_time_does_nothing(tmp_path: Path) -> None:
    """The stamp is made of what decides the set-up; with it in place pip is never called."""
    folder = tmp_path / "checkout"
    (folder / ".ci").mkdir(parents=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "setup", folder / ".ci")
    (folder / "pyproject.toml").write_text("x = 1\n")
    calls = folder / "calls"
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo Python 3.11.0 || echo "$@" >>"{calls}"\n')
    python.chmod(0o755)

    def set_up() -> int:
        done = subprocess.run(
            ["bash", folder / ".ci" / "setup"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return len(calls.read_text().splitlines())

    assert set_up() == 1
    assert set_up() == 1, "the stamp says that it is done"
    (folder / "pyproject.toml").write_text("x = 2\n")
    assert set_up() == 2, "another pyproject is another set-up"
