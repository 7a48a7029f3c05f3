"""What a lab works with on this machine: the checkout, a pool that belongs to one test, cores and ports."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "ROOT",
    "SHM",
    "EngineError",
    "core_split",
    "free_port",
    "pool_files",
    "remove_pool",
    "temporary_pool",
]

ROOT = Path(__file__).resolve().parents[2]
SHM = Path("/dev/shm")

LOWEST_PORT = 10_000

_pool_numbers = itertools.count()


class EngineError(RuntimeError):
    """The engine did not start, answered with an error, or is gone. The message ends with the end of its log."""


@contextlib.contextmanager
def temporary_pool(name: str = "lab") -> Iterator[str]:
    """A pool name that nobody else has; what is found under it is unlinked at the end."""
    pool = f"{name}-{os.getpid()}-{next(_pool_numbers)}"
    try:
        yield pool
    finally:
        remove_pool(pool)


def remove_pool(pool: str) -> None:
    """Unlinks every file of this pool from /dev/shm (exactly this name: pools of others are left alone)."""
    for path in glob.glob(f"{glob.escape(str(SHM / f'kvplug.{pool}'))}.*"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def pool_files(pool: str) -> list[Path]:
    """The pool's files in /dev/shm, largest first: the first one is the segment."""
    found = [Path(p) for p in glob.glob(f"{glob.escape(str(SHM / f'kvplug.{pool}'))}.*")]
    return sorted(found, key=lambda p: p.stat().st_size, reverse=True)


def core_split(ranks: int) -> str:
    """The allowed cores dealt out in equal runs, or all on the same where they are few, as "0,1|2,3": what vLLM and
    SGLang take to bind their ranks by."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    shares = [[cores[(r * each + i) % len(cores)] for i in range(each)] for r in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def free_port() -> int:
    """A loopback port that nobody has, and that no connection will be given before a server gets to listen on it."""
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest, highest = map(int, range_file.read_text().split()) if range_file.exists() else (32768, 60999)
    outside = [port for port in range(LOWEST_PORT, 1 << 16) if not lowest <= port <= highest]
    for port in random.SystemRandom().sample(outside, len(outside)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EngineError(f"no port outside of {lowest} to {highest} is free")
