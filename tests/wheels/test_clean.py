"""What a user meets after `pip install`: the first block is stored at once, and the command works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvplug.shm import native
from tests.kernels import LIBRARY_ONLY
from tests.wheels import clean

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = [f"3.{minor}" for minor in range(clean.OLDEST[1], clean.NEWEST[1] + 1)]

FIRST_BLOCK = """
import sys, json, time
began = time.perf_counter()
import numpy as np
from kvplug import KvStore
from kvplug.shm import jit
with KvStore(sys.argv[1], "64mib") as store:
    block = np.arange(65536, dtype=np.uint8)
    stored = store.put([bytes(32)], [block])
    out = np.empty_like(block)
    got = store.get_into([bytes(32)], [out])
    took_s = time.perf_counter() - began
    store.check_integrity()
print(json.dumps(dict(stored=[int(x) for x in stored], got=[int(x) for x in got], same=bool((out == block).all()),
    why=jit.KERNELS.why, numba="numba" in sys.modules, took_s=took_s)))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="there is no setpriv here"),
]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the libraries of every level of this machine."""
    machine = os.uname().machine
    subprocess.run([sys.executable, "-m", "kvplug.shm.build"], check=True, cwd=ROOT, timeout=600)
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("kvplug", "shm", "rdma", "adapters"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sources]
    subprocess.run(command, env={**os.environ, "KVPLUG_WHEEL": machine}, check=True, timeout=600)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module", params=VERSIONS)
def environment(request: pytest.FixtureRequest, wheel: Path) -> Iterator[clean.Environment]:
    python = clean.pythons().get(request.param)
    if python is None:
        pytest.skip(f"there is no Python {request.param} here")
    with clean.folder_for_everybody() as folder:
        yield clean.Environment(python, wheel, folder)


@pytest.fixture
def pool() -> Iterator[str]:
    name = f"clean-{os.getpid()}"
    yield name
    for path in Path("/dev/shm").glob(f"kvplug.{name}*"):
        path.unlink(missing_ok=True)


def first_block(environment: clean.Environment, pool: str, **env: str) -> dict[str, Any]:
    run = environment.run(environment.python, "-c", FIRST_BLOCK, pool, env=env)
    answer: dict[str, Any] = json.loads(run.stdout)
    assert (answer["stored"], answer["got"], answer["same"]) == ([0], [0], True)
    return {**answer, "said": run.stderr}


def doctor(environment: clean.Environment, pool: str) -> dict[str, Any]:
    run = environment.run(environment.python.parent / "kvplug", "doctor", "--json", env={"KVPLUG_POOL": pool})
    findings = json.loads(run.stdout)["findings"]
    return {finding["name"]: finding for finding in findings}


@LIBRARY_ONLY
def test_the_first_block_needs_nothing_to_be_compiled(
    environment: clean.Environment, pool: str, record_property: Any
) -> None:
    answer = first_block(environment, pool)
    record_property("first_block_s", answer["took_s"])
    assert not answer["numba"]
    assert str(environment.package) in answer["why"]
    assert "compil" not in answer["said"]
    found = doctor(environment, pool)
    assert found["kernels"]["status"] == "ok"
    assert "numba cache" not in found
    assert environment.run(environment.python.parent / "kvplug", "stat", "--pool", pool).stdout


@LIBRARY_ONLY
def test_without_the_library_it_works_as_before_and_says_so(environment: clean.Environment, pool: str) -> None:
    """numba has no place to keep what it compiles, which is said as well."""
    folder = environment.package / "shm" / "native"
    away = environment.folder / "away"
    (folder / os.uname().machine).rename(away)
    try:
        answer = first_block(environment, pool)
        found = doctor(environment, pool)
    finally:
        away.rename(folder / os.uname().machine)
    assert answer["numba"]
    assert answer["why"].startswith(f"numba compiles them: there is none for {os.uname().machine}")
    assert found["kernels"]["status"] == "note"
    assert found["numba cache"]["status"] == "warning"


@LIBRARY_ONLY
def test_every_level_of_this_machine_that_its_processor_has_works(
    environment: clean.Environment, pool: str, tmp_path: Path
) -> None:
    """A level is chosen where no better one is there."""
    folder = environment.package / "shm" / "native" / os.uname().machine
    away = environment.folder / "better"
    away.mkdir()
    levels = native.levels_here()
    try:
        for level in levels:
            assert f"made for {level}" in first_block(environment, f"{pool}-{level}")["why"]
            (folder / f"{level}.abi3.so").rename(away / f"{level}.abi3.so")
    finally:
        for path in away.iterdir():
            path.rename(folder / path.name)
    assert len(levels) >= 1
