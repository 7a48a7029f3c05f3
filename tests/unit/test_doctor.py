"""`kvplug doctor` finds each fault that it is there for, names the fix, and leaves nothing behind."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvplug import doctor, engines
from kvplug.config import Config
from kvplug.doctor import Finding, Status, examine, report
from kvplug.errors import PoolSpaceError
from kvplug.rdma.verbs import describe
from kvplug.shm.segment import check_space
from tests.lab.releases import outside

GIB = 1024**3
MIB = 1024**2


@pytest.fixture(autouse=True)
def settings_of_the_test_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith(("KVPLUG_", "NUMBA_CACHE", "VLLM_PLUGINS"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KVPLUG_POOL", "doctor-test")
    monkeypatch.setenv("KVPLUG_SIZE", "16mib")


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def machine(root: Path, **files: str) -> Path:
    """A tree of the kernel's files, `__` in a name standing for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_machine_that_is_fine_has_no_fault() -> None:
    findings = examine()
    assert [finding for finding in findings if finding.status is Status.FAULT] == []
    assert report(findings)["ok"] is True
    for name in ("platform", "python", "kvplug", "packages", "/dev/shm", "memory", "permissions", "kernel locks"):
        assert named(findings, name).status is Status.OK, name


def test_it_leaves_nothing_behind_in_shm() -> None:
    before = {name for name in os.listdir("/dev/shm") if "doctor" in name}
    examine()
    assert {name for name in os.listdir("/dev/shm") if "doctor" in name} == before


def test_every_fault_and_every_warning_names_a_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_SIZE", "900tb")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    findings = examine(root=machine(tmp_path, proc__meminfo="MemTotal: 1048576 kB\n"))
    bad = [finding for finding in findings if finding.status in (Status.FAULT, Status.WARNING)]
    assert {"/dev/shm", "memory", "vLLM plugin", "SGLang plugin"} <= {finding.name for finding in bad}
    assert all(finding.fix for finding in bad)
    assert report(findings)["ok"] is False


def test_settings_that_cannot_be_used_are_a_fault_and_the_rest_is_still_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVPLUG_SIZ", "1gb")
    findings = examine()
    assert named(findings, "settings").status is Status.FAULT
    assert "did you mean KVPLUG_SIZE?" in named(findings, "settings").found
    assert named(findings, "kernel locks").status is Status.OK


def test_no_shm_is_a_fault(tmp_path: Path) -> None:
    findings = examine(shm=str(tmp_path / "absent"))
    assert named(findings, "/dev/shm").status is Status.FAULT
    assert "mount -t tmpfs" in named(findings, "/dev/shm").fix
    assert named(findings, "permissions").status is Status.FAULT


def test_a_pool_larger_than_shm_is_a_fault_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_SIZE", "64tib")
    found = named(examine(), "/dev/shm")
    assert found.status is Status.FAULT
    assert "64 TiB" in found.found
    assert "free" in found.found


def test_dockers_default_shm_is_named_with_ipc_host(monkeypatch: pytest.MonkeyPatch) -> None:
    docker = doctor.hostmem.ShmSpace(64 * 1024**2, 60 * 1024**2)
    monkeypatch.setattr(doctor.hostmem, "shm_space", lambda _="": docker)
    monkeypatch.setenv("KVPLUG_SIZE", "1gb")
    findings = examine()
    assert named(findings, "/dev/shm").status is Status.FAULT
    assert "--ipc=host" in named(findings, "/dev/shm").fix
    assert named(findings, "container IPC").status is Status.WARNING
    assert "--ipc=host" in named(findings, "container IPC").fix


def test_a_pool_larger_than_the_containers_limit_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc__meminfo": "MemTotal: 16777216 kB\nMemAvailable: 16777216 kB\n",
        "proc__self__cgroup": "0::/\n",
        "sys__fs__cgroup__memory.max": f"{GIB}\n",
    }
    root = machine(tmp_path, **files)
    monkeypatch.setenv("KVPLUG_SIZE", "2gib")
    found = named(examine(root=root), "memory")
    assert found.status is Status.FAULT
    assert "1 GiB" in found.found
    assert "2 GiB" in found.found
    monkeypatch.setenv("KVPLUG_SIZE", "512mib")
    assert named(examine(root=root), "memory").status is Status.OK
    machine(tmp_path, **{"sys__fs__cgroup__memory.current": f"{GIB - 1024}\n"})
    found = named(examine(root=root), "memory")
    assert found.status is Status.FAULT, "nor is a pool made there"
    assert "64 MiB stay free" in found.found


SPACES = [  # what /dev/shm has, what of it is free, what memory may be used, what of it is
    (64 * MIB, 64 * MIB, 0, 0),
    (64 * MIB, 28 * MIB, 0, 0),
    (8 * GIB, 8 * GIB, GIB, 0),
    (8 * GIB, 8 * GIB, GIB, GIB // 2),
    (8 * GIB, 8 * GIB, GIB, 2 * GIB),
    (0, 0, GIB, 0),
    (0, 0, 0, 0),
    (64 * MIB, 10 * MIB, GIB, 0),
]


@pytest.mark.parametrize(("total", "free", "limit", "used"), SPACES)
def test_doctor_and_the_creation_of_a_pool_agree_about_what_fits(
    total: int, free: int, limit: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.hostmem, "shm_space", lambda _="": doctor.hostmem.ShmSpace(total, free))
    monkeypatch.setattr(doctor.hostmem, "memory", lambda _="/": doctor.hostmem.Memory(limit, used, "test"))
    room = doctor.hostmem.room()
    sizes = [2 * MIB, 4 * MIB, 12 * MIB, 48 * MIB, 448 * MIB, 960 * MIB, 16 * GIB]
    if room is not None:
        sizes += [room.nbytes - 1, room.nbytes, room.nbytes + 1]
    for size in sizes:
        if size < 2 * MIB:
            continue
        monkeypatch.setenv("KVPLUG_SIZE", str(size))
        found = [finding for finding in examine() if finding.name in ("/dev/shm", "memory")]
        said = [finding for finding in found if finding.status is Status.FAULT]
        refused = ""
        try:
            check_space(size)
        except PoolSpaceError as error:
            refused = str(error)
        assert bool(refused) == bool(said), (size, refused, said)
        if refused:
            assert any(finding.found.split("; pool")[0] in refused for finding in said), "with the same numbers"
        assert bool(said) == (room is not None and not room.fits(size))


def test_a_pool_of_an_older_format_is_not_the_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """This version makes its own beside it, which has to fit."""
    older = Path("/dev/shm", f"kvplug.doctor-test-{os.getpid()}.v1")
    older.touch(0o600)
    monkeypatch.setenv("KVPLUG_POOL", f"doctor-test-{os.getpid()}")
    monkeypatch.setenv("KVPLUG_SIZE", "64tib")
    try:
        assert named(examine(), "/dev/shm").status is Status.FAULT
    finally:
        older.unlink()


def test_a_limit_on_file_size_is_a_fault() -> None:
    """Past RLIMIT_FSIZE comes a signal that ends the process. In a process of its own: it can't be raised again."""
    code = "from kvplug.doctor import examine; print([f.status.value for f in examine() if f.name == 'process limits'])"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024**2, 1024**2))

    run = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "['fault']"


def test_locks_that_do_not_exclude_are_seen(tmp_path: Path) -> None:
    """Both descriptors being one description is what broken locks look like from outside."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with path.open("r+b") as first, path.open("r+b") as second:
        assert doctor._locks_broken(first.fileno(), second.fileno()) == ""
    with path.open("r+b") as first:
        assert "not seen" in doctor._locks_broken(first.fileno(), first.fileno())


def test_no_place_for_numbas_cache_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked / "below"))
    (found,) = doctor._numba_cache()
    assert found.status is Status.WARNING, "it works, slowly"
    assert "NUMBA_CACHE_DIR" in found.fix


def test_a_full_shm_is_called_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    around = doctor._Surroundings(doctor.settings.load(), shm=str(tmp_path))
    found = named(list(doctor._files_and_locks(around)), "kernel locks")
    assert found.status is Status.FAULT
    assert f"{tmp_path} is full" in found.found
    assert "kvplug rm" in found.fix
    assert "mount" not in found.fix


def test_a_numba_cache_that_anyone_can_write_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(shared))
    assert next(doctor._numba_cache()).status is Status.OK
    shared.chmod(0o777)
    (found,) = doctor._numba_cache()
    assert found.status is Status.WARNING
    assert "run as code" in found.found


@pytest.mark.parametrize(
    ("value", "status", "says"),
    [
        (None, Status.NOTE, "VLLM_PLUGINS is not set"),
        ("kvplug", Status.OK, "on:"),
        ("other, kvplug", Status.OK, "on:"),
        ("other", Status.WARNING, "does not name it"),
        ("", Status.WARNING, "does not name it"),
    ],
)
def test_whether_the_plugin_would_load_is_said(
    value: str | None, status: Status, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    found = named(examine(), "vLLM plugin")
    assert found.status is status
    assert says in found.found
    if status is Status.WARNING:
        assert found.fix == ("VLLM_PLUGINS=other,kvplug" if value else "VLLM_PLUGINS=kvplug")


@pytest.mark.parametrize(
    ("environment", "status", "says"),
    [
        ({}, Status.NOTE, "--enable-kvplug"),
        ({"KVPLUG_ENABLE": "0"}, Status.NOTE, "--enable-kvplug"),
        ({"KVPLUG_ENABLE": "1"}, Status.OK, "KVPLUG_ENABLE=1"),
        ({"KVPLUG_ENABLE": "1", "SGLANG_PLUGINS": "a, kvplug"}, Status.OK, "KVPLUG_ENABLE=1"),
        ({"KVPLUG_ENABLE": "1", "SGLANG_PLUGINS": "a"}, Status.WARNING, "does not name it"),
    ],
)
def test_sglangs_plugin_is_reported(
    environment: dict[str, str], status: Status, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KVPLUG_ENABLE", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = named(examine(), "SGLang plugin")
    assert found.status is status
    assert says in found.found
    if status is Status.WARNING:
        assert found.fix == "SGLANG_PLUGINS=a,kvplug"


@pytest.fixture
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in front of sys.path into which distributions' metadata can be put, as an installation would."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    importlib.invalidate_caches()


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("version", "status"),
    [
        *((version, Status.FAULT) for version in outside("vllm")),
        *((version, Status.OK) for version in engines.SUPPORTED["vllm"].tested),
        ("0.31.0rc1", Status.OK),
        ("0.32.4+cu129", Status.OK),
        ("1.0", Status.FAULT),
        ("unknown", Status.FAULT),
    ],
)
def test_engine_versions_outside_the_tested_ones_are_faults(version: str, status: Status, fake_engine: Path) -> None:
    install(fake_engine, "vllm", version)
    found = named(examine(), "engines")
    assert found.status is status
    assert version in found.found


@pytest.mark.parametrize(
    ("version", "status", "says"),
    [
        *((version, Status.FAULT, str(engines.SUPPORTED["sglang"])) for version in outside("sglang")),
        ("0.5.20", Status.OK, "auto takes hicache"),
        ("0.5.22.post1", Status.OK, "auto takes hicache"),
        ("0.5.23", Status.OK, "auto takes linker"),
        ("0.5.23+cpu", Status.OK, "auto takes linker"),
        ("0.6", Status.FAULT, str(engines.SUPPORTED["sglang"])),
    ],
)
def test_sglang_versions_and_their_mode(version: str, status: Status, says: str, fake_engine: Path) -> None:
    install(fake_engine, "sglang", version)
    found = [one for one in examine() if one.name == "engines" and one.found.startswith("sglang")]
    assert [one.status for one in found] == [status]
    assert says in found[0].found


def test_an_unsupported_engine_can_be_tried(fake_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(fake_engine, "vllm", "0.99.0")
    monkeypatch.setenv("KVPLUG_UNSUPPORTED_ENGINE_OK", "1")
    assert named(examine(), "engines").status is Status.WARNING


def test_no_engine_is_imported() -> None:
    seen = "[name for name in ('torch', 'vllm', 'sglang') if name in sys.modules]"
    code = f"import sys; from kvplug.doctor import examine; examine(); print({seen})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("engine", engines.SUPPORTED)
def test_the_extra_in_the_packages_metadata_has_the_same_range(engine: str) -> None:
    wanted = engines.SUPPORTED[engine]
    (requirement,) = [
        line for line in importlib.metadata.requires("kvplug") or [] if line.startswith(engine) and "extra" in line
    ]
    assert f">={'.'.join(map(str, wanted.first))}" in requirement
    assert f"<{'.'.join(map(str, wanted.end))}" in requirement


@pytest.mark.parametrize("engine", engines.SUPPORTED)
def test_no_release_between_the_first_and_the_newest_is_untested(engine: str) -> None:
    table = engines.SUPPORTED[engine]
    last = range(table.first[-1], table.end[-1])
    assert [engines.release(version)[: table.numbers] for version in table.tested] == [
        (*table.first[:-1], number) for number in last
    ]
    assert table.mixed <= set(table.tested)
    assert table.built, "tests need one release that is built for the CPU"


def test_the_report_is_json() -> None:
    verdict = json.loads(json.dumps(report(examine())))
    assert set(verdict) == {"ok", "findings"}
    assert all(set(finding) == {"name", "status", "found", "fix"} for finding in verdict["findings"])


NOBODYS = "kvplug-test0"
"""A device that the fake machine's kernel lists and nobody can open."""


def rdma_machine(root: Path) -> Path:
    """A machine with that device."""
    (root / "sys/class/infiniband" / NOBODYS).mkdir(parents=True)
    return root


def without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither is installed."""
    for name in ("ibverbs", "pyverbs"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"kvplug.rdma.verbs.binding_{name}", raising=False)


def test_no_rdma_device_is_no_fault_unless_verbs_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(examine(root=tmp_path), "RDMA")
    assert (found.status, "over TCP" in found.found, "binding: " in found.found) == (Status.NOTE, True, True)
    monkeypatch.setenv("KVPLUG_DATA_PATH", "verbs")
    assert named(examine(root=tmp_path), "RDMA").status is Status.FAULT
    monkeypatch.setenv("KVPLUG_DATA_PATH", "tcp")
    assert "data_path = tcp" in named(examine(root=rdma_machine(tmp_path)), "RDMA").found


def test_a_device_without_a_binding_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bindings(monkeypatch)
    found = named(examine(root=rdma_machine(tmp_path)), "RDMA")
    assert found.status is Status.WARNING
    assert NOBODYS in found.found
    assert "kvplug[rdma]" in found.fix
    monkeypatch.setenv("KVPLUG_DATA_PATH", "verbs")
    assert named(examine(root=tmp_path), "RDMA").status is Status.FAULT


def test_a_device_that_is_not_among_the_settings_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplug.rdma.verbs.describe._bindings", lambda _: ["ibverbs"])
    monkeypatch.setenv("KVPLUG_VERBS_DEVICE", "another0")
    found = named(examine(root=rdma_machine(tmp_path)), "RDMA")
    assert (found.status, found.fix) == (Status.WARNING, "correct verbs_device")
    assert NOBODYS in found.found


def test_the_limit_on_locked_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplug.rdma.verbs.describe._may_lock", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    remark = next(iter(describe._memlock(Config(size="64mib"))))
    assert remark.status == "warning"
    assert "64 KiB" in remark.found
    assert "memlock" in remark.fix
