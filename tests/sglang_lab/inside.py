"""What tests ask of a living scheduler: called there through ``SglangServer.ask("tests.sglang_lab.inside:...")``."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import Any


def pid(scheduler: Any) -> int:
    """Process id of this rank's scheduler."""
    return os.getpid()


def version(scheduler: Any) -> str:
    """The release of SGLang that runs."""
    import sglang

    return str(sglang.__version__)


def modules(scheduler: Any, prefix: str) -> list[str]:
    """Names of the imported modules that begin so."""
    return sorted(name for name in sys.modules if name.startswith(prefix))


def fail(scheduler: Any, message: str) -> None:
    """Raises, for the test of what becomes of that."""
    raise RuntimeError(message)


def stacks(scheduler: Any) -> dict[str, str]:
    """Where each thread of this rank's scheduler stands, by its name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {names.get(i, str(i)): "".join(traceback.format_stack(at)) for i, at in sys._current_frames().items()}
