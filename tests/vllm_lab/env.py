"""What a vLLM engine of the lab starts with: its environment, and where other releases lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.lab.env import ROOT, EngineError, core_split

__all__ = ["RELEASE", "base_env", "matrix_path"]

RELEASE = "LAB_VLLM"
"""Variable that names a release of the version matrix, for every engine that is not started with one of its own."""


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
    matrix = matrix or os.environ.get(RELEASE)
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
