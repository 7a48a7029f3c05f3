"""`kvplug agent`: let other hosts read this host's pool."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from kvplug.cli import output
from kvplug.cli.pools import PoolName

__all__ = ["agent"]


def agent(
    pool: PoolName = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="host:port. Default: the setting agent_listen.")
    ] = None,
) -> None:
    """Serve the pool to other hosts until SIGTERM or Ctrl-C. Wider than loopback only with a key or TLS."""
    from kvplug.config import load
    from kvplug.exchange import PoolExchange
    from kvplug.peering import directory_publisher
    from kvplug.rdma.agent import Agent
    from kvplug.store import KvStore

    config = load(pool=pool, agent_listen=listen)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with KvStore(config=config) as store:
        serving = Agent(PoolExchange(store), config)
        announced = None
        try:
            address = serving.start()
            if announced := directory_publisher(config, store, address):
                announced.start()
            output.say(f"serving pool {config.pool} at {address}")
            if serving.is_open:
                output.complain("without KVPLUG_AUTH_KEY every user of this host can read the pool through the agent")
            serving.serve(stop)
        finally:
            if announced:
                announced.stop()
            serving.close()
