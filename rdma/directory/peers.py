"""Which other hosts there are: a list from the settings, or what the directory's members say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Protocol

import msgspec

from kvplug.endpoint import is_host_and_port
from kvplug.errors import ConfigError, DecodeError
from kvplug.outside import decoded
from kvplug.rdma.directory.names import Names

__all__ = ["AllPeers", "PeerInfo", "PeerSource", "StaticPeers"]

MAX_PEERS: Final = 1024
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


class PeerInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """One host's agent."""

    id: str
    """Names the pool that it serves, the same over restarts: 1 to 64 of ``A-Z a-z 0-9 . _ -``."""
    address: str
    """host:port of its agent, as others reach it."""
    epoch: str = ""
    """Another one at each start of the agent; "" if unknown (a peer from the settings)."""
    cache_node: bool = False
    """Whether it takes over blocks that others are about to evict; of a peer from the settings, its Welcome says so."""


class PeerSource(Protocol):
    """Where peers come from."""

    def peers(self) -> tuple[PeerInfo, ...]:
        """Those that are known now, without waiting for anybody."""
        ...

    def close(self) -> None:
        """Stop looking. Idempotent."""
        ...


class StaticPeers:
    """The settings' list. A host's own address may be in it, so that all hosts can have the same list."""

    def __init__(self, addresses: Iterable[str], *, own_address: str | None = None) -> None:
        others = dict.fromkeys(address for address in addresses if address != own_address)
        self._peers = tuple(PeerInfo(id=address, address=address) for address in others)

    def peers(self) -> tuple[PeerInfo, ...]:
        """All of them."""
        return self._peers

    def close(self) -> None:
        """Nothing to stop."""


class AllPeers:
    """Several sources as one; an address that two of them name counts once, as the first says."""

    def __init__(self, *sources: PeerSource) -> None:
        self._sources = sources

    def peers(self) -> tuple[PeerInfo, ...]:
        """Of all sources."""
        by_address: dict[str, PeerInfo] = {}
        for source in self._sources:
            for peer in source.peers():
                by_address.setdefault(peer.address, peer)
        return tuple(by_address.values())

    def close(self) -> None:
        """Close all sources."""
        for source in self._sources:
            source.close()


def checked_id(host_id: str) -> str:
    """The id, if it is one. Raises ConfigError."""
    if not _ID.fullmatch(host_id):
        raise ConfigError(f"a host's id is 1 to 64 of the characters A-Z a-z 0-9 . _ -, not {host_id!r:.80}")
    return host_id


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(PeerInfo)


def to_record(peer: PeerInfo, names: Names) -> bytes:
    """What stands in the directory for this host."""
    return names.seal(_encoder.encode(peer))


def from_record(record: object, host_id: str, names: Names) -> PeerInfo | None:
    """The peer of a record, or None if it was not written by a host with our secret, or under another id."""
    raw = names.unseal(record) if isinstance(record, bytes) else None
    if raw is None:
        return None
    try:
        peer = decoded(_decoder, raw, "a host's record")
    except DecodeError:
        return None
    sound = peer.id == host_id and _ID.fullmatch(peer.id) and _ID.fullmatch(peer.epoch)
    return peer if sound and is_host_and_port(peer.address) else None
