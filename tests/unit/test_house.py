"""Promises of the sources themselves: typed, in form, imports one way, small functions, nothing of one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import typecheck

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"kvplug": "kvplug", "shm": "kvplug.shm", "rdma": "kvplug.rdma", "adapters": "kvplug.adapters"}
MAX_FUNCTION_LINES = 70
TOP_FOLDERS = (*PACKAGES, "tests", "bench", "docs", "examples", "findings")
ENGINES = {"vllm", "sglang", "lmcache"}

MAY_IMPORT = {
    "kvplug.shm": {
        "kvplug.errors",
        "kvplug.keys",
        "kvplug.config",
        "kvplug.sizes",
        "kvplug.hostmem",
        "kvplug.outside",
        "kvplug.threads",
    },
    "kvplug.rdma": {
        "kvplug.errors",
        "kvplug.keys",
        "kvplug.config",
        "kvplug.endpoint",
        "kvplug.sizes",
        "kvplug.hostmem",
        "kvplug.outside",
        "kvplug.threads",
    },
}
"""What the lower packages may import of kvplug's own, beside themselves. kvplug itself may import these two, never
the adapters; the adapters may import anything."""


def tracked() -> list[Path]:
    """Every file of the checkout that git has or would add; where there is no git, every file that is not hidden."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        files = [
            path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return [path for path in files if path.is_file()]


def package_sources() -> Iterator[tuple[str, Path]]:
    """(installed module name, file) of every source that is installed."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in inside if part != "__init__")]), path


def imports_of(module: str, path: Path, *, at_once: bool = False) -> set[str]:
    """Full names of what *path* imports, anywhere in it; *at_once*: without what its functions import when called."""
    tree = ast.parse(path.read_text(), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {inner for function in functions for inner in ast.walk(function)} if at_once else set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if node in late:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_ruff_finds_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_source_is_in_ruffs_form() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr + "\njust fmt mends it"


def test_mypy_strict_finds_nothing_in_kvplug_shm_and_rdma() -> None:
    status, report = typecheck.check()
    assert status == 0, report


def test_mypy_would_find_a_wrong_type_in_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links really lead to shm: a wrong line in a copy of it is found."""
    for name in ("kvplug", *typecheck.LINKED):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for name in typecheck.LINKED:
        (tmp_path / "kvplug" / name).symlink_to(os.readlink(ROOT / "kvplug" / name))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "shm" / "wrong.py").write_text("def size() -> int:\n    return 'x'\n")
    monkeypatch.setattr(typecheck, "ROOT", tmp_path)
    status, report = typecheck.check()
    assert status != 0
    assert "shm/wrong.py:2" in report


@pytest.mark.parametrize("name", typecheck.LINKED)
def test_a_path_in_the_checkout_is_the_path_that_is_imported(name: str) -> None:
    """Editors and checkers resolve imports by folders: `kvplug.shm` is found as kvplug/shm."""
    link = ROOT / "kvplug" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_imports_point_one_way() -> None:
    """adapters -> kvplug -> shm, rdma -> errors, keys, config; a higher package is never imported by a lower one."""
    wrong = []
    for module, path in package_sources():
        own = next(
            (package for package in ("kvplug.adapters", "kvplug.shm", "kvplug.rdma") if below(module, package)),
            "kvplug",
        )
        for name in imports_of(module, path):
            if not below(name, "kvplug") or name == "kvplug" or own == "kvplug.adapters":
                continue
            if own == "kvplug":
                allowed = not below(name, "kvplug.adapters")
            else:
                allowed = below(name, own) or any(below(name, permitted) for permitted in MAY_IMPORT[own])
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_adapters_import_engines() -> None:
    """And torch: never in shm or rdma, and in kvplug only once a caller has handed over a tensor."""
    wrong = []
    for module, path in package_sources():
        if below(module, "kvplug.adapters"):
            continue
        lowest = below(module, "kvplug.shm") or below(module, "kvplug.rdma")
        names = {name.split(".")[0] for name in imports_of(module, path)}
        at_once = {name.split(".")[0] for name in imports_of(module, path, at_once=True)}
        for name in (names & ENGINES) | ((names if lowest else at_once) & {"torch"}):
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_importing_kvplug_loads_nothing_heavy() -> None:
    """Engines import kvplug in processes that never touch a pool."""
    heavy = ["numpy", "numba", "pydantic", "torch", "vllm", "typer"]
    code = f"import sys, kvplug; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "[]"


def test_every_package_folder_is_listed_in_pyproject() -> None:
    """A folder that is not listed works in the checkout and is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {module for module, path in package_sources() if path.name == "__init__.py"}
    with_sources = {
        module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in package_sources()
    }
    assert with_sources == on_disk, f"without __init__.py: {sorted(with_sources - on_disk)}"
    assert set(listed) == on_disk
    assert len(listed) == len(set(listed))


def test_functions_stay_small() -> None:
    """A file is as long as its subject; a function fits on a screen."""
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines"
        for _module, path in package_sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("folder", TOP_FOLDERS)
def test_every_top_folder_says_what_lives_in_it(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text()
    assert text.startswith(f"# {folder}/"), "the first line names the folder"
    assert "never" in text.lower(), "and it says what never lives here"


FORBIDDEN = {
    # Put together from pieces, so that this file doesn't find itself.
    "a path of one machine": re.compile(r"(?<![\w.~}])/(?:" + "|".join(["root", "work", "home/" + r"\w+"]) + r")/\w"),
    "a package index": re.compile(
        "pypi" + r"\.org|" + "files.python" + r"hosted|artifact" + r"ory|extra-index" + "-url"
    ),
    "a mark of unfinished work": re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_has(what: str) -> None:
    found = []
    for path in tracked():
        if path.name == "LICENSE":
            continue
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
            for n, line in enumerate(lines, 1)
            if FORBIDDEN[what].search(line)
        ]
    assert not found, "\n".join(found)


def test_forbidden_patterns_find_what_they_are_for() -> None:
    assert FORBIDDEN["a path of one machine"].search("cd /" + "root/x")
    for fine in ("~{}/x", "docs{}/x", "$HOME{}/x", "${{X}}{}/x"):
        assert not FORBIDDEN["a path of one machine"].search(fine.format("/" + "root"))
    assert FORBIDDEN["a mark of unfinished work"].search("# TO" + "DO: later")


SHIELDS = ("kvplug.adapters", "kvplug.threads")


def test_broad_excepts_count_and_log() -> None:
    """`except Exception` stands where an engine is shielded, and in the one module that all threads run through."""
    wrong = []
    for module, path in package_sources():
        if any(below(module, shield) for shield in SHIELDS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                reraises = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
                if not reraises:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled_or_evaluated() -> None:
    """No pickle and no eval of anything that came from outside the process."""
    wrong = []
    for module, path in package_sources():
        names = {name.split(".")[0] for name in imports_of(module, path)}
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
        ]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {node.func.id}")
    assert not wrong, "\n".join(wrong)
