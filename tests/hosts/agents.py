"""``kvplug agent`` as it is run, on a host of a test; and blocks that go from one host to another without an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvplug.config import load
from kvplug.errors import Code
from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.reader.remote import Peer
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.store import KvStore
from tests.lab.env import ROOT, free_port
from tests.vllm.common import eventually
from tests.vllm_lab.env import base_env

KEY = "a key for the tests of kvplug"
START_S = 240.0


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
        self.process.wait(60)


@dataclasses.dataclass
class OtherHost:
    """A pool that no engine uses, its agent, and an engine's settings that name it."""

    pool: str
    agent: AgentProcess
    settings: dict[str, str | None]


@contextlib.contextmanager
def other_host(pool: str, log: Path) -> Iterator[OtherHost]:
    """One on loopback, which is gone afterwards."""
    address = f"127.0.0.1:{free_port()}"
    agent = AgentProcess(pool, log, {"KVPLUG_AGENT_LISTEN": address, "KVPLUG_AUTH_KEY": KEY})
    try:
        agent.ready()
        yield OtherHost(
            pool,
            agent,
            {
                "KVPLUG_PEERS": address,
                "KVPLUG_AUTH_KEY": KEY,
                "KVPLUG_PEER_TIMEOUT_S": "6",
                "KVPLUG_FETCH_TIMEOUT_S": "20",
            },
        )
    finally:
        agent.close()


def move_blocks(source: str, target: str) -> int:
    """All blocks of one pool are in the other one afterwards, and not in the first. How many there were."""
    config = load(auth_key=KEY, agent_listen="127.0.0.1:0", agent_pin_share=1.0, peer_timeout_s=60.0)
    with KvStore(source, config=config, create=False) as there, KvStore(target, config=config, create=False) as here:
        keys = there.feed().scan()
        agent = Agent(PoolExchange(there), config)
        peer = Peer(agent.start(), PoolExchange(here), config)
        try:
            codes = peer.fetch(keys, START_S)
            assert (codes >= 0).all(), codes.tolist()
        finally:
            peer.close()
            agent.close()
        eventually("nobody pins them", lambda: not (there.remove(keys) == Code.PINNED).any())
        assert not there.exists(keys).any()
    return len(keys)
