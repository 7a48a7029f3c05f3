"""What `kvplug doctor` looks at: everything outside kvplug that decides whether it works here, and how to fix it.

Each check answers with one :class:`Finding`. A *fault* keeps kvplug from working (an engine would run on without
it); a *warning* is something that will probably surprise; a *note* is only said. No engine is imported and nothing is
left behind.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import secrets
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kvplug
from kvplug import config as settings
from kvplug import engines, hostmem
from kvplug.errors import ConfigError, DirectoryError, PoolError
from kvplug.outside import file_text
from kvplug.sizes import format_size

__all__ = ["Finding", "Status", "examine", "report"]

DOCKER_DEFAULT_SHM_BYTES = 64 * 1024**2
PLUGIN_NAME = "kvplug"


class Status(enum.Enum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    found: str
    fix: str = ""
    """What to do about it; empty where there is nothing to do."""


@dataclass(frozen=True)
class _Surroundings:
    """What the checks need to know. Tests give other roots."""

    config: settings.Config
    shm: str = hostmem.DEV_SHM
    root: Path = Path("/")


def _platform(_: _Surroundings) -> Iterator[Finding]:
    version = platform.python_version()
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        yield Finding(
            "platform",
            Status.FAULT,
            f"{platform.system()} {platform.machine()}",
            "kvplug needs 64-bit little-endian Linux",
        )
    else:
        yield Finding("platform", Status.OK, f"{platform.system()} {platform.release()} {platform.machine()}")
    if sys.version_info >= (3, 14):
        yield Finding(
            "python", Status.WARNING, f"{version}, newer than what kvplug is tested with", "use Python 3.10 to 3.13"
        )
    else:
        yield Finding("python", Status.OK, version)


def _packages(_: _Surroundings) -> Iterator[Finding]:
    try:
        requires = importlib.metadata.requires("kvplug") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "kvplug",
            Status.FAULT,
            f"{kvplug.__version__}, run from a folder, not installed",
            "pip install kvplug (or pip install -e .)",
        )
        return
    found, missing = [], []
    for requirement in requires:
        if ";" in requirement:  # extras and what only older Pythons need
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("kvplug", Status.OK, f"{kvplug.__version__} in {Path(kvplug.__file__).parent}")
    if missing:
        yield Finding("packages", Status.FAULT, "missing: " + ", ".join(missing), "pip install " + " ".join(missing))
    else:
        yield Finding("packages", Status.OK, ", ".join(found))


def _shm(around: _Surroundings) -> Iterator[Finding]:
    space = hostmem.shm_space(around.shm)
    if space is None:
        yield Finding(
            "/dev/shm", Status.FAULT, f"{around.shm} is not there", "mount a tmpfs on it: mount -t tmpfs tmpfs /dev/shm"
        )
        return
    size = around.config.size
    room = hostmem.shm_room(around.shm)
    text = room.text if room else f"{around.shm} has no size of its own"
    if _own_pool_exists(around):
        yield Finding("/dev/shm", Status.OK, f"{text}; pool {around.config.pool} is there already and keeps its size")
    elif room is not None and not room.fits(size):
        fix = (
            f"KVPLUG_SIZE of at most {room.largest}, a larger /dev/shm (mount -o remount,size=... /dev/shm), "
            "or `kvplug rm` for unused pools"
        )
        if space.total_bytes <= DOCKER_DEFAULT_SHM_BYTES:
            fix = (
                "start the container with --ipc=host, or with --shm-size=... "
                "(Kubernetes: mount an emptyDir with medium Memory on /dev/shm); "
                f"or KVPLUG_SIZE of at most {room.largest}"
            )
        yield Finding("/dev/shm", Status.FAULT, f"{text}; pool {around.config.pool} needs {format_size(size)}", fix)
    else:
        yield Finding("/dev/shm", Status.OK, f"{text}; pool {around.config.pool} is to be {format_size(size)}")


def _container(around: _Surroundings) -> Iterator[Finding]:
    marks = [mark for mark in (".dockerenv", "run/.containerenv") if (around.root / mark).exists()]
    in_container = bool(marks) or "KUBERNETES_SERVICE_HOST" in os.environ or "container" in os.environ
    space = hostmem.shm_space(around.shm)
    if space is not None and space.total_bytes == DOCKER_DEFAULT_SHM_BYTES:
        yield Finding(
            "container IPC",
            Status.WARNING,
            "/dev/shm is 64 MiB: a container with a /dev/shm of its own, which no other container sees",
            "--ipc=host, or --ipc=shareable on one container and --ipc=container:NAME on the others; "
            "--shm-size=... makes it larger",
        )
    elif in_container:
        yield Finding(
            "container IPC",
            Status.NOTE,
            "a container: only processes that see this same /dev/shm share pools",
            "engines in several containers: start each with --ipc=host",
        )
    else:
        yield Finding("container IPC", Status.OK, "no container seen: all processes of this user share pools")


def _memory(around: _Surroundings) -> Iterator[Finding]:
    room, size = hostmem.memory_room(around.root), around.config.size
    if room is None:
        yield Finding(
            "memory",
            Status.WARNING,
            "neither a control group nor /proc/meminfo could be read",
            "set KVPLUG_SIZE to what this process may use",
        )
    elif _own_pool_exists(around) or room.fits(size):
        yield Finding("memory", Status.OK, room.text)
    else:
        yield Finding(
            "memory",
            Status.FAULT,
            f"{room.text}; pool {around.config.pool} needs {format_size(size)}",
            f"KVPLUG_SIZE of at most {room.largest}, or more memory for the container: past the limit comes the "
            "out-of-memory killer, not an error",
        )


def _limits(around: _Surroundings) -> Iterator[Finding]:
    low = []
    for what, which, flag in (("file size", resource.RLIMIT_FSIZE, "-f"), ("address space", resource.RLIMIT_AS, "-v")):
        soft, _ = resource.getrlimit(which)
        if soft not in (resource.RLIM_INFINITY, -1) and soft < around.config.size:
            low.append(f"{what} at most {format_size(soft)} (ulimit {flag})")
    if low:
        yield Finding(
            "process limits", Status.FAULT, "; ".join(low), "ulimit ... unlimited in the shell that starts the engine"
        )
    else:
        yield Finding("process limits", Status.OK, "file size and address space leave room for the pool")


def _files_and_locks(around: _Surroundings) -> Iterator[Finding]:
    """Does for real, on a file of one page, what the pool needs: make it private, fill it, lock it both ways."""
    path = os.path.join(around.shm, f".kvplug-doctor-{secrets.token_hex(8)}")
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        fix = (
            "chmod 1777 /dev/shm (it belongs to root)"
            if isinstance(error, PermissionError)
            else "mount a tmpfs on /dev/shm"
        )
        yield Finding("permissions", Status.FAULT, f"can't create a file in {around.shm}: {error.strerror}", fix)
        return
    try:
        stat = os.fstat(fd)
        if stat.st_mode & 0o777 != 0o600 or stat.st_uid != os.geteuid():
            got = f"mode {stat.st_mode & 0o777:04o} and owner {stat.st_uid}"
            found = f"a new file in {around.shm} got {got} instead of 0600 and {os.geteuid()}"
            yield Finding(
                "permissions", Status.FAULT, found, "remove default ACLs or uid mapping from the mount on /dev/shm"
            )
        else:
            yield Finding("permissions", Status.OK, f"can create files with mode 0600 as uid {stat.st_uid}")
        other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, resource.getpagesize())
            broken = _locks_broken(fd, other)
        finally:
            os.close(other)
        if broken:
            yield Finding(
                "kernel locks", Status.FAULT, broken, "Linux 3.15 or newer, or a sandbox that implements these locks"
            )
        else:
            yield Finding("kernel locks", Status.OK, "flock and open file description locks exclude and can be probed")
    except OSError as error:
        found, fix = f"{error.strerror} (errno {error.errno}) on a file in {around.shm}", "mount a tmpfs on /dev/shm"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            found = f"{around.shm} is full: {error.strerror}"
            fix = f"`kvplug rm` for unused pools, delete other files in {around.shm}, or make it larger"
        yield Finding("kernel locks", Status.FAULT, found, fix)
    finally:
        os.close(fd)
        os.unlink(path)


def _locks_broken(first: int, second: int) -> str:
    """What is wrong with locks between two descriptions of one file; empty when nothing is."""
    flock_struct = "hhqqi4x"  # l_type, l_whence, l_start, l_len, l_pid as Linux lays them out on 64 bits
    one_byte = struct.pack(flock_struct, fcntl.F_WRLCK, os.SEEK_SET, 7, 1, 0)
    fcntl.fcntl(first, fcntl.F_OFD_SETLK, one_byte)
    seen = struct.unpack(flock_struct, fcntl.fcntl(second, fcntl.F_OFD_GETLK, one_byte))[0]
    if seen != fcntl.F_WRLCK:
        return "an open file description lock is not seen by another description"
    fcntl.flock(first, fcntl.LOCK_EX)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    return "flock does not exclude another description"


def _own_pool_exists(around: _Surroundings) -> bool:
    """Whether this version finds the pool that is configured: then none is made, and none has to fit."""
    try:
        from kvplug.shm.segment import segment_name
    except (ImportError, RuntimeError, OSError):
        return False  # the check of pools says so
    return os.path.lexists(os.path.join(around.shm, segment_name(around.config.pool)))


def _pools(around: _Surroundings) -> Iterator[Finding]:
    try:
        from kvplug.shm.segment import attached, list_pools
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Finding(
            "pools",
            Status.FAULT,
            f"the pool's code can't be loaded: {first_line}",
            "fix the findings on packages, kernels and numba cache",
        )
        return
    pools = list_pools()
    if not pools:
        yield Finding("pools", Status.OK, "none yet")
    for pool in pools:
        text = f"{pool.name}: {format_size(pool.size_bytes)}, uid {pool.uid}, {attached(pool.clients_alive)}"
        if pool.usable:
            yield from _usable_pool(pool.name, text, is_ours=pool.name == around.config.pool)
        elif pool.name == around.config.pool:
            fix = "KVPLUG_POOL with another name"
            if pool.uid == os.geteuid():
                first = "" if pool.clients_alive == 0 else "stop what is attached, then "
                fix = f"{first}`kvplug rm --pool {pool.name}`, or {fix}"
            yield Finding("pools", Status.FAULT, f"{text}; {pool.problem}", fix)
        else:
            yield Finding("pools", Status.NOTE, f"{text}; {pool.problem}")


def _usable_pool(name: str, text: str, *, is_ours: bool) -> Iterator[Finding]:
    """Whether there is room for another process, and whether those that are attached are well."""
    from kvplug.shm.visit import visit

    try:
        with visit(name) as seen:
            is_full, places, figures = seen.is_full, len(seen.alive), seen.stats()
    except PoolError as error:  # it went away just now
        yield Finding("pools", Status.NOTE, f"{text}; {error}")
        return
    if is_full:
        yield Finding(
            "pools",
            Status.FAULT if is_ours else Status.WARNING,
            f"{text}, and it has no room for another one ({places} at most)",
            "stop processes that use it, or name another pool for the next engine (KVPLUG_POOL)",
        )
    elif figures.thread_errors or figures.dead_threads:
        yield Finding(
            "pools",
            Status.WARNING,
            f"{text}; kvplug's threads in these processes met {figures.thread_errors} errors of its own, and "
            f"{figures.dead_threads} could not be started",
            "see the logs of these processes after 'kvplug: an error in thread', and please report them",
        )
    else:
        yield Finding("pools", Status.OK, text)


def _kernels(_: _Surroundings) -> Iterator[Finding]:
    """Which machine code the pool's kernels are: the package's, or numba's, which a process makes or loads."""
    from kvplug.shm import native

    try:
        kernels = native.choose(native.sources_stamp()[0])
    except ConfigError as error:
        yield Finding("kernels", Status.FAULT, str(error), f"unset {native.ENV}")
        return
    if kernels.library is not None:
        yield Finding("kernels", Status.OK, f"compiled: {kernels.why}")
        return
    yield Finding("kernels", Status.NOTE, kernels.why)
    yield from _numba_cache()


def _numba_cache() -> Iterator[Finding]:
    """Where numba keeps what it compiled, in its own order of places. With none, each process compiles it anew."""
    fix = "NUMBA_CACHE_DIR=... with a folder of this user's"
    asked = os.environ.get("NUMBA_CACHE_DIR")
    spec = importlib.util.find_spec("kvplug.shm")
    source = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else Path()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    places = [Path(asked)] if asked else [source / "__pycache__", Path(base) / "numba"]
    for place in places:
        # os.path: a home that can't be entered is not there, where pathlib would raise
        nearest = next((folder for folder in (place, *place.parents) if os.path.exists(folder)), place)
        if not (os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)):
            continue
        if os.path.exists(place) and os.stat(place).st_mode & 0o002:
            yield Finding(
                "numba cache",
                Status.WARNING,
                f"{place} can be written by every user, and what lies there is run as code",
                f"chmod o-w {place}, or {fix}",
            )
        else:
            yield Finding("numba cache", Status.OK, str(place))
        return
    found = (
        f"can't write to {' or '.join(map(str, places))}: every start compiles the pool's code anew, for about a minute"
    )
    yield Finding("numba cache", Status.WARNING, found, fix)


def _huge_pages(around: _Surroundings) -> Iterator[Finding]:
    path = around.root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    try:
        choice = re.search(r"\[(\w+)\]", file_text(path))
    except OSError:
        choice = None
    value = choice[1] if choice else "unknown"
    fix = (
        ""
        if value in ("always", "advise", "within_size", "unknown")
        else f"for faster first touches: echo advise > {path} (as root)"
    )
    yield Finding("huge pages", Status.NOTE, f"for shared memory: {value}", fix)


def _engines(around: _Surroundings) -> Iterator[Finding]:
    found = engines.installed()
    if not found:
        yield Finding(
            "engines",
            Status.NOTE,
            "neither vLLM nor SGLang in this Python",
            "pip install 'kvplug[vllm]' in the engine's environment; the SDK works without",
        )
    for engine in found:
        text = f"{engine.distribution} {engine.version}"
        if engine.supported:
            yield Finding("engines", Status.OK, f"{text}, supported{_sglang_mode(engine)}")
        elif engine.name not in engines.SUPPORTED:
            yield Finding(
                "engines", Status.NOTE, f"{text}: this version of kvplug has no adapter for it; it runs without kvplug"
            )
        elif around.config.unsupported_engine_ok:
            yield Finding(
                "engines",
                Status.WARNING,
                f"{text} is not one of {engines.SUPPORTED[engine.name]}; used all the same (unsupported_engine_ok)",
            )
        else:
            yield Finding(
                "engines",
                Status.FAULT,
                f"{text}: kvplug {kvplug.__version__} works with {engines.SUPPORTED[engine.name]}",
                "one of those versions, or KVPLUG_UNSUPPORTED_ENGINE_OK=1 to try",
            )


def _sglang_mode(engine: engines.Engine) -> str:
    if engine.name != "sglang":
        return ""
    linker = engines.release(engine.version) >= engines.SGLANG_LINKER_SINCE
    return f"; --kvplug-mode auto takes {'linker, or hicache with a host cache' if linker else 'hicache'}"


def _entry_point(name: str, group: str) -> Iterator[Finding]:
    if not importlib.metadata.entry_points(group=group, name=PLUGIN_NAME):
        fix = "install kvplug again: pip install --force-reinstall --no-deps kvplug"
        yield Finding(name, Status.FAULT, f"no entry point {PLUGIN_NAME} in {group}", fix)


def _allow_list(name: str, variable: str) -> Iterator[Finding]:
    """A finding if the variable is set and leaves kvplug out."""
    allowed = [each.strip() for each in os.environ.get(variable, "").split(",") if each.strip()]
    if os.environ.get(variable) is not None and PLUGIN_NAME not in allowed:
        found = f"off: {variable}={os.environ[variable]!r} does not name it"
        yield Finding(name, Status.WARNING, found, f"{variable}={','.join([*allowed, PLUGIN_NAME])}")


def _vllm_plugin(_: _Surroundings) -> Iterator[Finding]:
    name, variable = "vLLM plugin", "VLLM_PLUGINS"
    if bad := [*_entry_point(name, "vllm.general_plugins"), *_allow_list(name, variable)]:
        yield bad[0]
    elif variable in os.environ:
        yield Finding(name, Status.OK, f"on: {variable}={os.environ[variable]}")
    else:
        found, fix = "installed, off: VLLM_PLUGINS is not set", "VLLM_PLUGINS=kvplug vllm serve MODEL"
        yield Finding(name, Status.NOTE, found, fix)


def _sglang_plugin(_: _Surroundings) -> Iterator[Finding]:
    name, variable = "SGLang plugin", "KVPLUG_ENABLE"
    value = os.environ.get(variable, "")
    if bad := [*_entry_point(name, "sglang.srt.plugins"), *_allow_list(name, "SGLANG_PLUGINS")]:
        yield bad[0]
    elif value.strip().lower() in ("1", "true", "yes", "on"):
        yield Finding(name, Status.OK, f"on: {variable}={value}")
    else:
        fix = f"python -m sglang.launch_server --enable-kvplug ..., or {variable}=1"
        yield Finding(name, Status.NOTE, f"installed, off where --enable-kvplug is not given: {variable} is not 1", fix)


def _rdma(around: _Surroundings) -> Iterator[Finding]:
    from kvplug.rdma.verbs.describe import describe_peers, describe_verbs

    for status, found, fix in describe_verbs(around.config, around.root / "sys/class/infiniband"):
        yield Finding("RDMA", Status(status), found, fix)
    for status, found, fix in describe_peers(around.config):
        yield Finding("peer", Status(status), found, fix)


def _directory(around: _Surroundings) -> Iterator[Finding]:
    if around.config.directory_url is None:
        return
    from kvplug.rdma.directory.directory import describe_server

    try:
        yield Finding("directory", Status.OK, describe_server(around.config))
    except ConfigError as error:
        yield Finding("directory", Status.FAULT, str(error), "correct the settings")
    except (OSError, DirectoryError) as error:
        fix = "start it, or correct directory_url; until it answers only the hosts in `peers` are known"
        yield Finding("directory", Status.WARNING, f"it does not answer as it should: {error}", fix)


_CHECKS: tuple[Callable[[_Surroundings], Iterator[Finding]], ...] = (
    _platform,
    _packages,
    _shm,
    _container,
    _memory,
    _limits,
    _files_and_locks,
    _pools,
    _kernels,
    _huge_pages,
    _engines,
    _vllm_plugin,
    _sglang_plugin,
    _rdma,
    _directory,
)


def examine(shm: str = hostmem.DEV_SHM, root: str | os.PathLike[str] = "/") -> list[Finding]:
    """Runs every check. With settings that can't be used the rest is checked against the defaults."""
    findings = []
    try:
        config = settings.load()
        findings.append(Finding("settings", Status.OK, f"pool {config.pool}, {format_size(config.size)}"))
    except ConfigError as error:
        config = settings.Config.defaults()
        findings.append(
            Finding(
                "settings", Status.FAULT, str(error), "correct it there, or unset it; `kvplug config` shows the others"
            )
        )
    around = _Surroundings(config, shm, Path(root))
    for check in _CHECKS:
        findings += check(around)
    return findings


def report(findings: list[Finding]) -> dict[str, Any]:
    """The same for machines: ``{"ok": bool, "findings": [{name, status, found, fix}, ...]}``."""
    return {
        "ok": all(finding.status is not Status.FAULT for finding in findings),
        "findings": [asdict(finding) | {"status": finding.status.value} for finding in findings],
    }
