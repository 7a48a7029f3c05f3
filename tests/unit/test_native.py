"""The compiled library: when it is used, what it refuses, what it needs, and that numba stays out where it is used."""

from __future__ import annotations

import ast
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvplug import doctor
from kvplug.errors import ConfigError
from kvplug.shm import build, jit, native
from tests.kernels import LIBRARY_ONLY

SHM = Path(native.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
STAMP = jit.STAMP[0]


def in_use() -> Path:
    assert jit.KERNELS.library is not None
    return Path(str(jit.KERNELS.library.__file__))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for libraries."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.delenv(native.ENV, raising=False)
    return tmp_path


def test_without_a_library_numba_compiles_and_doctor_says_so(folder: Path) -> None:
    kernels = native.choose(STAMP)
    assert kernels.library is None
    assert kernels.why.startswith("numba compiles them: there is none")
    first, cache = doctor._kernels(doctor._Surroundings(doctor.settings.load()))
    assert (first.name, first.status, first.found) == ("kernels", doctor.Status.NOTE, kernels.why)
    assert cache.name == "numba cache"


@LIBRARY_ONLY
def test_a_library_of_other_sources_is_refused_and_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = folder / in_use().parent.name / in_use().name
    copy.parent.mkdir()
    content = in_use().read_bytes()
    assert content.count(STAMP.encode()) == 1
    copy.write_bytes(content.replace(STAMP.encode(), b"0" * len(STAMP)))
    with caplog.at_level(logging.WARNING, "kvplug"):
        kernels = native.choose(STAMP)
    assert kernels.library is None
    assert f"{copy} was made of other sources" in kernels.why
    assert "made of other sources" in caplog.text
    monkeypatch.setenv(native.ENV, "native")
    with pytest.raises(ConfigError, match="made of other sources"):
        native.choose(STAMP)
    (found,) = doctor._kernels(doctor._Surroundings(doctor.settings.load()))
    assert found.status is doctor.Status.FAULT


@LIBRARY_ONLY
def test_a_library_that_cant_be_loaded_is_no_end(folder: Path) -> None:
    copy = folder / in_use().parent.name / in_use().name
    copy.parent.mkdir()
    copy.write_bytes(b"of another machine")
    kernels = native.choose(STAMP)
    assert kernels.library is None
    assert "can't be loaded" in kernels.why


@LIBRARY_ONLY
def test_doctor_names_the_library_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ENV, raising=False)
    (found,) = doctor._kernels(doctor._Surroundings(doctor.settings.load()))
    assert found.status is doctor.Status.OK
    assert str(in_use()) in found.found


def test_numba_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ENV, "numba")
    assert native.choose(STAMP) == (None, "numba compiles them: KVPLUG_KERNELS=numba")


def test_a_way_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ENV, "cython")
    with pytest.raises(ConfigError, match="is none of auto, native, numba"):
        native.choose(STAMP)


USED = """
import sys
import numpy as np
from kvplug import KvStore
from kvplug.shm.segment import remove_pool
import kvplug.doctor, kvplug.remote.fetcher, kvplug.rdma.agent
with KvStore(sys.argv[1], "64mib") as store:
    block = np.arange(65536, dtype=np.uint8)
    key = bytes(range(32))
    assert store.put([key], [block]) == [0]
    out = np.empty_like(block)
    assert store.get_into([key], [out]) == [0]
    assert (out == block).all()
    assert store.exists([key]).all()
    store.check_integrity()
remove_pool(sys.argv[1])
print([name for name in ("numba", "llvmlite") if name in sys.modules])
"""


@LIBRARY_ONLY
def test_with_the_library_numba_is_not_imported() -> None:
    name = f"native-test-{os.getpid()}"
    environment = {**os.environ, native.ENV: "native"}
    run = subprocess.run(
        [sys.executable, "-c", USED, name], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def symbols(path: Path, *options: str) -> set[str]:
    """Names without versions, as nm lists them; the linker's weak ones are left out."""
    out = subprocess.run(["nm", "-D", *options, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in out.splitlines() if line.split()[-2] != "w"}


@LIBRARY_ONLY
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm here")
def test_the_library_needs_python_and_the_c_library_and_nothing_else() -> None:
    outside = symbols(in_use(), "--undefined-only")
    others = {name for name in outside if not re.match(r"_?Py", name)}
    assert others <= build.LIBC | {"strlen"}
    assert not {name for name in outside if re.search(r"numba|NRT|llvm", name, re.IGNORECASE)}


@LIBRARY_ONLY
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm here")
def test_each_entry_is_a_symbol_of_c() -> None:
    defined = symbols(in_use(), "--defined-only")
    assert {name.removeprefix("kvplug_") for name in defined if name != "PyInit_kernels"} == set(entries_in_sources())


def entries_in_sources() -> dict[str, str]:
    """Name in the library → module, of all functions with the decorator ``entry``."""
    found = {}
    for path in sorted(SHM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("entry(") for decorator in node.decorator_list
            ):
                found[f"{path.stem}_{node.name}"] = path.stem
    return found


def test_the_build_knows_every_module_with_an_entry() -> None:
    assert sorted(set(entries_in_sources().values())) == sorted(build.MODULES)


@LIBRARY_ONLY
def test_every_entry_is_in_the_library() -> None:
    missing = [name for name in entries_in_sources() if not hasattr(jit.KERNELS.library, name)]
    assert missing == []


WORDS = np.zeros(8, np.int64)
KEYS = np.zeros((2, 4), np.int64)
READ_ONLY = np.zeros((2, 4), np.int64)
READ_ONLY.flags.writeable = False


@LIBRARY_ONLY
@pytest.mark.parametrize(
    "arguments",
    [
        (WORDS, WORDS, KEYS.astype(np.int32)),
        (WORDS, WORDS, KEYS.astype(np.float64)),
        (WORDS, WORDS, KEYS.astype(">i8")),
        (WORDS, WORDS, KEYS[:, ::2]),
        (WORDS, WORDS, KEYS[0]),
        (WORDS, WORDS, READ_ONLY),
        (WORDS, WORDS, KEYS.tolist()),
        (WORDS, WORDS, None),
        (KEYS, WORDS, KEYS),
        (WORDS, WORDS),
        (WORDS, WORDS, KEYS, KEYS),
    ],
)
def test_an_array_that_is_not_what_the_kernel_takes_is_refused(arguments: tuple[Any, ...]) -> None:
    """Before anything is read: with these words no pool is there, and a call would end the process."""
    from kvplug.shm.read import match_prefix

    with pytest.raises(TypeError):
        match_prefix(*arguments)


@LIBRARY_ONLY
def test_integers_may_be_numpys_and_other_things_are_refused() -> None:
    from kvplug.shm.index import key_hash

    assert key_hash(1, 2, 3, np.int64(4)) == key_hash(1, 2, 3, 4)
    with pytest.raises(TypeError):
        key_hash(1, 2, 3, 4.0)
    with pytest.raises(OverflowError):
        key_hash(1, 2, 3, 1 << 63)


CPUINFO = {
    "x86-64-v4": "fpu cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave "
    "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "fpu cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave avx512f",
    "x86-64-v2": "fpu cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx",
    None: "fpu sse sse2",
}


@pytest.mark.parametrize("best", CPUINFO)
def test_a_level_is_chosen_by_what_the_processor_has(
    best: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: some\nflags\t\t: {CPUINFO[best]}\nbugs\t: spectre\n\n" * 2)
    monkeypatch.setattr(native, "CPUINFO", str(path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert next(iter(native.levels_here()), None) == best
    path.unlink()
    assert native.levels_here() == []


def test_a_kernel_that_needs_more_than_the_c_library_is_not_emitted() -> None:
    text = """
        declare i64 @NRT_Allocate(i64)
        define i64 @kvplug_x(i64 %n) {
            %r = call i64 @NRT_Allocate(i64 %n)
            ret i64 %r
        }
    """
    with pytest.raises(build.BuildError, match="NRT_Allocate"):
        build.emit(text, "x86_64", "x86-64-v2")


def test_where_nothing_can_be_made_the_build_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, folder: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    shutil.copy(SHM / "native" / "caller.c", folder)
    assert build.main(["--level", "x86-64-v2"]) == 1
    assert "numba compiles the kernels instead: there is no C compiler" in capsys.readouterr().err


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy to build wheels from, with libraries for two machines that nobody could load."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("kvplug", "shm", "rdma", "adapters"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for machine, levels in native.LEVELS.items():
        (copy / "shm" / "native" / machine).mkdir(exist_ok=True)
        for level in levels:
            (copy / "shm" / "native" / machine / f"{level}.abi3.so").write_bytes(b"library")
    return copy


def wheel(sources: Path, machine: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            sources.parent,
            sources,
        ],
        env={**os.environ, "KVPLUG_WHEEL": machine},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_wheel_for_a_machine_has_its_libraries_and_is_called_so(sources: Path) -> None:
    built = wheel(sources, "x86_64")
    assert built.returncode == 0, built.stderr
    (made,) = sources.parent.glob("*.whl")
    assert made.name.endswith("-cp310-abi3-manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(made) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert sorted(libraries) == sorted(f"kvplug/shm/native/x86_64/{level}.abi3.so" for level in native.LEVELS["x86_64"])


def test_a_wheel_that_would_lack_a_library_is_not_made(sources: Path) -> None:
    (sources / "shm" / "native" / "x86_64" / "x86-64-v2.abi3.so").unlink()
    built = wheel(sources, "x86_64")
    assert built.returncode != 0
    assert "it has 2 libraries" in built.stderr + built.stdout
