"""``kvplug agent`` in a process of its own, as an operator starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.lab.env import free_port
from tests.rdma.hosts import KEY, until

__all__ = ["KEY", "AgentProcess"]

START_S = 240.0


class AgentProcess:
    """An agent on loopback, for one pool; :meth:`close` kills it. ``log``: what it says."""

    def __init__(self, pool: str, log: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
        env |= {"KVPLUG_POOL": pool, "KVPLUG_AGENT_LISTEN": self.address, "KVPLUG_AUTH_KEY": KEY}
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from kvplug.cli import main; main()", "agent"],
                env=env,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        until(lambda: "serving pool" in log.read_text(), START_S)

    def close(self) -> None:
        """Ends it, also where it was stopped."""
        self.process.kill()
        self.process.wait(60)
