"""`kvplug agent`: let other hosts read this host's pool."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from kvplug.cli import output

__all__ = ["agent"]


def agent(
    pool: Annotated[str, typer.Option("--pool", help="Name of the pool. Default: the one that is configured.")] = "",
    listen: Annotated[str, typer.Option("--listen", help="host:port. Default: the setting agent_listen.")] = "",
    cache_node: Annotated[
        bool, typer.Option("--cache-node", help="Take over blocks that other hosts are about to evict.")
    ] = False,
) -> None:
    """Serve the pool to other hosts until SIGTERM or Ctrl-C. Wider than loopback only with a key or TLS."""
    from kvplug.config import load
    from kvplug.exchange import PoolExchange
    from kvplug.peering import directory_publisher, directory_reader, known_peers
    from kvplug.rdma.agent import Agent
    from kvplug.store import KvStore

    config = load(pool=pool or None, agent_listen=listen or None, cache_node=cache_node or None)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with KvStore(config=config) as store:
        known = known_peers(config, directory_reader(config, store))
        serving = announced = None
        try:
            serving = Agent(PoolExchange(store), config, known)
            address = serving.start()
            if announced := directory_publisher(config, store, address):
                announced.start()
            output.say(f"serving pool {config.pool}{', as a cache node,' if config.cache_node else ''} at {address}")
            if serving.is_open:
                output.complain("without KVPLUG_AUTH_KEY every user of this host can read the pool through the agent")
            serving.serve(stop)
        finally:
            if announced:
                announced.stop()
            if serving:
                serving.close()
            known.close()
