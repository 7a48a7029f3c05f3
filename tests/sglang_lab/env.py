"""What an SGLang server of the lab starts with: where its parts lie, and its environment."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.lab.env import ROOT, EngineError, core_split

__all__ = ["MAIN", "OTHER", "SITE", "VERSIONS", "base_env", "installed", "version_path"]

# The table is read, not imported: servers import this module, and one without kvplug has nothing of it.
VERSIONS: tuple[str, ...] = runpy.run_path(str(ROOT / "kvplug" / "engines.py"))["SUPPORTED"]["sglang"].tested
"""What install.sh installs. 0.5.20 and 0.5.21 were made for a slightly older transformers, and run with this one."""
MAIN = VERSIONS[-1]
SITE = Path(__file__).resolve().parent / "site"
OTHER = SITE.parent / "other"
"""A plugin of somebody else's; loaded before kvplug where ``plugins`` names ``other``."""


def version_path(version: str) -> Path:
    """Folder of one SGLang release, put there by install.sh; beside it lies what all of them need."""
    return Path(sys.prefix) / "sglang" / version


def installed(version: str = MAIN) -> bool:
    """Whether install.sh has put this release here, whole."""
    return (version_path(version) / ".complete").exists()


def base_env(
    *,
    version: str = MAIN,
    plugins: tuple[str, ...] = (),
    tp: int = 1,
    env: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """The environment of one server: nothing of the caller's KVPLUG_*/SGLANG_*/VLLM_* settings, no network, quiet.

    ``plugins``: names of SGLang plugins to load beside the lab's own, "kvplug" for one; no other is loaded. ``tp``:
    ranks, each of which gets its own cores where there are enough. ``env`` goes on top; None removes a variable.
    Raises EngineError where that release of SGLang is not installed.
    """
    if not installed(version):
        raise EngineError(f"SGLang {version} is not installed: tests/sglang_lab/install.sh .venv")
    folder = version_path(version)
    out = {k: v for k, v in os.environ.items() if not k.startswith(("KVPLUG_", "SGLANG_", "VLLM_"))}
    others = [str(OTHER)] if "other" in plugins else []
    out.update(
        PYTHONPATH=os.pathsep.join([*others, str(SITE), str(folder), str(folder.parent / "deps"), str(ROOT)]),
        PYTHONUNBUFFERED="1",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), out.get("PATH", os.defpath)]),  # ninja is there
        TORCH_EXTENSIONS_DIR=str(folder / ".extensions"),
        SGLANG_CACHE_DIR=str(folder.parent / "cache"),
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK="1",
        SGLANG_PLUGINS=",".join(["lab", *plugins]),
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        DO_NOT_TRACK="1",
    )
    if tp > 1:
        out["SGLANG_CPU_OMP_THREADS_BIND"] = core_split(tp)
    for name, value in (env or {}).items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = value
    return out
