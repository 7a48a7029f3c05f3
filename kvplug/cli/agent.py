"""`kvplug agent`: let other hosts read this host's pool."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from typing import TYPE_CHECKING

from kvplug.cli import output

if TYPE_CHECKING:
    from kvplug.config import Config
    from kvplug.store import KvStore

__all__ = ["agent"]


def agent(*, pool: str | None, listen: str, cache_node: bool) -> int:
    """Serve the pool to other hosts until SIGTERM or Ctrl-C."""
    gc.enable()
    from kvplug.config import load
    from kvplug.errors import PoolError
    from kvplug.rdma.agent.agent import check_settings
    from kvplug.remote.peering import check_directory
    from kvplug.shm.segment import remove_pool
    from kvplug.store import KvStore

    config = load(pool=pool, agent_listen=listen or None, cache_node=cache_node or None)
    check_settings(config)
    check_directory(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    has_begun = threading.Event()
    with KvStore(config=config) as store:
        is_new = store.created_pool
        try:
            _serve(config, store, has_begun, stop)
        finally:
            if is_new and not has_begun.is_set():  # a pool that nobody but this agent wanted
                store.close()
                with contextlib.suppress(PoolError):  # by now somebody else has it
                    remove_pool(store.pool_name)
    return 0


def _serve(config: Config, store: KvStore, has_begun: threading.Event, stop: threading.Event) -> None:
    from kvplug.rdma.agent.agent import Agent
    from kvplug.remote.peering import directory_publisher, directory_reader, known_peers
    from kvplug.remote.pool_blocks import PoolExchange

    known = known_peers(config, directory_reader(config, store))
    serving = announced = None
    try:
        serving = Agent(PoolExchange(store), config, known)
        address = serving.start()
        if announced := directory_publisher(config, store, address):
            announced.start()
        has_begun.set()
        output.mention(f"serving pool {config.pool}{', as a cache node,' if config.cache_node else ''} at {address}")
        if serving.is_open:
            output.complain("without KVPLUG_AUTH_KEY every user of this host can read the pool through the agent")
        serving.serve(stop)
    finally:
        if announced:
            announced.stop()
        if serving:
            serving.close()
        known.close()
