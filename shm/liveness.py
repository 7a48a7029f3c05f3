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
import threading
from typing import Final

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi"  # struct flock: type, whence, start, length, pid (native alignment)


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


def alive_clients(fd: int, offset: int, count: int) -> list[int]:
    """Client rows whose byte another description holds. ``count`` is bounded by what a header may claim."""
    return [i for i in range(min(max(count, 0), 4096)) if is_locked(fd, offset + i)]
