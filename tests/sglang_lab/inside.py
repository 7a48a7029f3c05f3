"""What tests ask of a living scheduler: called there through ``SglangServer.ask("tests.sglang_lab.inside:...")``."""

from __future__ import annotations

import os
from typing import Any


def pid(scheduler: Any) -> int:
    """Process id of this rank's scheduler."""
    return os.getpid()


def version(scheduler: Any) -> str:
    """The release of SGLang that runs."""
    import sglang

    return str(sglang.__version__)
