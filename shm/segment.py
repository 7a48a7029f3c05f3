"""The named segment: created whole or not at all, attached through ordered gates, removed under its name's lock.

A segment is built under a temporary name and linked to its own when it is complete, so nobody ever sees half of one.
All of create, adopt and unlink happens under a lock file per pool name and user. It is there as long as somebody holds
it or the pool is there: who holds it deletes it where it leaves no pool, and who gets it looks whether the name still
leads to what was locked (else two processes come to hold "the same" lock). Its name is part of the format: versions
that disagree on it must not share segments. Nothing of a segment is mapped before its size was compared with
what its header says: past the end of a truncated file comes SIGBUS, not an error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import resource
import stat
import struct
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import posix_ipc

from kvplug import hostmem
from kvplug.errors import (
    ConfigError,
    LockTimeoutError,
    PoolError,
    PoolFormatError,
    PoolNotFoundError,
    PoolOwnerError,
    PoolSpaceError,
)
from kvplug.shm import layout as lay
from kvplug.shm.layout import Geometry
from kvplug.shm.liveness import (
    byte_lock_path_fd,
    close_private,
    count_listed,
    count_locks,
    mapped_under,
    open_private,
    try_lock_byte,
    unlock_byte,
)
from kvplug.shm.policies import by_number
from kvplug.sizes import format_size

NAME_LOCK_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.002
RESERVE_STEP_BYTES: Final = 4 << 20  # a millisecond or two
SMALLEST_POOL_BYTES: Final = 2 << 20
_SEGMENT = re.compile(r"kvplug\.(?P<pool>[A-Za-z0-9_-][A-Za-z0-9._-]{0,63})\.v(?P<format>\d{1,6})")
_READ_WRITE: Final = 0o600
_REMOVE: Final = "`kvplug rm` removes it when nobody uses it; or choose another pool name (KVPLUG_POOL)"
CREATING_BYTE: Final = 0
"""Locked while its creator makes a segment: no client's, for those follow the header."""


def segment_name(pool: str) -> str:
    """The POSIX name (without the slash) of a pool's segment in this version's format."""
    return f"kvplug.{pool}.v{lay.FORMAT}"


def segment_path(pool: str) -> str:
    """Where that name is in the file system."""
    return os.path.join(hostmem.DEV_SHM, segment_name(pool))


def lock_path(pool: str) -> str:
    """The lock file of a pool's name: one for each user, since nobody can open another user's."""
    return os.path.join(hostmem.DEV_SHM, f"{segment_name(pool)}.u{os.geteuid()}.lock")


@contextlib.contextmanager
def name_lock(pool: str, timeout_s: float = NAME_LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock file of a pool's name, which goes where no pool is left.

    Raises LockTimeoutError, PoolOwnerError, PoolError.
    """
    path = lock_path(pool)
    deadline = time.monotonic() + timeout_s
    while True:
        fd = _open_lock(path)
        try:
            _wait_for_lock(fd, path, deadline, timeout_s)
            if _is_named(fd, path):
                break
        except BaseException:
            close_private(fd)
            raise
        close_private(fd)  # its holder has deleted it: the name leads nowhere, or to another one
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not _files_of(pool):
                os.unlink(path)
        close_private(fd)


def _open_lock(path: str) -> int:
    try:
        return open_private(path, os.O_CREAT | os.O_RDWR, _READ_WRITE)
    except PermissionError as e:
        raise PoolOwnerError(f"{path} belongs to another user: choose another pool name (KVPLUG_POOL)") from e
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise PoolError(f"{path} is a symbolic link, which is not followed: remove it") from e
        raise PoolError(f"cannot open {path}: {e.strerror}. Is {hostmem.DEV_SHM} there and writable?") from e


def _wait_for_lock(fd: int, path: str, deadline: float, timeout_s: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LockTimeoutError(
                    f"{path} was held by another process for {timeout_s} s while it creates, attaches or removes "
                    f"the pool"
                ) from None
            time.sleep(POLL_S)


def _is_named(fd: int, path: str) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


def _files_of(pool: str, what: str = r"v\d{1,6}|new\.\d+\.[0-9a-f]{8}") -> list[str]:
    """Paths under the pool's name: segments of any format, and what a creator has begun."""
    name = re.compile(rf"kvplug\.{re.escape(pool)}\.(?:{what})")
    return [os.path.join(hostmem.DEV_SHM, one) for one in os.listdir(hostmem.DEV_SHM) if name.fullmatch(one)]


class Segment(NamedTuple):
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
            return os.stat(self.path, follow_symlinks=False).st_ino == self.inode
        except OSError as e:
            return e.errno not in (errno.ENOENT, errno.ENOTDIR)  # any other says nothing about the name

    def open_again(self) -> int:
        """A descriptor of the file, on a description of its own: the caller closes it. Raises PoolError."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise PoolError(f"cannot open {self.path}: {e.strerror}") from None
        if os.fstat(fd).st_ino != self.inode:
            os.close(fd)
            raise PoolError(f"{self.path} was replaced by another pool")
        return fd

    def reserve_slab(self, slab: int) -> bool:
        """Take the memory of one slab. False if the pool's name leads elsewhere by now; OSError if there is no memory.

        By a description of its own, for this call: the one that carries the locks may be closed by another thread.
        """
        g = self.geometry
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_ino != self.inode:
                return False
            reserve(fd, g.data_offset + slab * g.slab_bytes, g.slab_bytes)
            return True
        finally:
            os.close(fd)


def check_space(pool_bytes: int) -> None:
    """Refuse a size that would end in SIGBUS or the OOM killer. Raises PoolSpaceError with the numbers."""
    if hostmem.shm_space() is None:
        raise PoolSpaceError(f"{hostmem.DEV_SHM} does not exist: kvplug needs POSIX shared memory")
    room = hostmem.room()
    if room is not None and not room.fits(pool_bytes):
        smaller = f"set KVPLUG_SIZE to at most {room.largest}, " if room.nbytes >= SMALLEST_POOL_BYTES else ""
        raise PoolSpaceError(
            f"a pool of {format_size(pool_bytes)} does not fit: {room.text}. What helps: {smaller}remove pools that "
            f"nobody uses (`kvplug pools`), or give the machine or container more (docker: --shm-size or --ipc=host, "
            f"--memory)"
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
    """Make the segment and link its name.

    The caller holds the name lock, knows that the name is free, and has asked :func:`check_space`.
    """
    _remove_unfinished(pool)
    name = f"kvplug.{pool}.new.{os.getpid()}.{os.urandom(4).hex()}"
    temporary = os.path.join(hostmem.DEV_SHM, name)
    try:
        shm = posix_ipc.SharedMemory("/" + name, posix_ipc.O_CREX, mode=_READ_WRITE, size=geometry.segment_bytes)
    except (OSError, posix_ipc.Error, ValueError) as e:
        raise PoolError(f"cannot create {temporary}: {e}") from e
    try:
        try_lock_byte(shm.fd, CREATING_BYTE)
        try:
            reserve(shm.fd, 0, geometry.data_offset)
            words = _header_words(
                geometry,
                policy=policy,
                until_last_exit=until_last_exit,
                grace_ns=grace_ns,
                pool_uuid=os.urandom(16),
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
        unlock_byte(shm.fd, CREATING_BYTE)  # a child that was forked meanwhile keeps the description
        shm.close_fd()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def reserve(fd: int, offset: int, nbytes: int) -> None:
    """Take memory for a range of the segment now, so that touching it can't fail later. OSError if there is none.

    By steps: a signal ends the call and undoes it, so that under a profiler's timer a large one would never be done.
    """
    for at in range(offset, offset + nbytes, RESERVE_STEP_BYTES):
        os.posix_fallocate(fd, at, min(RESERVE_STEP_BYTES, offset + nbytes - at))


def _remove_unfinished(pool: str) -> int:
    """Remove what creators of this user that were killed had begun. How many. The caller holds the name lock."""
    n = 0
    for path in _files_of(pool, r"new\.\d+\.[0-9a-f]{8}"):
        with contextlib.suppress(OSError):  # gone, or nothing that can be unlinked
            st = os.lstat(path)
            fd = _open_to_look(path, st)
            try:
                # A creator may live all the same: the same user under another number, in a container.
                if st.st_uid == os.geteuid() and _count_clients(fd, path, st) == 0:
                    os.unlink(path)
                    n += 1
            finally:
                if fd >= 0:
                    close_private(fd)
    return n


def _read_preamble(fd: int, path: str) -> tuple[list[int], os.stat_result]:
    """The gates that hold for pools of every format, in order: kind, owner, mode, length, magic."""
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode):
        raise PoolFormatError(f"{path} is not a regular file: not a pool. {_REMOVE}")
    if st.st_uid != os.geteuid():
        raise PoolOwnerError(
            f"{path} belongs to uid {st.st_uid}, this process runs as {os.geteuid()}: choose another KVPLUG_POOL"
        )
    if st.st_mode & 0o777 != _READ_WRITE:
        raise PoolOwnerError(
            f"{path} has mode {st.st_mode & 0o777:o}, a pool has 600: it is not one, or was tampered with. {_REMOVE}"
        )
    raw = os.pread(fd, lay.HEADER_WORDS * 8, 0)
    if len(raw) < lay.HEADER_WORDS * 8:
        raise PoolFormatError(f"{path} is {st.st_size} bytes long, too short for a header: not a pool. {_REMOVE}")
    words = list(struct.unpack(f"<{lay.HEADER_WORDS}q", raw))
    if raw[:8] != lay.MAGIC:
        raise PoolFormatError(f"{path} begins with {raw[:8]!r} instead of {lay.MAGIC!r}: not a pool. {_REMOVE}")
    return words, st


def read_header(fd: int, path: str) -> tuple[list[int], os.stat_result]:
    """The gates that need no mapping: those of every format, then the format."""
    words, st = _read_preamble(fd, path)
    if words[lay.P_FORMAT] != lay.FORMAT:
        raise PoolFormatError(
            f"{path} has format {words[lay.P_FORMAT]}, this version of kvplug uses {lay.FORMAT}. {_REMOVE}"
        )
    return words, st


def check_layout(words: list[int], st: os.stat_result, path: str) -> Geometry:
    """The remaining gates: layout hash, geometry, policy, size."""
    if words[lay.P_LAYOUT0] != lay.layout_hash():
        raise PoolFormatError(
            f"{path} was laid out by another build of kvplug (layout {words[lay.P_LAYOUT0] & (1 << 64) - 1:016x}, here "
            f"{lay.layout_hash() & (1 << 64) - 1:016x}): stop its users. {_REMOVE}"
        )
    geometry = Geometry.from_header(words)
    if words[lay.H_MAX_CLIENTS] != lay.MAX_CLIENTS or words[lay.P_LIVE_OFFSET] != geometry.o_client * 8:
        raise PoolFormatError(f"{path}: the header's client table is not where this version has it. {_REMOVE}")
    try:
        by_number(words[lay.H_POLICY])
    except ConfigError as e:
        raise PoolFormatError(f"{path}: {e}. {_REMOVE}") from None
    if st.st_size != geometry.segment_bytes:
        change = "truncated" if st.st_size < geometry.segment_bytes else "something was appended"
        raise PoolFormatError(
            f"{path} is {st.st_size} bytes long, its header says {geometry.segment_bytes}: {change}. {_REMOVE}"
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
        words, st = read_header(shm.fd, path)
        geometry = check_layout(words, st, path)
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


class PoolInfo(NamedTuple):
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
    """By the locks that they hold, whatever has become of the file. -1: nobody can say, so it counts as in use."""
    usable: bool
    problem: str


def attached(n_clients: int) -> str:
    """``3 processes attached``, or that nobody can say."""
    if n_clients < 0:
        return "perhaps processes attached (the file can't be opened, and /proc/locks can't be read)"
    return f"{n_clients} process{'es' * (n_clients != 1)} attached"


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


_KINDS: Final = {
    stat.S_IFLNK: "is a symbolic link, which is not followed",
    stat.S_IFDIR: "is a folder, not a pool",
    stat.S_IFIFO: "is a pipe, not a pool",
    stat.S_IFSOCK: "is a socket, not a pool",
}


def _open_to_look(path: str, st: os.stat_result) -> int:
    """A private description of what is there, if it is a file that can be opened; else -1."""
    if stat.S_ISREG(st.st_mode):  # opening a pipe or a device could do something to it
        with contextlib.suppress(OSError):
            return open_private(path, os.O_RDONLY | os.O_NONBLOCK)
    return -1


def _count_clients(fd: int, path: str, st: os.stat_result) -> int:
    """How many clients hold a lock on what is there: asked by ``fd`` if that is one. -1: nobody can say."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            return count_locks(fd)
    inodes = {(st.st_dev, st.st_ino)}
    if stat.S_ISLNK(st.st_mode):
        with contextlib.suppress(OSError):
            target = os.stat(path)
            inodes.add((target.st_dev, target.st_ino))
    return count_listed(inodes)


def _inspect(pool: str, fmt: int, path: str) -> PoolInfo:
    st = os.lstat(path)
    created, problem = 0.0, ""
    fd = _open_to_look(path, st)
    alive = _count_clients(fd, path, st)
    if fd < 0:
        problem = f"{path} {_KINDS.get(stat.S_IFMT(st.st_mode), 'can not be opened by this user')}"
    else:
        try:
            words, st = _read_preamble(fd, path)
            created = words[lay.P_CREATED_UNIX_NS] / 1e9
            check_layout(read_header(fd, path)[0], st, path)
        except PoolError as e:
            problem = str(e)
        except OSError as e:
            problem = f"{path} can not be read: {e.strerror}"
        finally:
            close_private(fd)
    if problem and alive == 0:  # the pool itself may have been pushed aside under its clients
        alive = _pushed_aside(path, st)
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


def _pushed_aside(path: str, st: os.stat_result) -> int:
    """How many clients are attached to another file that had this path before. -1: nobody can say."""
    others = mapped_under(path, st.st_dev) - {(st.st_dev, st.st_ino)}
    return count_listed(others) if others else 0


def remove_pool(name: str, *, force: bool = False) -> None:
    """Unlink a pool's segments, of this and of other formats. Attached processes keep their mapping until they end.

    What can't be read is in use if the kernel says so, or can't say. Raises PoolNotFoundError, PoolError while
    processes are attached (unless ``force``), PoolOwnerError.
    """
    nobody = PoolNotFoundError(f"there is no pool {name!r} (`kvplug pools` lists those that are there)")
    if not _files_of(name) and not os.path.lexists(lock_path(name)):
        raise nobody
    _refuse_others([info for info in list_pools() if info.name == name])
    with name_lock(name):
        unfinished = _remove_unfinished(name)
        infos = [info for info in list_pools() if info.name == name]
        if not infos and not unfinished:
            raise nobody
        _refuse_others(infos)
        for info in infos:
            if info.clients_alive and not force:
                raise PoolError(
                    f"pool {name!r} has {attached(info.clients_alive)}; stop them, or remove it all the same with "
                    f"--force: they go on and store nothing more"
                )
        for info in infos:
            try:
                remove_segment_file(info.path)
            except IsADirectoryError as e:
                raise PoolError(f"cannot remove {info.path}: it is a folder, not a pool; remove it with rmdir") from e
            except OSError as e:
                raise PoolError(f"cannot remove {info.path}: {e.strerror}") from e


def _refuse_others(infos: list[PoolInfo]) -> None:
    for info in infos:
        if info.uid != os.geteuid():
            raise PoolOwnerError(
                f"{info.path} belongs to uid {info.uid}, this process runs as {os.geteuid()}: remove it as its owner "
                f"(sudo -u '#{info.uid}' kvplug rm --pool {info.name})"
            )


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
        words, _ = read_header(fd, path)
        if words[lay.P_LAYOUT0] == lay.layout_hash():
            os.pwrite(fd, struct.pack("<q", 1), lay.H_RETIRED * 8)
    except PoolError:
        return
    finally:
        close_private(fd)
