"""blake3 of large files, done once: remembered by device, inode, size, mtime and ctime in a small cache file.

Files are read, not mapped: a mapped file that someone truncates kills the process with SIGBUS, and this runs inside
an engine. Reading costs little (about 6 GiB/s a core from the page cache, against 6.7 mapped), and disks are slower.

The cache file is trusted only if it is a plain file of ours that nobody else may touch, and holds what it should;
anything else is ignored and replaced. Losing it costs time, never correctness; so does not being able to write it.

The ranks of an engine start together and all want the same hashes. One of them reads a file, by a lock that the kernel
releases if it dies; the others wait for what it remembers, and the next one takes over if there is nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from typing import TypeAlias

import msgspec
from blake3 import blake3

from kvplug.errors import DecodeError, NamespaceError
from kvplug.home import xdg_folder
from kvplug.outside import decoded
from kvplug.shm.liveness import close_private, open_private, try_lock_byte, unlock_byte

__all__ = ["SETTLED_S", "FileStamp", "HashCache", "hash_file", "stamp_of"]

FileStamp: TypeAlias = tuple[int, int, int, int, int]
"""(device, inode, size in bytes, mtime ns, ctime ns): if equal, the content is taken to be unchanged."""

_CHUNK_BYTES = 16 << 20
"""Large, since the GIL is taken between chunks: beside a busy Python thread each may wait 5 ms for it."""
_CACHE_MAX_BYTES = 4 << 20
_CACHE_MAX_FILES = 8192
_CACHE_FORMAT = 1
_CACHE_NAME = "weights.json"
_LOCK_NAME = "weights.lock"
SETTLED_S = 2.0
"""The coarsest clock of a file system: what was changed less than this ago may change again on the same tick."""
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 20 << 20
_POLL_S = 0.05
_WRITE_PATIENCE_S = 1.0
_WRITER_BYTE = 0
_HEX64 = re.compile(r"[0-9a-f]{64}")


class _CacheFile(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    files: list[tuple[int, int, int, int, int, str]]


_CACHE_DECODER = msgspec.json.Decoder(_CacheFile)


def stamp_of(status: os.stat_result) -> FileStamp:
    """What a file is recognised by."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class HashCache:
    """Hashes of files that were read before. All methods are safe to call from several threads and processes.

    `directory`: where the cache file lies; by default `$XDG_CACHE_HOME/kvplug`, or `~/.cache/kvplug`.
    `settled_s`: a file changed less than this before it is read is not remembered, since a later change could fall on
    the same tick of the file system's clock.
    `patience_s`: how long another process that hashes a file is waited for, besides the time that a disk of 20 MiB/s
    would take to read it. Whoever is over that (it may be stopped) is no longer waited for.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        settled_s: float = SETTLED_S,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.settled_ns = int(settled_s * 1e9)
        self.patience_s = patience_s
        self.directory = os.fspath(directory) if directory is not None else _default_directory()

    @property
    def path(self) -> str:
        """The cache file."""
        return os.path.join(self.directory, _CACHE_NAME)

    def get(self, stamp: FileStamp) -> bytes | None:
        """The 32-byte hash of the file with this stamp, or None."""
        return self._load().get(stamp)

    def put(self, stamp: FileStamp, digest: bytes) -> bool:
        """Remember a hash; False if that could not be written (a full disk, a foreign directory), which is no error.

        Where no lock can be had, one of two processes that write at the same instant may lose its entry.
        """
        with self._locked(_WRITER_BYTE, _WRITE_PATIENCE_S, None):
            entries = self._load()
            entries.pop(stamp, None)
            entries[stamp] = digest
            newest = list(entries.items())[-_CACHE_MAX_FILES:]
            data = msgspec.json.encode(_CacheFile(_CACHE_FORMAT, [(*known, value.hex()) for known, value in newest]))
            try:
                self._replace(data)
            except OSError:
                return False
        return True

    @contextlib.contextmanager
    def turn(self, stamp: FileStamp, stop: threading.Event | None = None) -> Iterator[None]:
        """For the one who hashes this file: look into the cache again once it is your turn.

        Waits for whoever has the turn, until it has ended or died, `stop` is set (NamespaceError), or patience is over;
        then, and where no lock can be had, several hash at once.
        """
        byte = 1 + int.from_bytes(blake3(repr(stamp).encode()).digest()[:7], "little")
        with self._locked(byte, self.patience_s + stamp[2] / _SLOWEST_BYTES_PER_S, stop):
            yield

    @contextlib.contextmanager
    def _locked(self, byte: int, patience_s: float, stop: threading.Event | None) -> Iterator[None]:
        """Holds one byte of the lock file, if it can be had within `patience_s` seconds."""
        try:
            self._own_directory()
            fd = open_private(os.path.join(self.directory, _LOCK_NAME), os.O_RDWR | os.O_CREAT)
        except OSError:
            yield
            return
        try:
            deadline = time.monotonic() + patience_s
            with contextlib.suppress(OSError):  # a file system without locks
                while not try_lock_byte(fd, byte) and time.monotonic() < deadline:
                    if stop is None:
                        time.sleep(_POLL_S)
                    elif stop.wait(_POLL_S):
                        raise NamespaceError("hashing was stopped")
            yield
        finally:
            unlock_byte(fd, byte)
            close_private(fd)

    def _load(self) -> dict[FileStamp, bytes]:
        data = self._read()
        if data is None:
            return {}
        try:
            content = decoded(_CACHE_DECODER, data, self.path)
        except DecodeError:
            return {}
        if content.format != _CACHE_FORMAT or not all(_HEX64.fullmatch(row[5]) for row in content.files):
            return {}
        return {row[:5]: bytes.fromhex(row[5]) for row in content.files}

    def _read(self) -> bytes | None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
            if not ours or status.st_size > _CACHE_MAX_BYTES:
                return None
            try:
                return file.read(_CACHE_MAX_BYTES)
            except OSError:
                return None

    def _own_directory(self) -> None:
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        status = os.stat(self.directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(f"{self.directory} is not ours alone to write")

    def _replace(self, data: bytes) -> None:
        self._own_directory()
        temporary = f"{self.path}.{secrets.token_hex(8)}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _default_directory() -> str:
    return os.path.join(xdg_folder("XDG_CACHE_HOME", ".cache"), "kvplug")


def hash_file(
    path: str | os.PathLike[str],
    *,
    cache: HashCache | None = None,
    stop: threading.Event | None = None,
    threads: int | None = None,
) -> tuple[bytes, FileStamp]:
    """blake3 (32 bytes) of a regular file's content, and the stamp of the file that has it.

    `cache`: looked up first and filled afterwards. Of several processes with the same cache one reads the file, and
    the others wait for it. `stop`: set it to give up within one chunk (16 MiB).
    `threads`: for hashing; by default half of the cores, at most 4, since an engine is starting beside it.

    Raises NamespaceError if the path is no readable regular file, if the file changed while it was read, or if stopped.
    """
    path = os.fspath(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(f"{path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NamespaceError(f"{path}: not a regular file")
        stamp = stamp_of(status)
        known = cache.get(stamp) if cache is not None else None
        if known is not None:
            return known, stamp
        age_ns = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
        if cache is None or age_ns <= cache.settled_ns:  # nobody will remember: nobody is worth waiting for
            return _digest_unchanged(fd, path, stamp, threads, stop), stamp
        with cache.turn(stamp, stop):
            digest = cache.get(stamp)
            if digest is None:
                digest = _digest_unchanged(fd, path, stamp, threads, stop)
                cache.put(stamp, digest)
            return digest, stamp
    except OSError as error:
        raise NamespaceError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _digest_unchanged(fd: int, path: str, stamp: FileStamp, threads: int | None, stop: threading.Event | None) -> bytes:
    digest, nbytes = _digest(fd, stamp[2], threads, stop)
    if nbytes != stamp[2] or stamp_of(os.stat(path)) != stamp:  # also if another file is there now
        raise NamespaceError(f"{path}: changed while it was read")
    return digest


def _digest(fd: int, size_bytes: int, threads: int | None, stop: threading.Event | None) -> tuple[bytes, int]:
    hasher = blake3(max_threads=threads or min(4, max(1, (os.cpu_count() or 1) // 2)))
    buffer = bytearray(min(_CHUNK_BYTES, size_bytes + 1))
    view = memoryview(buffer)
    total = 0
    while n := os.readv(fd, [buffer]):
        if stop is not None and stop.is_set():
            raise NamespaceError("hashing was stopped")
        hasher.update(view[:n])
        total += n
    return hasher.digest(), total
