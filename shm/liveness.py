"""Who is alive: a byte lock per client on a file description of its own, asked of the kernel, never judged by PID.

Open-file-description locks (``F_OFD_*``) belong to the description and go when it is closed for the last time, which
the kernel does for a process that dies, however it dies. The description is never mapped and a forked child closes
its copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import Final

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi"  # struct flock: type, whence, start, length, pid (native alignment)


def byte_lock_path_fd(path: str) -> int:
    """A new description of the file, for locks only. OSError if it can't be had."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


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


def alive_clients(fd: int, offset: int, count: int) -> list[int]:
    """Client rows whose byte another description holds. ``count`` is bounded by what a header may claim."""
    return [i for i in range(min(max(count, 0), 4096)) if is_locked(fd, offset + i)]
