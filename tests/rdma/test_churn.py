"""All at once: the owner's slots are reused all the time, its agents are killed in mid-read, and no byte is wrong.

An agent that is killed loses its pins while bytes that refer to its slots are still on their way: those slots are
other blocks' by the time they arrive.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

from kvplug import KvStore
from kvplug.errors import Code
from kvplug.rdma.agent.agent import Agent
from kvplug.remote.pool_blocks import PoolExchange
from tests.inside import pool_of
from tests.rdma.hosts import BLOCK, Child, Host, Proxy, blocks, keys, put, until
from tests.stopwatch import LONG_S

AGENTS = 8
CAME = 40
"""Blocks that have to come from an agent before it is killed."""
KNOWN = 300
SEED = int(os.environ.get("KVPLUG_TEST_SEED", "20251124"))


class Successors:
    """Agents in processes of their own, made before there are threads; each serves once its turn has come."""

    def __init__(self, host: Host) -> None:
        self._waiting: list[tuple[Child, Any]] = []
        for _ in range(AGENTS):
            near, far = Pipe()

            def body(far: Any = far) -> None:
                far.recv()
                agent = Agent(PoolExchange(KvStore(config=host.config, create=False)), host.config)
                far.send(agent.start())
                agent.serve(threading.Event())

            self._waiting.append((Child(body), near))
        self.serving: Child | None = None

    def kill(self) -> None:
        """End the one that serves."""
        if self.serving is not None:
            self.serving.kill()

    def next(self) -> str:
        """The address of the next one."""
        self.serving, near = self._waiting.pop()
        near.send("go")
        assert near.poll(LONG_S), "the next agent does not start"
        return str(near.recv())

    def close(self) -> None:
        """End them all."""
        for child, _ in self._waiting:
            child.kill()
        self.kill()


def test_no_wrong_byte_while_slots_are_reused_and_agents_die(make_host: Callable[..., Host], proxy: Proxy) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    owner = make_host(size="12mib", agent_advertise=proxy.address, quarantine_grace_s=0.0)
    reader = make_host(size="32mib", quarantine_grace_s=0.0, peer_timeout_s=0.5)
    of = keys(KNOWN, 1)
    data = blocks(of, BLOCK)
    agents = Successors(owner)
    stop = threading.Event()
    wrong: list[str] = []

    def churn() -> None:
        other = random.Random(SEED + 1)
        while not stop.wait(0.001):
            some = other.sample(range(KNOWN), 12)
            owner.store.put(of[some], list(data[some]))

    churning = threading.Thread(target=churn)
    seen: Counter[int] = Counter()

    def fetch() -> None:
        mine = random.Random(SEED + 2)
        peer = reader.peer(proxy.address)
        while not stop.is_set():
            while peer.is_down and not stop.is_set():
                time.sleep(0.002)  # it would answer at once, and keep the interpreter from the others
            some = mine.sample(range(KNOWN), 100)
            codes = peer.fetch(of[some], 2.0)
            seen.update(codes.tolist())
            try:
                reader.holds(of[some])
            except AssertionError as e:
                wrong.append(str(e))
            reader.store.remove(of[some])

    fetching = threading.Thread(target=fetch)
    try:
        proxy.upstream = agents.next()
        churning.start()
        fetching.start()
        while agents._waiting:
            before = seen[Code.OK]
            until(lambda before=before: seen[Code.OK] >= before + CAME)
            time.sleep(rng.uniform(0.05, 0.3))
            proxy.taking.clear()  # what the agent sends now stays in its sockets, by reference
            time.sleep(0.1)
            agents.kill()
            pool_of(owner.store).reap()
            time.sleep(0.15)  # its slots are other blocks'
            proxy.taking.set()
            proxy.upstream = agents.next()
    finally:
        stop.set()
        churning.join(LONG_S)
        fetching.join(LONG_S)
        agents.close()
    assert not wrong, f"seed {SEED}: {wrong[:3]}"
    assert not churning.is_alive()
    assert not fetching.is_alive()
    pool_of(owner.store).reap()
    until(lambda: owner.store.stats().pinned_slots == 0)
    for host in (owner, reader):
        until(lambda host=host: host.store.stats().writing_slots + host.store.stats().quarantined_slots == 0)
        host.store.check_integrity(deep=True)
    assert (put(owner.store, of[:10], BLOCK) >= 0).all()
