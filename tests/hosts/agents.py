"""``kvplug agent`` as it is run, on a host of a test."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.vllm.common import eventually
from tests.vllm_lab.env import ROOT, base_env

START_S = 90.0


class AgentProcess:
    """One agent, on the pool and with the settings that it is given."""

    def __init__(self, pool: str, log: Path, settings: dict[str, str | None], inside: Sequence[str] = ()) -> None:
        """``inside``: a command that the agent's own is appended to."""
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-c", "from kvplug.cli import main; main()", "agent"],
                env=base_env(pool=pool, env=settings),
                cwd=ROOT,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        self.log = log

    def ready(self) -> AgentProcess:
        """Wait until it serves."""
        eventually("the agent serves", lambda: "serving pool" in self.log.read_text(), START_S)
        return self

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
        self.process.wait(20)
