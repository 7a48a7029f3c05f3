"""Every error and every result code that kvplug gives out, in one place.

Two kinds of bad news exist. An *exception* (all derive from :class:`KvplugError`) means that the call itself
was wrong or that the pool cannot be used at all: nothing was changed. A *code* (:class:`Code`) is the answer
for one key of a batch: a full pool, a missing block or a slow lock are ordinary and never raise.
"""

from __future__ import annotations

import enum

__all__ = [
    "AgentError",
    "BlockTooLargeError",
    "BufferError",
    "ClientLimitError",
    "Code",
    "ConfigError",
    "DecodeError",
    "DeviceCopyError",
    "DeviceError",
    "DirectoryError",
    "EngineContractError",
    "IntegrityError",
    "KeyFormatError",
    "KvplugError",
    "LockTimeoutError",
    "NamespaceError",
    "PeerAuthError",
    "PeerError",
    "PeerTimeoutError",
    "PoolError",
    "PoolFormatError",
    "PoolNotFoundError",
    "PoolOwnerError",
    "PoolSpaceError",
    "ProtocolError",
    "StoreClosedError",
    "UnsupportedEngineError",
    "VerbsError",
]


class Code(enum.IntEnum):
    """Result for one key of a batch. Non-negative: the block is in the pool; negative: the reason why not."""

    OK = 0
    """Stored, copied, pinned, sealed: what was asked for was done."""
    EXISTS = 1
    """put/reserve: a sealed block with this key is there already."""
    PENDING = 2
    """complete: this part is recorded, other parts of the block are still missing."""
    MISSING = -1
    """No sealed block with this key."""
    IN_PROGRESS = -2
    """put/reserve: another writer is writing this key just now."""
    FULL = -3
    """put/reserve: no slot could be had (everything is pinned, being written, or quarantined)."""
    TIMEOUT = -4
    """The pool lock was not had within the deadline; nothing was done."""
    CORRUPT = -5
    """The block's bytes do not match their stored checksum; it was not used."""
    SIZE = -6
    """The stored block has another size than the buffer that was given; ``batch_put_from_multi_buffers``: the block has
    no byte, or more than a slab of this pool."""
    BUDGET = -7
    """The client's budget of pins or reservations is used up."""
    STALE = -8
    """The (slot, generation) does not name what it named: reused, aborted or reclaimed."""
    RETIRED = -9
    """The pool was removed (`kvplug rm`) while this client was attached."""
    PINNED = -10
    """remove: somebody holds a pin on the block; it stays."""


class KvplugError(Exception):
    """Root of all kvplug exceptions."""


class ConfigError(KvplugError, ValueError):
    """A configuration value is unknown, malformed or out of range."""


class DecodeError(KvplugError, ValueError):
    """Bytes from outside this process are not what they should be; the message says what they are no form of."""


class PoolError(KvplugError):
    """The pool cannot be created, attached or used."""


class PoolNotFoundError(PoolError):
    """No pool of that name exists and the caller asked not to create one."""


class PoolFormatError(PoolError):
    """The segment under that name is not a pool that this version can use; the message says what differs."""


class PoolOwnerError(PoolError):
    """The segment belongs to another user or has other permissions than 0600."""


class PoolSpaceError(PoolError):
    """/dev/shm or the container's memory limit has less room than the pool needs; the message has both numbers."""


class ClientLimitError(PoolError):
    """The pool's client table is full."""


class LockTimeoutError(PoolError):
    """The pool lock could not be had within the deadline during an operation that cannot answer with a code."""


class StoreClosedError(PoolError):
    """The store was closed."""


class IntegrityError(PoolError):
    """check_integrity() found the pool's tables inconsistent; the message lists every finding."""


class KeyFormatError(KvplugError, ValueError):
    """Keys must be `bytes` of length 32 or an (N, 32) uint8 array."""


class BufferError(KvplugError, ValueError):  # noqa: A001 - the SDK's own, always used qualified
    """A buffer has the wrong size, is read-only where it is written to, or is not contiguous."""


class BlockTooLargeError(KvplugError, ValueError):
    """A block is larger than what one slab of this pool can hold."""


class NamespaceError(KvplugError):
    """Something that decides a block's bytes cannot be identified, so nothing may be cached."""


class UnsupportedEngineError(KvplugError):
    """At start: the engine's version, settings or memory layout is not one that kvplug works with; the engine runs on
    without kvplug."""


class EngineContractError(KvplugError):
    """While running: the engine gave other indices, shapes, layouts or names than its version is known for. The one
    lookup, load or store is given up, and the engine runs on."""

    def __str__(self) -> str:
        return f"{super().__str__()}; please report this with the engine's version"


class DeviceError(KvplugError):
    """A device, its driver or its kernels can't be used for copies; the engine runs on without kvplug."""


class DeviceCopyError(DeviceError):
    """A copy between device memory and the pool failed, or brought other bytes; the engine runs on without it."""


class AgentError(KvplugError):
    """The agent cannot serve: its address, another agent on this pool, or a pool that is gone."""


class PeerError(KvplugError):
    """Another host could not be reached or did not do what was asked. A fetch turns it into misses."""


class PeerAuthError(PeerError):
    """The other end has not proved that it has the key, or has refused this host."""


class PeerTimeoutError(PeerError):
    """The other end did not answer within the deadline."""


class ProtocolError(PeerError):
    """What came over the connection is not what the protocol allows at this point; the connection is closed."""


class DirectoryError(KvplugError):
    """The directory's server answered with an error, or with what no Redis or Valkey answers; callers take a miss."""


class VerbsError(KvplugError):
    """RDMA can't be had here, or a device did not do what it was told; who reads takes TCP or a miss instead."""
