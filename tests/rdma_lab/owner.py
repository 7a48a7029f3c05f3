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
import sys
import time
from typing import Any
from xmlrpc.server import SimpleXMLRPCServer

from kvplug.shm.jit import warm_up
from tests.pool.children import settle
from tests.pool.conftest import leave_nothing
from tests.rdma.hosts import Child, Host, keys, put

PORT = 7000


class Owner:
    """What can be asked for. One host at a time: :meth:`begin` ends the one before."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._numbers = itertools.count()
        self._host: Host | None = None
        self._agent: Child | None = None

    @property
    def _there(self) -> Host:
        assert self._host is not None, "begin comes first"
        return self._host

    def begin(self, settings: dict[str, Any]) -> str:
        """A host with an empty pool, and its agent. The agent's address."""
        self.end()
        self._host = Host(f"t-far-{os.getpid()}-{next(self._numbers)}", agent_listen=f"{self._address}:0", **settings)
        return self.start_agent()

    def end(self) -> bool:
        """Without a host."""
        host, self._host = self._host, None
        if host is not None:
            host.close()
            leave_nothing(host.config.pool)
        return host is not None

    def start_agent(self) -> str:
        """Another agent, after the one before has died. Its address."""
        self._agent, address = self._there.agent_process()
        return address

    def signal_agent(self, name: str) -> float:
        """Send it SIGKILL, SIGSTOP or SIGCONT; return once it is dead, or stopped. time.time() of sending it."""
        assert self._agent is not None
        sent = time.time()
        self._agent.signal(getattr(signal, name))
        if name == "SIGKILL":
            self._agent.wait()
        if name == "SIGSTOP":
            self._agent.wait_stopped()
        return sent

    def put(self, n: int, seed: int, nbytes: int) -> int:
        """Blocks under these keys, as :func:`tests.pool.children.blocks` has them. How many are in the pool."""
        return int((put(self._there.store, keys(n, seed), nbytes) >= 0).sum())

    def remove(self, n: int, seed: int) -> int:
        """Take these out of the pool."""
        return int((self._there.store.remove(keys(n, seed)) == 0).sum())

    def scribble(self, n: int, seed: int, at: int, nbytes: int) -> int:
        """Other bytes in these blocks from ``at`` on: slots that were reused, as one that reads them sees it."""
        b = self._there.store.pin_batch(keys(n, seed))
        for offset in b.offsets.tolist():
            self._there.store.mapping[offset + at : offset + at + nbytes] ^= 0xEE
        self._there.store.unpin(b.slots)
        return len(b.offsets)

    def settled(self) -> dict[str, int]:
        """Reap what is dead; what is pinned, in writing, in quarantine then. The pool's tables are whole."""
        settle(self._there.store)
        self._there.store.check_integrity()
        s = self._there.store.stats()
        return {"pinned": s.pinned_slots, "writing": s.writing_slots, "quarantined": s.quarantined_slots}


def main() -> None:
    """Serve until killed."""
    address, port = sys.argv[1], int(sys.argv[2])
    warm_up()
    server = SimpleXMLRPCServer((address, port), logRequests=False, allow_none=True)
    server.register_instance(Owner(address))
    print(f"owner: serves at {address}:{port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
