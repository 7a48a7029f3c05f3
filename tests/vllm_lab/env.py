"""What an engine of the lab starts with: its environment, and a pool that belongs to one test."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import random
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = [
    "ROOT",
    "SHM",
    "EngineError",
    "base_env",
    "core_split",
    "free_port",
    "matrix_path",
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


def matrix_path(version: str) -> Path | None:
    """Folder of another vLLM release that ``install.sh`` put beside the main one, or None where it is missing."""
    folder = Path(sys.prefix) / "matrix" / version
    return folder if (folder / ".complete").exists() else None


def base_env(
    *,
    pool: str | None,
    size: str = "256mib",
    ranks: int = 1,
    matrix: str | None = None,
    env: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """The environment of one engine: nothing of the caller's KVPLUG_*/VLLM_* settings, no network, quiet.

    ``pool`` None: kvplug is not loaded. ``ranks``: processes that compute; each gets its own cores where there are
    enough. ``matrix``: another vLLM version out of the version matrix. ``env`` goes on top; None removes a variable.
    """
    out = {k: v for k, v in os.environ.items() if not k.startswith(("KVPLUG_", "VLLM_"))}
    path = [str(ROOT)]
    if matrix is not None:
        folder = matrix_path(matrix)
        if folder is None:
            raise EngineError(f"vLLM {matrix} is not installed: run tests/vllm_lab/install.sh")
        path.insert(0, str(folder))
    out.update(
        PYTHONPATH=os.pathsep.join(path),
        PYTHONUNBUFFERED="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_PLUGINS="",
        OMP_WAIT_POLICY="PASSIVE",
    )
    if ranks > 1:
        out["VLLM_CPU_OMP_THREADS_BIND"] = core_split(ranks)
    if pool is not None:
        out.update(VLLM_PLUGINS="kvplug", KVPLUG_POOL=pool, KVPLUG_SIZE=size, KVPLUG_VERIFY="always")
    for name, value in (env or {}).items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = value
    return out


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
