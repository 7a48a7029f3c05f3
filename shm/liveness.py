"""Who is alive: a byte lock per client on a file description of its own, asked of the kernel, never judged by PID.

Open-file-description locks (``F_OFD_*``) belong to the description and go when it is closed for the last time, which
the kernel does for a process that dies, however it dies. The description is never mapped and a forked child closes
its copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import threading
from collections.abc import Collection
from typing import Final

from kvplug.outside import file_text

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi"  # struct flock: type, whence, start, length, pid (native alignment)
LOCKS_END: Final = 1 << 60
"""Clients' bytes lie below, whatever the format. What an agent locks for itself lies above."""
_MAX_LOCKS: Final = 4096
_MOST_BYTES: Final = 64 << 20  # of a list of the kernel's
PROC: Final = "/proc"
Inode = tuple[int, int]
"""(device, inode) as `os.stat` has them: no two files that exist have the same."""


_private: set[int] = set()
"""File descriptions that carry locks of this process."""
_opening = threading.RLock()  # a signal handler may fork anywhere


def open_private(path: str, flags: int, mode: int = 0o600) -> int:
    """``os.open`` for a description that carries locks: no forked child keeps it, whenever the fork happens."""
    with _opening:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        _private.add(fd)
    return fd


def close_private(fd: int) -> None:
    """Close what :func:`open_private` opened; for the last time, since children have closed theirs."""
    with _opening:  # a fork in between would leave the child a description that it does not know of
        if fd in _private:  # else it is a number that a child inherited
            _private.discard(fd)  # first: once it is closed, the number may be another file's
            os.close(fd)


def _close_in_child() -> None:
    for fd in _private:
        with contextlib.suppress(OSError):
            os.close(fd)  # closes a copy: what the parent holds by it, the parent keeps
    _private.clear()
    _opening.release()


# A fork waits for an open that is under way, so that a child knows all descriptions that it inherits.
os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_close_in_child)


def byte_lock_path_fd(path: str) -> int:
    """A new description of the file, for locks only: :func:`close_private` it. OSError if it can't be had."""
    return open_private(path, os.O_RDWR)


def try_lock_byte(fd: int, at: int) -> bool:
    """Lock one byte for this description; False if another one has it."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock_byte(fd: int, at: int) -> None:
    """Give the byte up again."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def is_locked(fd: int, at: int) -> bool:
    """Whether another description holds this byte."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def count_locks(fd: int) -> int:
    """How many locks other descriptions of the file have on bytes below :data:`LOCKS_END`: one for each client.

    It takes no word of the file to know where they are. OSError where the kernel has no such locks.
    """
    found, ranges = 0, [(0, LOCKS_END)]
    while ranges and found < _MAX_LOCKS:
        start, end = ranges.pop()
        if start >= end:
            continue
        answer = fcntl.fcntl(fd, F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0))
        kind, _, at, length, _ = struct.unpack(_FLOCK, answer)
        if kind != fcntl.F_UNLCK:  # any of those in the range, not the first
            found += 1
            ranges += [(start, at), (at + length if length else end, end)]
    return found


def count_listed(inodes: Collection[Inode]) -> int:
    """The same for files that can't be opened, by the kernel's list of all locks. -1: there is no such list."""
    try:
        lines = file_text(os.path.join(PROC, "locks"), _MOST_BYTES).splitlines()
    except OSError:
        return -1
    found = 0
    for line in lines:
        # 1: OFDLCK  ADVISORY  WRITE -1 00:1b:1290 1024 1024
        match = re.match(r"\d+: (?:OFDLCK|POSIX) .* ([0-9a-f]+):([0-9a-f]+):(\d+) (\d+) ", line)
        if match and (os.makedev(int(match[1], 16), int(match[2], 16)), int(match[3])) in inodes:
            found += int(match[4]) < LOCKS_END
    return found


def mapped_under(path: str, device: int) -> set[Inode]:
    """The files that processes of this user have mapped and that had this path, though another file may have it now."""
    found: set[Inode] = set()
    for name in os.listdir(PROC) if os.path.isdir(PROC) else ():
        if not name.isdigit():
            continue
        try:
            lines = file_text(os.path.join(PROC, name, "maps"), _MOST_BYTES).splitlines()
        except OSError:  # it has ended, or is another user's
            continue
        for line in lines:
            # 7f1c-7f1d rw-s 00000000 00:1b 1290    /dev/shm/kvplug.u0.v3 (deleted)
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].removesuffix(" (deleted)") == path:
                major, minor = (int(part, 16) for part in fields[3].split(":"))
                if os.makedev(major, minor) == device:
                    found.add((device, int(fields[4])))
    return found
