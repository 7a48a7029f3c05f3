"""This host among others, as the settings say: its entry in the directory, and its view of it.

Both answer None where no directory is configured: then the peers of the settings are all there are.
"""

from __future__ import annotations

from kvplug.config import Config
from kvplug.errors import ConfigError
from kvplug.rdma.directory.directory import Directory, door
from kvplug.rdma.directory.peers import AllPeers, PeerSource, StaticPeers
from kvplug.rdma.directory.publisher import Publisher
from kvplug.store import KvStore

__all__ = ["check_directory", "directory_publisher", "directory_reader", "host_id", "known_peers"]

_WILDCARDS = ("0.0.0.0", "[::]", "::", "")  # noqa: S104 - compared with, not bound to


def host_id(store: KvStore) -> str:
    """What the directory calls this store's pool: the segment's own id, the same for all its processes."""
    return store.pool_uuid.hex()


def check_directory(config: Config) -> None:
    """Refuse what the settings say of the directory if it can't work, before anything is begun. ConfigError."""
    if config.directory_url is not None:
        door(config)


def directory_publisher(config: Config, store: KvStore, address: str) -> Publisher | None:
    """What tells the directory what ``store`` has; not started. ``address``: where this host's agent listens.

    Raises ConfigError: a wrong directory_url, no auth_key, or an address that nobody else can dial.
    """
    if config.directory_url is None:
        return None
    address = config.agent_advertise or address
    if address.rpartition(":")[0] in _WILDCARDS:
        raise ConfigError(
            f"the agent listens on {address}, which no other host can dial: set agent_advertise to this host's address"
        )
    endpoint, names = door(config)
    return Publisher(
        store.feed(),
        endpoint,
        names,
        host_id=host_id(store),
        address=address,
        ttl_s=config.directory_ttl_s,
        cache_node=config.cache_node,
    )


def directory_reader(config: Config, store: KvStore | None = None) -> Directory | None:
    """A view of the directory, at work; ``store``'s own host is left out of it. Raises ConfigError."""
    if config.directory_url is None:
        return None
    endpoint, names = door(config)
    return Directory(
        endpoint,
        names,
        ttl_s=config.directory_ttl_s,
        timeout_s=config.directory_timeout_s,
        own_id=None if store is None else host_id(store),
    )


def known_peers(config: Config, directory: Directory | None = None) -> PeerSource:
    """The other hosts: those in the directory, and those of the settings, without this host's own agent.

    Closing it closes ``directory``.
    """
    own = config.agent_advertise or config.agent_listen
    listed = StaticPeers(config.peers, own_address=own)
    return listed if directory is None else AllPeers(directory, listed)
