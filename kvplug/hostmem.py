"""How much memory this process may use, and whether a pool fits into it: the machine's, or the container's limit.

A tmpfs page that the container's limit has no room for is not an error that a program could handle: the kernel
kills. So the limit is looked up beforehand, from the control groups (version 2 and 1) and /proc/meminfo.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kvplug.errors import DecodeError
from kvplug.outside import file_text, whole_number
from kvplug.sizes import format_size

__all__ = ["DEV_SHM", "Memory", "Room", "ShmSpace", "memory", "memory_room", "room", "shm_room", "shm_space"]

DEV_SHM = "/dev/shm"
SHM_RESERVE_BYTES = 16 << 20
"""Stays free in /dev/shm, for everybody else."""
MEMORY_RESERVE_BYTES = 64 << 20
"""Stays free of the memory that may be used, for everybody else: a pool does not grow into it."""

_UNLIMITED_BYTES = 2**60
"""Version 1 says "no limit" by a number of about 2**63."""


class Memory(NamedTuple):
    """What this process and its neighbours in the container may use together."""

    limit_bytes: int
    """The lowest of all limits that apply. 0: nothing could be read."""
    used_bytes: int
    """What is in use under that limit by now, page cache that can be dropped not counted. 0: unknown."""
    source: str
    """The file that the limit came from."""


class ShmSpace(NamedTuple):
    """Size and room of the file system that holds POSIX shared memory."""

    total_bytes: int
    free_bytes: int


def _read_int(path: Path) -> int | None:
    try:
        return whole_number(file_text(path).strip().encode("utf-8", "surrogateescape"), str(path))
    except (OSError, DecodeError):  # "max", absent, or not ours to read
        return None


def _stat_value(path: Path, name: str) -> int:
    try:
        for line in file_text(path).splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _upwards(base: Path, relative: str) -> list[Path]:
    """*base*/*relative* and every folder above it, down to *base* itself. In a container *relative* may not exist."""
    parts = [part for part in relative.split("/") if part and part != ".."]
    return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _groups(root: Path) -> tuple[str, str | None]:
    """This process's paths in the version 2 hierarchy and in version 1's memory controller."""
    v2, v1 = "", None
    try:
        lines = file_text(root / "proc/self/cgroup").rstrip("\n").split("\n")  # names may have any bytes in them
    except OSError:
        return v2, v1
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            v2 = path
        elif "memory" in controllers.split(","):
            v1 = path
    return v2, v1


def memory(root: str | os.PathLike[str] = "/") -> Memory:
    """The limit on memory that holds for this process. *root* leads to another machine's files in tests."""
    top = Path(root)
    found: list[Memory] = []
    meminfo = top / "proc/meminfo"
    total = _meminfo(meminfo, "MemTotal")
    if total:
        found.append(Memory(total, max(0, total - _meminfo(meminfo, "MemAvailable")), str(meminfo)))
    v2, v1 = _groups(top)
    mount = top / "sys/fs/cgroup"
    for folder in _upwards(mount, v2):
        limit = _read_int(folder / "memory.max")
        if limit is not None:
            used = (_read_int(folder / "memory.current") or 0) - _stat_value(folder / "memory.stat", "inactive_file")
            found.append(Memory(limit, max(0, used), _shown(folder / "memory.max")))
    if v1 is not None:
        for folder in _upwards(mount / "memory", v1):
            limit = _read_int(folder / "memory.limit_in_bytes")
            if limit is not None and limit < _UNLIMITED_BYTES:
                used = _read_int(folder / "memory.usage_in_bytes") or 0
                used -= _stat_value(folder / "memory.stat", "total_inactive_file")
                found.append(Memory(limit, max(0, used), _shown(folder / "memory.limit_in_bytes")))
    return min(found, key=lambda one: one.limit_bytes, default=Memory(0, 0, "nothing"))


def _shown(path: Path) -> str:
    """A path for messages, whatever bytes the group's name has in it."""
    return os.fsencode(path).decode("utf-8", "replace")


def _meminfo(path: Path, name: str) -> int:
    try:
        for line in file_text(path).splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def shm_space(path: str = DEV_SHM) -> ShmSpace | None:
    """Size and free room of /dev/shm for this user, None when there is no such file system."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    # f_bavail leaves out what only root may use. A tmpfs mounted without a limit says 0 blocks.
    return ShmSpace(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)


class Room(NamedTuple):
    """What one place has left for a new pool. The one answer to whether a pool fits, for whoever asks."""

    nbytes: int
    """Largest pool that fits."""
    text: str
    """The numbers that lead to it, in words."""

    def fits(self, pool_bytes: int) -> bool:
        """Whether a pool of this size does."""
        return pool_bytes <= self.nbytes

    @property
    def largest(self) -> str:
        """The largest size that can be set, as it is written in a setting."""
        return f"{self.nbytes >> 20}mib"


def _room(free_bytes: int, reserve_bytes: int, text: str) -> Room:
    left = max(0, free_bytes - reserve_bytes)
    return Room(left, f"{text}, of which {format_size(reserve_bytes)} stay free: {format_size(left)} for a pool")


def shm_room(path: str = DEV_SHM) -> Room | None:
    """What /dev/shm has left for a pool. None: it has no size of its own, or is not there."""
    space = shm_space(path)
    if space is None or not space.total_bytes:
        return None
    return _room(
        space.free_bytes,
        SHM_RESERVE_BYTES,
        f"{path} has {format_size(space.free_bytes)} of {format_size(space.total_bytes)} free",
    )


def memory_room(root: str | os.PathLike[str] = "/") -> Room | None:
    """What the memory that may be used has left for a pool. None: nothing could be read."""
    found = memory(root)
    if not found.limit_bytes:
        return None
    free = max(0, found.limit_bytes - found.used_bytes)
    return _room(
        free,
        MEMORY_RESERVE_BYTES,
        f"memory has {format_size(free)} of {format_size(found.limit_bytes)} free ({found.source})",
    )


def room(path: str = DEV_SHM, root: str | os.PathLike[str] = "/") -> Room | None:
    """The lesser of both. None: neither says anything."""
    rooms = [one for one in (shm_room(path), memory_room(root)) if one is not None]
    return min(rooms, key=lambda one: one.nbytes, default=None)
