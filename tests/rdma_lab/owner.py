"""The far host of the lab's checks: a pool, an agent in a process of its own, and what is done to them on request.

    python -m tests.rdma_lab.owner HOST PORT

One runs in the other guest, or beside the checks in theirs; :mod:`tests.rdma_lab.far` calls it, by XML-RPC over the
guests' own link. Keys are named by (number, seed), from which both sides make the same ones. Whatever is done to the
agent leaves this process alone, so that it can be asked afterwards.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Final
from xmlrpc.server import SimpleXMLRPCServer

from kvplug import KvStore
from kvplug.rdma.agent.agent import Agent
from kvplug.remote.pool_blocks import PoolExchange
from kvplug.shm import integrity
from kvplug.shm.jit import warm_up
from tests.pool.children import settle
from tests.pool.conftest import leave_nothing
from tests.rdma.hosts import Child, Host, keys, put
from tests.rdma_lab import breaking

PORT: Final = 7000
AGENT_PORT: Final = 9410
STARTS_S: Final = 60.0


class AgentProcess:
    """An agent in a process of its own, which does to itself what it is told."""

    def __init__(self, host: Host) -> None:
        self._near, far = Pipe()

        def body() -> None:
            store = KvStore(config=host.config, create=False)
            agent = Agent(PoolExchange(store), host.config)
            far.send(agent.start())
            threading.Thread(target=self._obey, args=(agent, far), daemon=True).start()
            agent.serve(threading.Event())

        self.child = Child(body)
        far.close()
        if not self._near.poll(STARTS_S):
            raise TimeoutError("the agent does not start")
        self.address: str = self._near.recv()

    @staticmethod
    def _obey(agent: Agent, told: Connection) -> None:
        while True:
            name, arguments = told.recv()
            told.send(getattr(breaking, name)(agent, *arguments))

    def do(self, name: str, *arguments: Any) -> Any:
        """One of the functions of :mod:`tests.rdma_lab.breaking`, in that process."""
        self._near.send((name, arguments))
        if not self._near.poll(STARTS_S):
            raise TimeoutError(f"the agent did not do {name}")
        return self._near.recv()


class Owner:
    """What can be asked for. One host at a time: :meth:`begin` ends the one before."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._numbers = itertools.count()
        self._host: Host | None = None
        self._agent: AgentProcess | None = None

    @property
    def _there(self) -> Host:
        assert self._host is not None, "begin comes first"
        return self._host

    @property
    def _serving(self) -> AgentProcess:
        assert self._agent is not None, "begin comes first"
        return self._agent

    def begin(self, settings: dict[str, Any]) -> str:
        """A host with an empty pool, and its agent. The agent's address."""
        self.end()
        pool, listen = f"t-far-{os.getpid()}-{next(self._numbers)}", f"{self._address}:{AGENT_PORT}"
        self._host = Host(pool, agent_listen=listen, **settings)
        return self.start_agent()

    def end(self) -> bool:
        """Without a host."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.child.kill()
        host, self._host = self._host, None
        if host is not None:
            host.close()
            leave_nothing(host.config.pool)
        return host is not None

    def start_agent(self) -> str:
        """An agent; where there was one, it is dead by now. Its address, always the same."""
        self._agent = AgentProcess(self._there)
        return self._agent.address

    def signal_agent(self, name: str) -> bool:
        """Send it SIGKILL, SIGSTOP or SIGCONT; return once it is dead, or stopped."""
        child = self._serving.child
        child.signal(getattr(signal, name))
        if name == "SIGKILL":
            child.wait()
        if name == "SIGSTOP":
            child.wait_stopped()
        return True

    def break_agent(self, name: str, *arguments: Any) -> Any:
        """Have it do one of the functions of :mod:`tests.rdma_lab.breaking` to itself."""
        return self._serving.do(name, *arguments)

    def put(self, n: int, seed: int, nbytes: int) -> int:
        """Blocks under these keys, as :func:`tests.pool.children.blocks` has them. How many are in the pool."""
        return int((put(self._there.store, keys(n, seed), nbytes) >= 0).sum())

    def remove(self, n: int, seed: int) -> int:
        """Take these out of the pool. How many were there."""
        return int((self._there.store.remove(keys(n, seed)) == 0).sum())

    def scribble(self, n: int, seed: int, first: int, end: int) -> int:
        """Other bytes in the place of these blocks from ``first`` to ``end``. How many blocks."""
        b = self._there.store.pin_batch(keys(n, seed))
        for offset, nbytes in zip(b.offsets[first:end].tolist(), b.nbytes[first:end].tolist(), strict=True):
            self._there.store.mapping[offset : offset + nbytes] ^= 0xEE
        self._there.store.unpin(b.slots)
        return end - first

    def settled(self) -> dict[str, int]:
        """Reap what is dead; what is pinned, in writing, in quarantine then. The pool's tables are whole."""
        settle(self._there.store)
        self._there.store.check_integrity()
        s = self._there.store.stats()
        return {"pinned": s.pinned_slots, "writing": s.writing_slots, "quarantined": s.quarantined_slots}

    def wire(self, how: str) -> bool:
        """What this end's link does to what it sends: netem's words; empty: nothing."""
        netem(how)
        return True


def netem(how: str) -> None:
    """Have this guest's interface treat what it sends so: ``loss 10%``, ``delay 3s``; empty: as it comes."""
    device = os.environ["LAB_DEVICE"]
    subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
    if how:
        words = ["tc", "qdisc", "add", "dev", device, "root", "netem", "limit", "100000", *how.split()]
        subprocess.run(words, check=True, capture_output=True)


def main() -> None:
    """Serve until killed."""
    address, port = sys.argv[1], int(sys.argv[2])
    warm_up()
    integrity.prepare()
    server = SimpleXMLRPCServer((address, port), logRequests=False, allow_none=True)
    server.register_instance(Owner(address))
    print(f"owner: serves at {address}:{port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
