"""The named segment: created whole or not at all, attached through ordered gates, removed under its name's lock.

A segment is built under a temporary name and linked to its own when it is complete, so nobody ever sees half of one.
All of create, adopt and unlink happens under a lock file per pool name and user, which is never deleted (deleting a
lock file is how two processes come to hold "the same" lock). Its name is part of the format: versions that disagree on
it must not share segments. Nothing of a segment is mapped before its size was compared with
what its header says: past the end of a truncated file comes SIGBUS, not an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import mmap
import os
import re
import resource
import stat
import struct
import time
import uuid
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import posix_ipc

from kvplug import hostmem
from kvplug.errors import (
    LockTimeoutError,
    PoolError,
    PoolFormatError,
    PoolNotFoundError,
    PoolOwnerError,
    PoolSpaceError,
)
from kvplug.shm import layout as lay
from kvplug.shm.layout import Geometry
from kvplug.shm.liveness import alive_clients, byte_lock_path_fd, close_private, open_private
from kvplug.sizes import format_size

NAME_LOCK_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.002
SPACE_RESERVE_BYTES: Final = 16 << 20  # left free in /dev/shm for everybody else
_SEGMENT = re.compile(r"kvplug\.(?P<pool>[A-Za-z0-9_-][A-Za-z0-9._-]{0,63})\.v(?P<format>\d{1,6})")
_READ_WRITE: Final = 0o600


def segment_name(pool: str) -> str:
    """The POSIX name (without the slash) of a pool's segment in this version's format."""
    return f"kvplug.{pool}.v{lay.FORMAT}"


def segment_path(pool: str) -> str:
    """Where that name is in the file system."""
    return os.path.join(hostmem.DEV_SHM, segment_name(pool))


def lock_path(pool: str) -> str:
    """The lock file of a pool's name: one for each user, since nobody can open another user's."""
    return os.path.join(hostmem.DEV_SHM, f"kvplug.{pool}.u{os.geteuid()}.lock")


@contextlib.contextmanager
def name_lock(pool: str, timeout_s: float = NAME_LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock file of a pool's name. Raises LockTimeoutError, PoolOwnerError, PoolError."""
    path = lock_path(pool)
    try:
        fd = open_private(path, os.O_CREAT | os.O_RDWR, _READ_WRITE)
    except PermissionError as e:
        raise PoolOwnerError(f"{path} belongs to another user: choose another pool name (KVPLUG_POOL)") from e
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise PoolError(f"{path} is a symbolic link, which is not followed: remove it") from e
        raise PoolError(f"cannot open {path}: {e.strerror}. Is {hostmem.DEV_SHM} there and writable?") from e
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LockTimeoutError(
                        f"{path} was held by another process for {timeout_s} s while it creates, attaches or removes "
                        f"the pool"
                    ) from None
                time.sleep(POLL_S)
        yield
    finally:
        close_private(fd)


@dataclasses.dataclass(slots=True)
class Segment:
    """A mapped segment. ``lock_fd`` is a description of its own, never mapped: see :mod:`kvplug.shm.lock`."""

    pool: str
    path: str
    geometry: Geometry
    mapping: mmap.mmap
    memory: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int64]
    base: int
    lock_fd: int
    inode: int
    uuid: bytes
    is_new: bool = False
    """Whether it was this attachment that made the pool."""

    def still_named(self) -> bool:
        """Whether the pool's name still leads to this segment."""
        try:
            return os.stat(self.path).st_ino == self.inode
        except FileNotFoundError:
            return False


def check_space(pool_bytes: int) -> None:
    """Refuse a size that would end in SIGBUS or the OOM killer. Raises PoolSpaceError with both numbers."""
    space = hostmem.shm_space()
    if space is None:
        raise PoolSpaceError(f"{hostmem.DEV_SHM} does not exist: kvplug needs POSIX shared memory")
    if pool_bytes + SPACE_RESERVE_BYTES > space.free_bytes:
        raise PoolSpaceError(
            f"a pool of {format_size(pool_bytes)} does not fit: {hostmem.DEV_SHM} has {format_size(space.free_bytes)} "
            f"of {format_size(space.total_bytes)} free. Set a smaller KVPLUG_SIZE, or make it larger (docker: "
            f"--shm-size or --ipc=host)"
        )
    memory = hostmem.memory()
    if memory.limit_bytes and pool_bytes > memory.limit_bytes - memory.used_bytes:
        raise PoolSpaceError(
            f"a pool of {format_size(pool_bytes)} does not fit: {format_size(memory.limit_bytes - memory.used_bytes)} "
            f"of {format_size(memory.limit_bytes)} of memory are free here ({memory.source}). Set a smaller KVPLUG_SIZE"
        )


def _header_words(
    geometry: Geometry, *, policy: int, until_last_exit: bool, grace_ns: int, pool_uuid: bytes
) -> list[int]:
    words = [0] * lay.HEADER_WORDS
    words[lay.P_MAGIC] = int.from_bytes(lay.MAGIC, "little", signed=True)
    words[lay.P_FORMAT] = lay.FORMAT
    words[lay.P_LIVE_OFFSET] = geometry.o_client * 8
    words[lay.P_LIVE_COUNT] = lay.MAX_CLIENTS
    words[lay.P_CREATED_UNIX_NS] = time.time_ns()
    words[lay.P_UUID0], words[lay.P_UUID1] = struct.unpack("<qq", pool_uuid)
    words[lay.P_LAYOUT0] = lay.layout_hash()
    for name, at in lay.HEADER_OF_GEOMETRY.items():
        words[at] = getattr(geometry, name)
    words[lay.H_MAX_CLIENTS] = lay.MAX_CLIENTS
    words[lay.H_POLICY] = policy
    words[lay.H_PERSIST] = int(until_last_exit)
    words[lay.H_GRACE_NS] = grace_ns
    return words


def create(pool: str, geometry: Geometry, *, policy: int, until_last_exit: bool, grace_ns: int) -> None:
    """Make the segment and link its name. The caller holds the name lock and knows that the name is free."""
    check_space(geometry.segment_bytes)
    for name in os.listdir(hostmem.DEV_SHM):  # what a creator that was killed left behind
        if re.fullmatch(rf"kvplug\.{re.escape(pool)}\.new\.\d+\.[0-9a-f]{{8}}", name) and _ours(
            os.path.join(hostmem.DEV_SHM, name)
        ):
            os.unlink(os.path.join(hostmem.DEV_SHM, name))
    name = f"kvplug.{pool}.new.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    temporary = os.path.join(hostmem.DEV_SHM, name)
    try:
        shm = posix_ipc.SharedMemory("/" + name, posix_ipc.O_CREX, mode=_READ_WRITE, size=geometry.segment_bytes)
    except (OSError, posix_ipc.Error, ValueError) as e:
        raise PoolError(f"cannot create {temporary}: {e}") from e
    try:
        try:
            reserve(shm.fd, 0, geometry.data_offset)
            words = _header_words(
                geometry,
                policy=policy,
                until_last_exit=until_last_exit,
                grace_ns=grace_ns,
                pool_uuid=uuid.uuid4().bytes,
            )
            os.pwrite(shm.fd, struct.pack(f"<{len(words)}q", *words), 0)
            os.link(temporary, segment_path(pool))
        except FileExistsError as e:  # this user's processes hold the name lock: it was another's
            raise PoolOwnerError(
                f"{segment_path(pool)} was made by another user meanwhile: choose another pool name (KVPLUG_POOL)"
            ) from e
        except OSError as e:
            raise PoolSpaceError(
                f"cannot reserve {geometry.data_offset} bytes of tables in {temporary}: {e.strerror}"
            ) from e
    finally:
        shm.close_fd()
        os.unlink(temporary)


def reserve(fd: int, offset: int, nbytes: int) -> None:
    """Take memory for a range of the segment now, so that touching it can't fail later. OSError if there is none."""
    os.posix_fallocate(fd, offset, nbytes)


def _ours(path: str) -> bool:
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _read_preamble(fd: int, path: str) -> tuple[list[int], os.stat_result]:
    """The gates that hold for pools of every format, in order: kind, owner, mode, length, magic."""
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode):
        raise PoolFormatError(f"{path} is not a regular file: not a pool. Remove it, or choose another KVPLUG_POOL")
    if st.st_uid != os.geteuid():
        raise PoolOwnerError(
            f"{path} belongs to uid {st.st_uid}, this process runs as {os.geteuid()}: choose another KVPLUG_POOL"
        )
    if st.st_mode & 0o777 != _READ_WRITE:
        raise PoolOwnerError(
            f"{path} has mode {st.st_mode & 0o777:o}, a pool has 600: it is not one, or was tampered with"
        )
    raw = os.pread(fd, lay.HEADER_WORDS * 8, 0)
    if len(raw) < lay.HEADER_WORDS * 8:
        raise PoolFormatError(f"{path} is {st.st_size} bytes long, too short for a header: not a pool. Remove it")
    words = list(struct.unpack(f"<{lay.HEADER_WORDS}q", raw))
    if raw[:8] != lay.MAGIC:
        raise PoolFormatError(
            f"{path} begins with {raw[:8]!r} instead of {lay.MAGIC!r}: not a pool. Remove it, or choose another "
            f"KVPLUG_POOL"
        )
    return words, st


def _read_header(fd: int, path: str) -> tuple[list[int], os.stat_result]:
    """The gates that need no mapping: those of every format, then the format."""
    words, st = _read_preamble(fd, path)
    if words[lay.P_FORMAT] != lay.FORMAT:
        raise PoolFormatError(f"{path} has format {words[lay.P_FORMAT]}, this version of kvplug uses {lay.FORMAT}")
    return words, st


def _check_layout(words: list[int], st: os.stat_result, path: str) -> Geometry:
    """The remaining gates: layout hash, geometry, size."""
    if words[lay.P_LAYOUT0] != lay.layout_hash():
        raise PoolFormatError(
            f"{path} was laid out by another build of kvplug (layout {words[lay.P_LAYOUT0] & (1 << 64) - 1:016x}, here "
            f"{lay.layout_hash() & (1 << 64) - 1:016x}): stop its users and run `kvplug rm`, or choose another "
            f"KVPLUG_POOL"
        )
    geometry = Geometry.from_header(words)
    if words[lay.H_MAX_CLIENTS] != lay.MAX_CLIENTS or words[lay.P_LIVE_OFFSET] != geometry.o_client * 8:
        raise PoolFormatError(f"{path}: the header's client table is not where this version has it")
    if st.st_size != geometry.segment_bytes:
        change = "truncated" if st.st_size < geometry.segment_bytes else "something was appended"
        raise PoolFormatError(
            f"{path} is {st.st_size} bytes long, its header says {geometry.segment_bytes}: {change}. Remove it"
        )
    return geometry


def open_segment(pool: str) -> Segment:
    """Map an existing pool. PoolNotFoundError, or the gate that it failed. The caller holds the name lock."""
    path = segment_path(pool)
    try:
        shm = posix_ipc.SharedMemory("/" + segment_name(pool))
    except posix_ipc.ExistentialError as e:
        raise PoolNotFoundError(f"there is no pool {pool!r} ({path})") from e
    except ValueError as e:  # shm_open knows no other way to say this
        raise PoolFormatError(f"cannot open {path}: it is not a regular file ({e})") from e
    except (OSError, posix_ipc.Error) as e:
        raise PoolOwnerError(f"cannot open {path}: {e}") from e
    try:
        words, st = _read_header(shm.fd, path)
        geometry = _check_layout(words, st, path)
        lock_fd = byte_lock_path_fd(path)
        try:
            if os.fstat(lock_fd).st_ino != st.st_ino:
                raise PoolError(f"{path} was replaced while it was being opened")
            mapping = _map(shm.fd, geometry.segment_bytes, path)
        except BaseException:
            close_private(lock_fd)
            raise
    finally:
        shm.close_fd()
    memory = np.frombuffer(mapping, np.uint8)
    table = memory[: geometry.data_offset].view(np.int64)
    pool_uuid = struct.pack("<qq", words[lay.P_UUID0], words[lay.P_UUID1])
    return Segment(pool, path, geometry, mapping, memory, table, int(memory.ctypes.data), lock_fd, st.st_ino, pool_uuid)


def _map(fd: int, nbytes: int, path: str) -> mmap.mmap:
    try:
        return mmap.mmap(fd, nbytes)
    except OSError as e:
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limit = "" if soft == resource.RLIM_INFINITY else f"; this process may map {soft} bytes in all (ulimit -v)"
        raise PoolSpaceError(
            f"cannot map the {nbytes} bytes of {path}: {e.strerror}{limit}. Raise that limit, or set a smaller "
            f"KVPLUG_SIZE for a new pool"
        ) from e


@dataclasses.dataclass(frozen=True, slots=True)
class PoolInfo:
    """One segment found in /dev/shm. ``problem`` is empty for a pool that this version can use."""

    name: str
    path: str
    format: int
    size_bytes: int
    reserved_bytes: int
    uid: int
    mode: int
    created_unix_s: float
    clients_alive: int
    """-1: it can't be opened, so nobody can say."""
    usable: bool
    problem: str


def attached(n_clients: int) -> str:
    """``3 processes attached``, or ``? processes attached`` where nobody can say."""
    return f"{'?' if n_clients < 0 else n_clients} process{'es' * (n_clients != 1)} attached"


def list_pools() -> list[PoolInfo]:
    """All kvplug segments of this host, of any format and owner. Takes no lock and changes nothing."""
    found = []
    try:
        names = sorted(os.listdir(hostmem.DEV_SHM))
    except OSError as e:
        raise PoolError(f"cannot list {hostmem.DEV_SHM}: {e.strerror}") from e
    for name in names:
        match = _SEGMENT.fullmatch(name)
        if match is None:
            continue
        path = os.path.join(hostmem.DEV_SHM, name)
        with contextlib.suppress(FileNotFoundError):
            found.append(_inspect(match["pool"], int(match["format"]), path))
    return found


def _inspect(pool: str, fmt: int, path: str) -> PoolInfo:
    st = os.lstat(path)
    created, alive, problem = 0.0, 0, ""
    try:
        fd = byte_lock_path_fd(path)
    except OSError as e:
        alive, problem = -1, f"cannot be opened: {e.strerror}"
        if e.errno == errno.ELOOP:
            alive, problem = 0, "is a symbolic link, which is not followed"
    else:
        try:
            words, st = _read_preamble(fd, path)
            created = words[lay.P_CREATED_UNIX_NS] / 1e9
            alive = len(alive_clients(fd, words[lay.P_LIVE_OFFSET], words[lay.P_LIVE_COUNT]))
            _check_layout(_read_header(fd, path)[0], st, path)
        except PoolError as e:
            problem = str(e)
        except OSError as e:
            problem = f"{path}: the header names no place to ask whether its clients live ({e.strerror})"
        finally:
            close_private(fd)
    return PoolInfo(
        pool,
        path,
        fmt,
        st.st_size,
        st.st_blocks * 512,
        st.st_uid,
        st.st_mode & 0o777,
        created,
        alive,
        not problem,
        problem,
    )


def remove_pool(name: str, *, force: bool = False) -> None:
    """Unlink a pool's segments, of this and of other formats. Attached processes keep their mapping until they end.

    Raises PoolNotFoundError, PoolError while processes are attached (unless ``force``), PoolOwnerError.
    """
    if not any(info.name == name for info in list_pools()):
        raise PoolNotFoundError(f"there is no pool {name!r}")
    with name_lock(name):
        infos = [info for info in list_pools() if info.name == name]
        if not infos:
            raise PoolNotFoundError(f"there is no pool {name!r}")
        for info in infos:
            if info.uid != os.geteuid():
                raise PoolOwnerError(f"{info.path} belongs to uid {info.uid}")
            if info.clients_alive > 0 and not force:
                raise PoolError(f"pool {name!r} has {attached(info.clients_alive)}; stop them, or force it")
        for info in infos:
            try:
                remove_segment_file(info.path)
            except OSError as e:
                raise PoolError(f"cannot remove {info.path}: {e.strerror}") from e


def remove_segment_file(path: str) -> None:
    """Retire and unlink one segment. The caller holds the name lock."""
    retire(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def retire(path: str) -> None:
    """Tell attached processes, by a word in the header, that the name no longer leads to their segment."""
    try:
        fd = byte_lock_path_fd(path)
    except OSError:
        return
    try:
        words, _ = _read_header(fd, path)
        if words[lay.P_LAYOUT0] == lay.layout_hash():
            os.pwrite(fd, struct.pack("<q", 1), lay.H_RETIRED * 8)
    except PoolError:
        return
    finally:
        close_private(fd)
